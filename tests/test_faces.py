"""From a folder to table and pixels: nothing lost in silence, nothing half-made, nothing leaked."""

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from utils import faces as module
from utils.download import file_sha256
from utils.faces import duplicate_groups, load_faces, near_duplicates, parse_name, prepare
from utils.settings import CHIP_SIZE, ROOT, get_settings

NAMES = [f"{20 + i}_{i % 2}_{i % 5}_20170116{i:09d}.jpg.chip.jpg" for i in range(12)]
ORANGE = (230, 120, 40)  # RGB
DAMAGED = "cannot be decoded: damaged, cut off or not an image"
NO_IMAGE = "no image file with a printable name in the folder"
HASHES = np.random.default_rng(0).integers(0, 256, (10, 32), dtype=np.uint8)
NO_AGE = "no age between 0 and 120, or a second row of labels.csv"


def encoded(seed: int, suffix: str = ".jpg") -> bytes:
    """A smooth random picture; two seeds give two pictures far apart."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = cv2.resize(cells, (CHIP_SIZE, CHIP_SIZE), interpolation=cv2.INTER_CUBIC)
    return cv2.imencode(suffix, picture)[1].tobytes()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Twelve good faces; the path has a space and letters beyond ASCII."""
    path = tmp_path / "die Gesichter – 顔"
    path.mkdir()
    for seed, name in enumerate(NAMES):
        (path / name).write_bytes(encoded(seed))
    return path


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "der Cache"


