"""From a folder to table and pixels: nothing lost in silence, nothing half-made, nothing leaked."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
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
from utils.faces import HASH_LIMIT, duplicate_groups, fold, load_faces, near_duplicates, prepare

from utils.faces import difference_hash, parse_name, read_labels, split, split_digest  # isort: skip
from utils.settings import CHIP_SIZE, ROOT, get_settings

NAMES = [f"{20 + i}_{i % 2}_{i % 5}_20170116{i:09d}.jpg.chip.jpg" for i in range(12)]
MALFORMED = (
    "39_1_2017.jpg 26_2_0_2017.jpg 26_0_5_2017.jpg 26_0_1.jpg -1_0_1_2017.jpg 26__1_2017.jpg"
)
ORANGE = (230, 120, 40)  # RGB
DAMAGED = "cannot be decoded: damaged, cut off or not an image"


def texture(seed: int) -> np.ndarray:
    """A smooth random picture, uint8 BGR; two seeds give two pictures far apart."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return cv2.resize(cells, (CHIP_SIZE, CHIP_SIZE), interpolation=cv2.INTER_CUBIC)


def encoded(seed: int, suffix: str = ".jpg") -> bytes:
    return cv2.imencode(suffix, texture(seed))[1].tobytes()


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


# The table and the pixels


def test_names_with_and_without_all_fields():
    name, other = "26_0_1_20170116171048641.jpg.chip.jpg", "116_1_4_20170120134 .jpg"
    assert parse_name(name) == {"age": 26, "gender": "male", "ethnicity": "Black"}
    assert parse_name(other) == {"age": 116, "gender": "female", "ethnicity": "Others"}
    for name in (*MALFORMED.split(), "1000_0_1_2017.jpg", "x26_0_1_2017.jpg", "portrait.jpg", ""):
        with pytest.raises(ValueError, match="malformed name"):
            parse_name(name)


def test_rows_and_pixels_belong_together_and_are_cached(folder, cache, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 5)
    table, pixels, excluded = faces = prepare(folder, cache)
    assert table["file"].tolist() == NAMES and table.index.tolist() == list(range(12))
    assert pixels.shape == (12, CHIP_SIZE, CHIP_SIZE, 3) and pixels.dtype == np.uint8
    columns = "file age gender ethnicity person sha256 dhash brightness sharpness group fold split"
    assert list(table) == columns.split() and table.notna().all(axis=None) and excluded.empty
    assert list(table["ethnicity"].cat.categories) == list(module.ETHNICITIES)
    assert list(table["split"].cat.categories) == ["train", "valid", "test"]
    assert (table["group"] == table["file"]).all(), "no two of these pictures are alike"
    labels = table[["age", "gender", "ethnicity"]].to_dict("records")
    assert labels == [parse_name(name) for name in NAMES]
    agree(faces, folder)
    monkeypatch.setattr(module, "_read", None)  # decoded once; and a read-only disk has no lock
    monkeypatch.setattr("utils.download.FileLock", None)
    pd.testing.assert_frame_equal(prepare(folder, cache).table, table)
    agree(prepare(folder, cache), folder)


def test_files_that_cannot_be_used_are_listed_with_reasons(folder, cache):
    none = ("NA", "notes.txt", "50_0_0_2017.mp4", "54_0_0_2017.jpg", "57_0_0_2017.jpg")
    expected = dict.fromkeys(none, "not an image file")
    expected |= dict.fromkeys(("51_0_0_2017.jpg", "52_0_0_2017.jpg"), DAMAGED)
    expected |= {"61_1_2017.jpg": "malformed name: age_gender_ethnicity_date expected"}
    (folder / "54_0_0_2017.jpg").mkdir()
    (folder / "57_0_0_2017.jpg").symlink_to(folder / "gone.jpg")
    for name in expected.keys() - {"54_0_0_2017.jpg", "57_0_0_2017.jpg"}:
        data = {"51_0_0_2017.jpg": b"", "52_0_0_2017.jpg": b"<html>"}.get(name, encoded(50))
        (folder / name).write_bytes(data)
    (folder / "62_0_0_2017\udcff.jpg").write_bytes(encoded(50))
    expected[r"62_0_0_2017\udcff.jpg"] = "malformed name: characters that cannot be printed"
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
    assert excluded["reason"].str.startswith("cannot be decoded: ").all()
    assert len(excluded) == 2 * len(cuts)