def homes(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


def agree(faces, folder: Path) -> None:
    """Each row with its pixels and its file, read in another way."""
    for row, chip in zip(faces.table.itertuples(), faces.pixels, strict=True):
        picture = cv2.imread(str(folder / row.file))[..., ::-1]
        assert np.abs(picture.astype(int) - chip).max() <= 2
        assert row.sha256 == file_sha256(folder / row.file)
        assert row.brightness == pytest.approx(cv2.cvtColor(picture, 7).mean(), abs=0.5)


def test_names_with_and_without_all_fields():
    expected = {"age": 116, "gender": "female", "ethnicity": "Others"}
    assert parse_name("116_1_4_20170120134 .jpg") == expected
    for fields in "39_1_2017 26_2_0_2017 26_0_5_2017 26_0_1 -1_0_1_2017 1000_0_1_2017 x".split():
        with pytest.raises(ValueError, match="malformed name"):
            parse_name(f"{fields}.jpg")


def test_rows_and_pixels_belong_together_and_are_cached(folder, cache, monkeypatch):
    table, pixels, excluded = faces = prepare(folder, cache)
    assert table["file"].tolist() == NAMES and table.index.tolist() == list(range(12))
    assert pixels.shape == (12, CHIP_SIZE, CHIP_SIZE, 3) and pixels.dtype == np.uint8
    columns = "file age gender ethnicity person sha256 dhash brightness sharpness group fold split"
    assert list(table) == columns.split() and table.notna().all(axis=None) and excluded.empty
    assert list(table["ethnicity"].cat.categories) == list(module.ETHNICITIES)
    assert (table["group"] == table["file"]).all(), "no two of these pictures are alike"
    labels = table[["age", "gender", "ethnicity"]].to_dict("records")
    assert labels == [parse_name(name) for name in NAMES]
    agree(faces, folder)
    monkeypatch.setattr(module, "_read", None)  # decoded once; and a read-only disk has no lock
    monkeypatch.setattr("utils.download.FileLock", None)
    pd.testing.assert_frame_equal(prepare(folder, cache).table, table)
    agree(prepare(folder, cache), folder)


def test_files_that_cannot_be_used_are_listed_with_reasons(folder, cache):
    expected = dict.fromkeys(("notes.txt", "50_0_0_2017.mp4", "62_0_0_2017\udcff.jpg"), NO_IMAGE)
    expected |= dict.fromkeys(("51_0_0_2017.jpg", "52_0_0_2017.jpg"), DAMAGED)
    expected |= {"61_1_2017.jpg": "malformed name: age_gender_ethnicity_date expected"}
    for name in expected:
        data = {"51_0_0_2017.jpg": b"", "52_0_0_2017.jpg": b"<html>"}.get(name, encoded(50))
        (folder / name).write_bytes(data)
    (folder / "54_0_0_2017.jpg").mkdir()
    (folder / "57_0_0_2017.jpg").symlink_to(folder / "gone.jpg")
    expected |= dict.fromkeys(("54_0_0_2017.jpg", "57_0_0_2017.jpg"), NO_IMAGE)
    table, pixels, excluded = prepare(folder, cache)
    assert table["file"].tolist() == NAMES and len(pixels) == 12
    assert dict(excluded.itertuples(index=False, name=None)) == expected


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_a_file_cut_anywhere_or_filled_with_zeros_is_left_out(folder, cache, suffix):
    """No grey half passes for a face. Some decoders crash on a PNG that ends in zeros."""
    data, fill = encoded(60, suffix), suffix != ".webp"
    cuts = [3, 20, *(len(data) * tenth // 10 for tenth in range(1, 10)), len(data) - 14]
    for i, cut in enumerate(cuts):
        (folder / f"60_0_0_2018{i}{suffix}").write_bytes(data[:cut])
        (folder / f"61_0_0_2018{i}{suffix}").write_bytes(data[:cut] + bytes(len(data) - cut) * fill)
    (folder / f"62_0_0_2018{suffix}").write_bytes(data + b"trailer" * 100)  # as some phones do
    table, _, excluded = prepare(folder, cache)
    assert table["file"].tolist() == [*NAMES, f"62_0_0_2018{suffix}"]
    assert excluded["reason"].tolist() == [DAMAGED] * 2 * len(cuts)


def test_every_kind_and_shape_of_image_becomes_its_central_square_in_rgb(tmp_path, cache):
    kinds = "RGB.jpg RGB.JPEG RGB.webp L.jpg CMYK.jpg RGB.png RGBA.png LA.png P.png".split()
    for i, (kind, suffix) in enumerate(name.split(".") for name in kinds):
        image = Image.new("RGB", (300, 100) if i % 2 else (101, 300), ORANGE)
        image.paste("white", (0, 0, 80, 100) if i % 2 else (0, 0, 101, 80))
        image = image.quantize(4) if kind == "P" else image.convert(kind)
        image.save(tmp_path / f"{10 + i}_0_0_2017.{suffix}", quality=95)
    image, exif = Image.new("RGB", (100, 100), ORANGE), Image.Exif()
    image.paste("white", (50, 0, 100, 100))
    exif[0x0112] = 6  # turned by 90 degrees: its right half is below
    image.save(tmp_path / "99_0_0_2017.jpg", quality=95, exif=exif)
    *chips, turned = prepare(tmp_path, cache).pixels
    assert turned[:50].max() < 255 and turned[78:].min() > 200
    for kind, chip in zip(kinds, chips, strict=True):
        assert np.abs(chip.astype(int) - (144 if kind[0] == "L" else ORANGE)).max() <= 8, kind


def test_changed_files_are_noticed_and_the_old_cache_goes(folder, cache):
    prepare(folder, cache)
    size, time = (folder / NAMES[4]).stat().st_size, (folder / NAMES[4]).stat().st_mtime_ns
    (folder / NAMES[4]).write_bytes(encoded(999)[:size].ljust(size, b"\0"))
    os.utime(folder / NAMES[4], ns=(time, time + 1))  # only the time tells
    agree(prepare(folder, cache), folder)
    (folder / NAMES[4]).unlink()
    assert len(prepare(folder, cache).table) == 11 and len(homes(cache)) == 1


def test_without_faces_the_ways_out_are_told(tmp_path, cache):
    ways = "make data.*UTKFACE_ARCHIVE.*AGE_FACES=sample"
    with pytest.raises(FileNotFoundError, match=f"among the 0 files of .*gone.*{ways}"):
        prepare(tmp_path / "gone", cache)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "holiday.jpg").write_bytes(encoded(1))
    with pytest.raises(FileNotFoundError, match=f"among the 1 files.*malformed name.*{ways}"):
        prepare(tmp_path / "own", cache)
    assert homes(cache) == []


def test_two_at_once_build_once(folder, cache, monkeypatch):
    read, calls = module._read, []
    monkeypatch.setattr(module, "_read", lambda *file: calls.append(file) or read(*file))
    with ThreadPoolExecutor(2) as pool:  # as two notebooks might
        for faces in pool.map(lambda _: prepare(folder, cache), range(2)):
            agree(faces, folder)
    assert len(calls) == 12 and len(homes(cache)) == 1


def flipped(hash_: np.ndarray, count: int) -> np.ndarray:
    """A hash (uint8 [32]) with `count` of its 256 bits turned."""
    return np.packbits(np.unpackbits(hash_) ^ (np.arange(256) < count))


def test_near_duplicates_are_those_of_brute_force():
    base, limit = HASHES, module.HASH_LIMIT
    hashes = np.stack([*base, *(flipped(base[i % 10], i % 45) for i in range(90))])
    bits = np.unpackbits(hashes, axis=1)
    distances = {(i, j): (bits[i] != bits[j]).sum() for i, j in combinations(range(100), 2)}
    pairs, far = near_duplicates(hashes)
    found = sorted(zip(map(tuple, pairs.tolist()), far.tolist(), strict=True))
    assert found == sorted(item for item in distances.items() if item[1] <= limit)
    assert limit in far and limit + 1 in distances.values()


def test_groups_join_chains_copies_and_persons_in_any_order_of_rows():
    first, second, third = HASHES[:3]
    chain = flipped(first, 20), flipped(first, 40)  # the second is too far from first
    hashes = [first, *chain, second, second, third, flipped(third, 99)]
    table = pd.DataFrame({"file": list("dbeafcg"), "person": ["", "", "x", "", "", "", "x"]})
    table["dhash"] = [hash_.tobytes().hex() for hash_ in hashes]
    for rows in (table, table[::-1]):
        groups = dict(zip(rows["file"], duplicate_groups(rows.reset_index()), strict=True))
        assert groups == {"d": "b", "b": "b", "e": "b", "g": "b", "a": "a", "f": "a", "c": "c"}


def test_split_and_fold_follow_from_the_group_alone():
    pinned = {  # a change here changes the test set of everyone
        "26_0_1_20170116171048641.jpg.chip.jpg": "train",
        "100_1_0_20170112213303693.jpg.chip.jpg": "valid",
        "100_0_0_20170112215240346.jpg.chip.jpg": "test",
    }
    assert module.split(pd.Series(list(pinned))).tolist() == list(pinned.values())
    ramp = np.tile(np.arange(CHIP_SIZE, dtype=np.uint8), (CHIP_SIZE, 1))
    hashes = [module.difference_hash(picture) for picture in (ramp, ramp[:, ::-1])]
    assert hashes == ["f" * 64, "0" * 64]
    groups = pd.Series([f"{i % 7000}_0_0_2017.jpg" for i in range(10_000)])
    table = pd.DataFrame({"file": groups.index.astype(str), "split": module.split(groups)})
    folds = pd.Series(module.fold(groups))
    assert ((folds == 4) == (table["split"] != "train")).all()
    assert folds.value_counts(normalize=True).between(0.18, 0.22).sum() == 5
    assert (module.fold(groups[::-2]) == folds[::-2]).all()
    one, same, other = map(module.split_digest, (table, table[::-1], table[1:]))
    assert one == same != other


@pytest.fixture
def own(tmp_path) -> Path:
    (tmp_path / "own" / "album").mkdir(parents=True)
    for seed, letter in enumerate("abcdef"):
        (tmp_path / "own" / "album" / f"{letter}.jpg").write_bytes(encoded(seed))
    return tmp_path / "own"


def test_tables_as_people_write_them(own):
    (own / "album" / "b.jpg").rename(own / "Ju\u0308rgen.jpg")  # as macOS may write it
    for text in (
        "\ufeffFile ; AGE\nalbum/a.jpg ;31.4",
        "age\tfile\tnotes\n30.6\talbum\\a.jpg\tx",
        '"file","age"\n"./album/a.jpg","31"',
        "file,age\nJ\u00fcrgen.jpg,31\n",
    ):
        (own / "labels.csv").write_text(text, "utf-8")
        (row,) = (row for row in module.read_labels(own) if row["age"] > 0)
        assert row.pop("file") in ("album/a.jpg", "Ju\u0308rgen.jpg")
        assert round(row.pop("age")) == 31
        assert row == {"gender": "unknown", "ethnicity": "unknown", "person": ""}


def test_rows_that_cannot_be_used_are_listed(own, cache):
    (own / "album" / "f.jpg").write_bytes(b"no image")
    rows = "a.jpg,30.5 a.jpg,31 b.jpg,dreißig c.jpg,-1 d.jpg,121 f.jpg,50 g.jpg".split()
    rows = [f"album/{row}" for row in rows]
    (own / "labels.csv").write_text("\n".join(["file,age", *rows, "gone.jpg,20", ",20"]), "utf-8")
    table, _, excluded = prepare(own, cache)
    assert table[["file", "age"]].to_numpy().tolist() == [["album/a.jpg", 31]]
    expected = [(f"album/{name}.jpg", NO_AGE) for name in "abcde"] + [("album/f.jpg", DAMAGED)]
    expected += [(name, NO_IMAGE) for name in ("album/g.jpg", "gone.jpg", "labels.csv")]
    assert sorted(excluded.itertuples(index=False, name=None)) == expected
    rows = "a.jpg,32,f,NA,x album/b.jpg,30,m,,x album/c.jpg,30,m,White,".replace(" ", "\n")
    for column in ("person", "group"):  # a changed label gives another cache
        (own / "labels.csv").write_text(f"file,age,gender,ethnicity,{column}\nalbum/{rows}")
        table = prepare(own, cache).table
        assert table["age"].tolist() == [32, 30, 30] and len(homes(cache)) == 1
        assert table["group"].tolist() == ["album/a.jpg", "album/a.jpg", "album/c.jpg"]
        assert list(table["ethnicity"].cat.categories) == ["White", "NA", "unknown"]


def test_a_file_that_is_no_table_is_refused(own, cache):
    for data in (b"", b"name,years\n", b"file,age\nJ\xfcrgen.jpg,3\n", b'file,age\n"a.jpg,3\n'):
        (own / "labels.csv").write_bytes(data)
        with pytest.raises(ValueError, match="labels.csv is no CSV in UTF-8 with .*save it as"):
            prepare(own, cache)


def test_missing_faces_are_drawn_or_unpacked_once(tmp_path, monkeypatch):
    def make(*paths: Path) -> None:
        calls.append(paths[:-1])
        paths[-1].mkdir()
        (paths[-1] / NAMES[0]).write_bytes(encoded(0))

    calls = []
    monkeypatch.setattr(module, "draw_sample", make)
    monkeypatch.setattr(module, "unpack", make)
    monkeypatch.setenv("AGE_DATA", str(tmp_path))
    monkeypatch.setenv("UTKFACE_ARCHIVE", str(tmp_path))
    for name in ("sample", "sample", "utkface", "utkface"):
        assert len(load_faces(get_settings(name)).table) == 1
    assert calls == [(), (tmp_path,)]


@pytest.mark.skipif(not os.environ.get("UTKFACE_ARCHIVE"), reason="needs UTKFACE_ARCHIVE")
def test_utkface_and_its_split_are_the_published_ones(monkeypatch):
    """Prepared once, in build/, for all runs of the tests."""
    monkeypatch.setenv("AGE_DATA", str(ROOT / "build" / "test data"))
    table, pixels, excluded = load_faces(get_settings("utkface"))
    assert len(table) == len(pixels) == 23_705 and len(excluded) == 3
    assert excluded["reason"].str.startswith("malformed name").all()
    sizes = {"White": 10_078, "Black": 4_526, "Indian": 3_975, "Asian": 3_434, "Others": 1_692}
    assert table["ethnicity"].value_counts().to_dict() == sizes
    assert (table["age"].min(), table["age"].max(), (table["age"] == 26).sum()) == (1, 116, 2_197)
    copies = table[table.duplicated("sha256", keep=False)]
    assert len(copies) == 765 and copies["sha256"].nunique() == 375
    assert (
        module.split_digest(table)
        == "0518aa88fd414c43b4ac899979e92f95f54ab7a8db0d835e7b7ff643cc982b75"
    )
    assert table["split"].value_counts().tolist() == [18_977, 2_389, 2_339]  # train, test, valid
    hashes = np.stack([np.frombuffer(bytes.fromhex(digits), np.uint8) for digits in table["dhash"]])
    pairs, _ = near_duplicates(hashes)  # computed anew, whatever the groups say
    assert len(pairs) >= 1_000
    assert (np.diff(table["split"].cat.codes.to_numpy()[pairs]) == 0).all()
    assert (np.diff(table["fold"].to_numpy()[pairs]) == 0).all()