def test_every_kind_and_shape_of_image_becomes_its_central_square_in_rgb(tmp_path, cache):
    kinds = "RGB.jpg RGB.JPEG RGB.webp L.jpg CMYK.jpg RGB.png RGBA.png LA.png P.png I;16.png"
    for i, (kind, suffix) in enumerate(name.split(".") for name in kinds.split()):
        image = Image.new("RGB", (300, 100) if i % 2 else (101, 300), ORANGE)
        image.paste("white", (0, 0, 80, 100) if i % 2 else (0, 0, 101, 80))
        if kind == "I;16":  # Pillow writes 16 bits in grey only
            image = Image.fromarray(np.full((100, 300), 144 * 257, np.uint16))
        else:
            image = image.quantize(4) if kind == "P" else image.convert(kind)
        image.save(tmp_path / f"{10 + i}_0_0_2017.{suffix}", quality=95)
    for kind, chip in zip(kinds.split(), prepare(tmp_path, cache).pixels, strict=True):
        colour = 144 if kind[0] in "LI" else ORANGE
        assert np.abs(chip.astype(int) - colour).max() <= 8, kind


# The cache


def repair(path: Path) -> None:
    """Other bytes of the same length: only the time tells."""
    size, time = path.stat().st_size, path.stat().st_mtime_ns
    path.write_bytes(encoded(999)[:size].ljust(size, b"\0"))
    os.utime(path, ns=(time, time + 1))


@pytest.mark.parametrize("change", [repair, Path.unlink])
def test_changed_files_are_noticed_and_the_old_cache_goes(folder, cache, change):
    prepare(folder, cache)
    old = homes(cache)
    change(folder / NAMES[4])
    after = prepare(folder, cache)
    assert len(homes(cache)) == 1 and homes(cache) != old
    assert {*after.table["file"], *after.excluded["file"]} == {*os.listdir(folder)}
    agree(after, folder)


def test_without_faces_the_ways_out_are_told(tmp_path, cache):
    with pytest.raises(FileNotFoundError, match="make data.*UTKFACE_ARCHIVE.*AGE_FACES=sample"):
        prepare(tmp_path / "gone", cache)
    (tmp_path / "holiday.jpg").write_bytes(encoded(1))
    with pytest.raises(FileNotFoundError, match="no usable face among the 1 files.*malformed name"):
        prepare(tmp_path, cache)
    assert homes(cache) == []


SLOW = """
import os, sys, time
from pathlib import Path
from utils import faces
def slow(folder, row):
    if row["file"].startswith("3"):
        os.write(1, b"half done\\n")
        time.sleep(600)
    return read(folder, row)
read, faces._read, faces.CHUNK = faces._read, slow, 4
faces.prepare(*map(Path, sys.argv[1:]))
"""


def test_a_killed_build_leaves_nothing_and_two_at_once_build_once(folder, cache, monkeypatch):
    command = [sys.executable, "-c", SLOW, str(folder), str(cache)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "half done\n"
    process.kill()
    process.communicate()
    assert len(homes(cache)) == 1, "killed too early or too late"
    read, calls = module._read, []
    monkeypatch.setattr(module, "_read", lambda *file: calls.append(file) or read(*file))
    with ThreadPoolExecutor(2) as pool:  # as two notebooks might
        for faces in pool.map(lambda _: prepare(folder, cache), range(2)):
            agree(faces, folder)
    assert len(calls) == 12 and len(homes(cache)) == 1


# Duplicates, split and folds


def flipped(hash_: np.ndarray, bits) -> np.ndarray:
    """A hash (uint8 [32]) with some of its 256 bits turned."""
    unpacked = np.unpackbits(hash_)
    unpacked[list(bits)] ^= 1
    return np.packbits(unpacked)


def random_hashes(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32), dtype=np.uint8)


@pytest.mark.parametrize("limit", [0, HASH_LIMIT, 40])
def test_near_duplicates_are_those_of_brute_force(limit):
    rng, base = np.random.default_rng(limit), random_hashes(10)
    turned = [range(limit), range(limit + 1)]
    turned += [rng.choice(256, rng.integers(0, 45), replace=False) for _ in range(38)]
    hashes = np.stack([*base, *(flipped(base[i % 10], bits) for i, bits in enumerate(turned))])
    bits = np.unpackbits(rng.permutation(hashes), axis=1)
    distances = {(i, j): (bits[i] != bits[j]).sum() for i, j in combinations(range(50), 2)}
    pairs, far = near_duplicates(np.packbits(bits, axis=1), limit)
    found = list(zip(map(tuple, pairs.tolist()), far.tolist(), strict=True))
    assert Counter(found) == Counter(item for item in distances.items() if item[1] <= limit)
    assert limit in far and limit + 1 in distances.values()


def test_groups_join_chains_copies_and_persons_in_any_order_of_rows():
    first, second, third = random_hashes(3)
    chain = flipped(first, range(20)), flipped(first, range(40))  # the second is too far from first
    hashes = [first, *chain, second, second, third, flipped(third, range(99))]
    table = pd.DataFrame({"file": list("dbeafcg"), "person": ["", "", "x", "", "", "", "x"]})
    table["dhash"] = [hash_.tobytes().hex() for hash_ in hashes]
    for order in (list(range(7)), [6, 3, 0, 5, 2, 4, 1]):
        shuffled = table.iloc[order].reset_index(drop=True)
        groups = dict(zip(shuffled["file"], duplicate_groups(shuffled), strict=True))
        assert groups == {"d": "b", "b": "b", "e": "b", "g": "b", "a": "a", "f": "a", "c": "c"}


def test_split_and_fold_follow_from_the_group_alone():
    pinned = {  # a change here changes the test set of everyone
        "26_0_1_20170116171048641.jpg.chip.jpg": "train",
        "24_0_1_20170116220224657 .jpg.chip.jpg": "train",
        "100_1_0_20170112213303693.jpg.chip.jpg": "valid",
        "27_0_1_20170116200549785.jpg.chip.jpg": "valid",
        "100_0_0_20170112215240346.jpg.chip.jpg": "test",
        "27_1_1_20170117175920069.jpg.chip.jpg": "test",
    }
    assert split(pd.Series(list(pinned))).tolist() == list(pinned.values())
    ramp = np.tile(np.arange(CHIP_SIZE, dtype=np.uint8), (CHIP_SIZE, 1))
    assert difference_hash(ramp) == "f" * 64 and difference_hash(ramp[:, ::-1]) == "0" * 64
    groups = pd.Series([f"{i % 7000}_0_0_2017.jpg" for i in range(10_000)])
    table = pd.DataFrame({"file": groups.index.astype(str), "split": split(groups)})
    folds = pd.Series(fold(groups))
    assert ((folds == 4) == (table["split"] != "train")).all()
    assert folds.groupby(groups).nunique().max() == 1
    assert folds.value_counts(normalize=True).between(0.18, 0.22).sum() == 5
    some = groups.sample(frac=0.5, random_state=0)
    assert (fold(some) == folds[some.index]).all()
    assert (split(some) == table["split"][some.index]).all()
    assert split_digest(table.sample(frac=1, random_state=0)) == split_digest(table)
    assert split_digest(table[1:]) != split_digest(table)


# Your own faces


def write(folder: Path, *lines: str) -> None:
    (folder / "labels.csv").write_text("\n".join(lines), "utf-8")


@pytest.fixture
def own(tmp_path) -> Path:
    """Six images without a labels.csv."""
    (tmp_path / "own" / "album").mkdir(parents=True)
    for seed, letter in enumerate("abcdef"):
        (tmp_path / "own" / "album" / f"{letter}.jpg").write_bytes(encoded(seed))
    return tmp_path / "own"


def test_a_folder_of_your_own_flows_like_any_other(own_faces, tmp_path, monkeypatch):
    monkeypatch.setenv("AGE_DATA", str(tmp_path))
    table, pixels, excluded = load_faces(get_settings(str(own_faces)))
    assert len(table) == len(pixels) == 156 - len(excluded) > 150
    assert table["file"].is_monotonic_increasing
    assert table["file"].str.match(r"album \d/Bild \d+\.JPG").all()
    assert list(table["gender"].cat.categories) == ["f", "m"]
    assert list(table["ethnicity"].cat.categories) == ["NA", "Süd"], "NA is a name like any other"
    assert table.groupby("person")["split"].nunique().max() == 1


def test_tables_as_people_write_them(own):
    (own / "album" / "b.jpg").rename(own / "Ju\u0308rgen.jpg")  # as macOS may write it
    for lines in (
        ["file,age", "album/a.jpg,31"],
        ["\ufeffFile ; AGE", "album/a.jpg ;31.4"],
        ["age\tfile\tnotes", "30.6\talbum\\a.jpg\tx"],
        ['"file","age"', '"./album/a.jpg","31"'],
        ["file,age", "J\u00fcrgen.jpg,31", ""],
    ):
        write(own, *lines)
        (row,) = (row for row in read_labels(own) if "age" in row)
        assert row.pop("file") in ("album/a.jpg", "Ju\u0308rgen.jpg")
        assert row == {"age": 31, "gender": "unknown", "ethnicity": "unknown", "person": ""}


def test_rows_that_cannot_be_used_are_listed(own, cache):
    (own / "album" / "f.jpg").write_bytes(b"no image")
    (own.parent / "outside.jpg").write_bytes(encoded(0))
    rows = "a.jpg,30 a.jpg,31 b.jpg,dreißig c.jpg,-1 d.jpg,121 f.jpg,50 g.jpg".split()
    rows = [f"album/{row}" for row in rows]
    write(own, "file,age", *rows, "gone.jpg,20", "../outside.jpg,20", ",20")
    table, _, excluded = prepare(own, cache)
    assert table["file"].tolist() == ["album/a.jpg"]
    assert list(excluded.itertuples(index=False, name=None)) == [
        ("../outside.jpg", "no such image in the folder"),
        ("album/a.jpg", "a second row of labels.csv for this file"),
        ("album/b.jpg", "age 'dreißig' is not a number"),
        ("album/c.jpg", "age -1 is not between 0 and 120 years"),
        ("album/d.jpg", "age 121 is not between 0 and 120 years"),
        ("album/e.jpg", "no row in labels.csv"),
        ("album/f.jpg", DAMAGED),
        ("album/g.jpg", "no such image in the folder"),
        ("gone.jpg", "no such image in the folder"),
        ("labels.csv", "a row without a file name"),
    ]
    write(own, "file,age,group", "album/a.jpg,32,x", "album/b.jpg,30,x", "album/c.jpg,30,")
    table = prepare(own, cache).table  # a changed label gives another cache
    assert table["age"].tolist() == [32, 30, 30] and len(homes(cache)) == 1
    assert table["group"].tolist() == ["album/a.jpg", "album/a.jpg", "album/c.jpg"]


def test_a_file_that_is_no_table_is_refused(own, cache):
    for data in (b"", b"name,years\n", b"file,age\nJ\xfcrgen.jpg,3\n", b'file,age\n"a.jpg,3\n'):
        (own / "labels.csv").write_bytes(data)
        with pytest.raises(ValueError, match="labels.csv is no CSV in UTF-8 with .*save it as"):
            prepare(own, cache)


# The sample and UTKFace


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
    settings = get_settings("utkface")
    table, pixels, excluded = load_faces(settings)
    hashes = dict(zip(table["file"], table["sha256"], strict=True))
    hashes |= {file: file_sha256(settings.folder / file) for file in excluded["file"]}
    lines = "".join(f"{hashes[file]}  {file}\n" for file in sorted(hashes))
    content = "f46941580dc85fe21beb0bae2faca4f7cf8317384a775df25e631c4c612ce01b"
    assert hashlib.sha256(lines.encode()).hexdigest() == content
    assert len(table) == len(pixels) == 23_705 and len(excluded) == 3
    assert excluded["reason"].str.startswith("malformed name").all()
    sizes = {"White": 10_078, "Black": 4_526, "Indian": 3_975, "Asian": 3_434, "Others": 1_692}
    assert table["ethnicity"].value_counts().to_dict() == sizes
    assert (table["age"].min(), table["age"].max(), (table["age"] == 26).sum()) == (1, 116, 2_197)
    copies = table[table.duplicated("sha256", keep=False)]
    assert len(copies) == 765 and copies["sha256"].nunique() == 375
    assert split_digest(table) == "0518aa88fd414c43b4ac899979e92f95f54ab7a8db0d835e7b7ff643cc982b75"
    assert table["split"].value_counts().tolist() == [18_977, 2_389, 2_339]  # train, test, valid
    assert ((table["fold"] == 4) == (table["split"] != "train")).all()
    hashes = np.stack([np.frombuffer(bytes.fromhex(digits), np.uint8) for digits in table["dhash"]])
    pairs, _ = near_duplicates(hashes)  # computed anew, whatever the groups say
    assert len(pairs) >= 1_000
    assert (np.diff(table["split"].cat.codes.to_numpy()[pairs]) == 0).all()
    assert (np.diff(table["fold"].to_numpy()[pairs]) == 0).all()
