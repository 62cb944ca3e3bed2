"""From a folder to table and pixels: nothing lost in silence, nothing half-made, nothing leaked."""

import errno
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from utils import faces as module
from utils.faces import (
    ETHNICITIES,
    GENDERS,
    HASH_LIMIT,
    Faces,
    difference_hash,
    duplicate_groups,
    near_duplicates,
    parse_name,
    prepare,
    split,
    split_digest,
)
from utils.settings import CHIP_SIZE, ROOT

NAMES = [f"{20 + i}_{i % 2}_{i % 5}_20170116{i:09d}.jpg.chip.jpg" for i in range(12)]


def texture(seed: int, size: tuple[int, int] = (CHIP_SIZE, CHIP_SIZE)) -> np.ndarray:
    """A smooth random picture, uint8 BGR; two seeds give two pictures far apart."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return cv2.resize(cells, size, interpolation=cv2.INTER_CUBIC)


def encoded(image: np.ndarray, suffix: str = ".jpg") -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve good faces."""
    path = tmp_path / "faces"
    path.mkdir()
    for seed, name in enumerate(NAMES):
        (path / name).write_bytes(encoded(texture(seed)))
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def reasons(faces: Faces) -> dict[str, str]:
    return dict(zip(faces.excluded["file"], faces.excluded["reason"], strict=True))


def snapshot(path: Path) -> dict:
    return {p.relative_to(path): p.lstat().st_mtime_ns for p in sorted(path.rglob("*"))}


def homes(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


# File names


@pytest.mark.parametrize(
    ("name", "age", "gender", "ethnicity"),
    [
        ("26_0_1_20170116171048641.jpg.chip.jpg", 26, "male", "Black"),
        ("1_1_4_20161219154644331.jpg.chip.jpg", 1, "female", "Others"),
        ("116_1_0_20170120134639935.jpg.chip.jpg", 116, "female", "White"),
        ("55_0_0_20170116232725357jpg.chip.jpg", 55, "male", "White"),
        ("24_0_1_20170116220224657 .jpg.chip.jpg", 24, "male", "Black"),
        ("30_1_3_20170116.png", 30, "female", "Indian"),
        ("0_0_2_20170116.png", 0, "male", "Asian"),
    ],
)
def test_names_with_all_fields(name, age, gender, ethnicity):
    assert parse_name(name) == {"age": age, "gender": gender, "ethnicity": ethnicity}


@pytest.mark.parametrize(
    "name",
    [
        "39_1_20170116174525125.jpg.chip.jpg",
        "61_1_20170109142408075.jpg.chip.jpg",
        "61_1_20170109150557335.jpg.chip.jpg",
        "26_2_0_20170116171048641.jpg.chip.jpg",
        "26_0_5_20170116171048641.jpg.chip.jpg",
        "26_0_1.jpg",
        "26__1_20170116171048641.jpg",
        "-1_0_1_20170116171048641.jpg",
        "1000_0_1_20170116171048641.jpg",
        "x26_0_1_20170116171048641.jpg",
        "portrait.jpg",
        "",
    ],
)
def test_names_without_all_fields_are_refused(name):
    with pytest.raises(ValueError, match="malformed name"):
        parse_name(name)


# The table and the pixels


def test_pixels_match_the_rows(folder, cache, monkeypatch):
    """Also across the borders of chunks; compared with another decoder."""
    monkeypatch.setattr(module, "CHUNK", 5)
    table, pixels, excluded = prepare(folder, cache)
    assert table["file"].tolist() == sorted(NAMES)
    assert table.index.tolist() == list(range(12))
    assert pixels.shape == (12, CHIP_SIZE, CHIP_SIZE, 3) and pixels.dtype == np.uint8
    assert len(excluded) == 0
    for row, chip in zip(table.itertuples(), pixels, strict=True):
        other = cv2.imread(str(folder / row.file))[..., ::-1]
        assert np.abs(other.astype(int) - chip).max() <= 2
        assert row.brightness == pytest.approx(
            cv2.cvtColor(chip, cv2.COLOR_RGB2GRAY).mean(), abs=0.1
        )
        labels = {"age": row.age, "gender": row.gender, "ethnicity": row.ethnicity}
        assert labels == parse_name(row.file)


def test_columns_of_the_table(folder, cache):
    table = prepare(folder, cache).table
    assert set(table) == {
        "file", "age", "gender", "ethnicity", "sha256", "dhash", "brightness", "sharpness",
        "group", "split",
    }  # fmt: skip
    assert table["age"].dtype.kind == "i"
    assert list(table["gender"].cat.categories) == list(GENDERS)
    assert list(table["ethnicity"].cat.categories) == list(ETHNICITIES)
    assert list(table["split"].cat.categories) == ["train", "valid", "test"]
    assert table.notna().all(axis=None)
    assert (table["group"] == table["file"]).all(), "no two of these pictures are alike"
    assert (table["split"] == split(table["group"])).all()


def test_sharpness_falls_with_blur_and_brightness_with_darkness(tmp_path, cache):
    image = np.random.default_rng(0).integers(0, 256, (CHIP_SIZE, CHIP_SIZE, 3), dtype=np.uint8)
    images = {NAMES[0]: image, NAMES[1]: cv2.GaussianBlur(image, (0, 0), 3), NAMES[2]: image // 3}
    for name, picture in images.items():
        (tmp_path / name).write_bytes(encoded(picture))
    plain, blurred, dark = prepare(tmp_path, cache).table.itertuples()
    assert blurred.sharpness < plain.sharpness / 10
    assert blurred.brightness == pytest.approx(plain.brightness, abs=2)
    assert dark.brightness == pytest.approx(plain.brightness / 3, abs=2)


def test_copies_share_a_group_and_a_split(folder, cache):
    image = texture(100, (200, 200))
    names = [f"{age}_0_0_20160101{age:09d}.jpg" for age in range(10, 13)]
    (folder / names[0]).write_bytes(encoded(image))
    (folder / names[1]).write_bytes(encoded(image))
    small = cv2.resize(image, (90, 90), interpolation=cv2.INTER_AREA)
    (folder / names[2]).write_bytes(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 60])[1])
    table = prepare(folder, cache).table.set_index("file")
    assert (table.loc[names, "group"] == names[0]).all()
    assert table.loc[names, "split"].nunique() == 1
    assert table.loc[names, "sha256"].nunique() == 2
    assert (table["group"] == names[0]).sum() == 3


# What is left out


@pytest.mark.fault(
    "a corrupt image among good ones", "left out, counted, and listed with its reason"
)
def test_unusable_files_are_listed_with_reasons(folder, cache):
    good = encoded(texture(50))
    (folder / "61_1_20170109142408075.jpg.chip.jpg").write_bytes(good)
    (folder / "NA").write_bytes(good)
    (folder / "notes.txt").write_text("hello")
    (folder / "50_0_0_20170101000000001.mp4").write_bytes(good)
    (folder / "51_0_0_20170101000000002.jpg").write_bytes(b"")
    (folder / "52_0_0_20170101000000003.jpg").write_text("<html>not found</html>")
    (folder / "53_0_0_20170101000000004.jpg").write_bytes(good[: len(good) // 2])
    (folder / "54_0_0_20170101000000005.jpg").mkdir()
    faces = prepare(folder, cache)
    found = reasons(faces)
    assert faces.table["file"].tolist() == sorted(NAMES)
    assert found.pop("61_1_20170109142408075.jpg.chip.jpg").startswith("malformed name")
    for name in ("NA", "notes.txt", "50_0_0_20170101000000001.mp4", "54_0_0_20170101000000005.jpg"):
        assert found.pop(name) == "not an image file"
    assert found.pop("51_0_0_20170101000000002.jpg") == "empty file"
    for name in ("52_0_0_20170101000000003.jpg", "53_0_0_20170101000000004.jpg"):
        assert found.pop(name) == "cannot be decoded: damaged, cut off or not an image"
    assert found == {}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.fault("a corrupt image among good ones")
def test_a_file_cut_anywhere_is_left_out(folder, cache, suffix):
    """No grey half passes for a face, wherever the file ends."""
    data = encoded(texture(60), suffix)
    cuts = [3, 20, *(len(data) * tenth // 10 for tenth in range(1, 10)), len(data) - 14]
    if suffix == ".jpg":
        cuts += [len(data) - 2, len(data) - 1]
    for i, cut in enumerate(cuts):
        (folder / f"{60 + i}_0_0_2018{i:013d}{suffix}").write_bytes(data[:cut])
    faces = prepare(folder, cache)
    assert faces.table["file"].tolist() == sorted(NAMES)
    assert len(faces.excluded) == len(cuts)
    assert faces.excluded["reason"].str.startswith("cannot be decoded: ").all()


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.fault("a corrupt image among good ones")
def test_a_file_whose_rest_is_zeros_is_left_out(folder, cache, suffix):
    """An interrupted download may leave that. Some decoders crash on such a PNG."""
    data = encoded(texture(60), suffix)
    for i, cut in enumerate([*(len(data) * tenth // 10 for tenth in range(1, 10)), len(data) - 14]):
        filled = data[:cut] + bytes(len(data) - cut)
        (folder / f"{60 + i}_0_0_2018{i:013d}{suffix}").write_bytes(filled)
    faces = prepare(folder, cache)
    assert faces.table["file"].tolist() == sorted(NAMES)
    assert len(faces.excluded) == 10
    assert faces.excluded["reason"].str.startswith("cannot be decoded: ").all()


def test_bytes_after_the_end_of_an_image_do_no_harm(folder, cache):
    """Some phones write them."""
    name = "60_0_0_20180000000000000.jpg"
    (folder / name).write_bytes(encoded(texture(60)) + b"trailer" * 100)
    assert name in set(prepare(folder, cache).table["file"])


@pytest.mark.fault("a corrupt image among good ones")
def test_a_link_to_nowhere_and_an_unprintable_name_are_listed(folder, cache):
    try:
        (folder / "50_0_0_20170101000000001.jpg").symlink_to(folder / "gone.jpg")
        odd = os.fsencode(folder) + b"/51_0_0_20170101\xff.jpg"
        with open(odd, "wb") as out:
            out.write(encoded(texture(1)))
    except OSError:
        pytest.skip("this file system takes no links, or only names in Unicode")
    found = reasons(prepare(folder, cache))
    assert found.pop("50_0_0_20170101000000001.jpg") == "not an image file"
    assert [reason.startswith("malformed name") for reason in found.values()] == [True]


@pytest.mark.fault("a corrupt image among good ones")
def test_a_file_that_cannot_be_read_is_listed(folder, cache, monkeypatch):
    read = Path.read_bytes

    def failing(path: Path) -> bytes:
        if path.name == NAMES[3]:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    faces = prepare(folder, cache)
    assert reasons(faces) == {NAMES[3]: "cannot be read: Permission denied"}
    assert len(faces.table) == len(faces.pixels) == 11


# Kinds of images

ORANGE = (230, 120, 40)  # RGB


def colour_image(kind: str) -> Image.Image:
    image = Image.new("RGB", (100, 100), ORANGE)
    if kind == "16 bits":  # Pillow writes 16 bits in grey only
        return Image.fromarray(np.full((100, 100), 120 * 257, np.uint16))
    return image.quantize(4) if kind == "P" else image.convert(kind)


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("RGB", "jpg"), ("RGB", "JPEG"), ("RGB", "webp"), ("L", "jpg"), ("CMYK", "jpg"),
        ("RGB", "png"), ("RGBA", "png"), ("LA", "png"), ("P", "png"), ("16 bits", "png"),
    ],
)  # fmt: skip
def test_every_kind_of_image_becomes_rgb(folder, cache, kind, suffix):
    name = f"10_0_0_20170101.{suffix}"  # comes first: a wrong size would shift all others
    colour_image(kind).save(folder / name)
    table, pixels, excluded = prepare(folder, cache)
    assert len(excluded) == 0 and table["file"][0] == name
    expected = {"L": 144, "LA": 144, "16 bits": 120}.get(kind, ORANGE)
    assert np.abs(pixels[0].astype(int) - expected).max() <= 6
    other = cv2.imread(str(folder / table["file"][5]))[..., ::-1]
    assert np.abs(other.astype(int) - pixels[5]).max() <= 2
    assert (cache / homes(cache)[0] / "pixels.u8").stat().st_size == pixels.size


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 300), (301, 100), (1, 1)])
def test_the_central_square_of_any_shape_is_taken(tmp_path, cache, width, height):
    image = np.full((height, width, 3), 255, np.uint8)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    image[top : top + side, left : left + side] = ORANGE[::-1]
    (tmp_path / "20_0_0_20170101.png").write_bytes(encoded(image, ".png"))
    pixels = prepare(tmp_path, cache).pixels
    assert pixels.shape == (1, CHIP_SIZE, CHIP_SIZE, 3)
    assert (pixels == ORANGE).all()


def test_a_set_of_flat_images_survives_the_way_through_the_cache(tmp_path, cache):
    """Their hash is all zeros, which looks like a number."""
    for name in NAMES[:3]:
        (tmp_path / name).write_bytes(encoded(np.full((50, 50, 3), 90, np.uint8)))
    table = prepare(tmp_path, cache).table
    assert table["dhash"].tolist() == ["0" * 64] * 3
    assert (table["group"] == NAMES[0]).all()


# The cache


def test_the_cache_is_used_again(folder, cache, monkeypatch):
    first = prepare(folder, cache)
    before = snapshot(cache)
    monkeypatch.setattr(module, "_decode", None)  # a call would fail
    second = prepare(folder, cache)
    pd.testing.assert_frame_equal(first.table, second.table)
    pd.testing.assert_frame_equal(first.excluded, second.excluded)
    assert np.array_equal(first.pixels, second.pixels)
    assert snapshot(cache) == before, "reading wrote something"


@pytest.mark.fault("read-only data folder")
def test_a_whole_cache_needs_no_permission_to_write(folder, cache, monkeypatch):
    prepare(folder, cache)
    paths = [*cache.rglob("*"), cache]
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(0o555)
    monkeypatch.setattr(module, "FileLock", None)  # root may write all the same: a lock would fail
    try:
        assert len(prepare(folder, cache).table) == 12
    finally:
        for path in reversed(paths):
            path.chmod(modes[path])


def change(path: Path) -> None:
    path.write_bytes(encoded(texture(999)))


def touch(path: Path) -> None:
    """Other bytes of the same length, as a repaired file may have: only its time tells."""
    data = bytearray(encoded(texture(999)))
    status = path.stat()
    path.write_bytes(bytes(data[: status.st_size]).ljust(status.st_size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def add(path: Path) -> None:
    (path.parent / "70_0_0_20170101.jpg").write_bytes(encoded(texture(999)))


def rename(path: Path) -> None:
    path.rename(path.with_name("71_0_0_20170101.jpg"))


@pytest.mark.parametrize("what", [change, touch, add, Path.unlink, rename])
@pytest.mark.fault("a cache of other files", "noticed by names, sizes and times; built anew")
def test_changed_files_are_noticed_and_the_old_cache_goes(folder, cache, what):
    prepare(folder, cache)
    (old,) = homes(cache)
    what(folder / NAMES[4])
    after = prepare(folder, cache)
    (new,) = homes(cache)
    assert new != old
    listed = {*after.table["file"], *after.excluded["file"]}
    assert listed == {path.name for path in folder.iterdir()}
    for row, chip in zip(after.table.itertuples(), after.pixels, strict=True):
        other = cv2.imread(str(folder / row.file))[..., ::-1]
        assert np.abs(other.astype(int) - chip).max() <= 2


@pytest.mark.fault("paths with spaces and letters beyond ASCII", "work like any other")
def test_a_folder_with_spaces_and_other_letters(folder, tmp_path):
    home = tmp_path / "Gesichter – été 顔 (1)"
    home.mkdir()
    folder = folder.rename(home / "die Bilder")
    assert len(prepare(folder, home / "der Cache").table) == 12


def test_a_missing_folder_says_what_to_do(tmp_path, cache):
    with pytest.raises(FileNotFoundError, match="make data.*AGE_FACES=sample"):
        prepare(tmp_path / "gone", cache)
    assert not cache.exists()


def test_a_folder_without_faces_says_what_is_expected(tmp_path, cache):
    folder = tmp_path / "faces"
    folder.mkdir()
    (folder / "holiday.jpg").write_bytes(encoded(texture(1)))
    with pytest.raises(FileNotFoundError, match="no usable face among the 1 files.*26_0_1_"):
        prepare(folder, cache)
    assert homes(cache) == []


class FullDisk:
    """A file that takes three faces, then no more."""

    def __init__(self, path, mode):
        self.file, self.left = open(path, mode), 3

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, data):
        if self.left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= 1
        return self.file.write(data)


@pytest.mark.fault("disk full while caching", "says how many MB it needs; no half-made cache stays")
def test_a_full_disk_says_so_and_leaves_nothing(folder, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "open", FullDisk, raising=False)
        with pytest.raises(OSError, match=r"No space left.*1 MB.*AGE_DATA") as caught:
            prepare(folder, cache)
    assert str(cache) in str(caught.value)
    assert homes(cache) == []
    assert len(prepare(folder, cache).table) == 12


@pytest.mark.fault("disk full while caching")
def test_a_full_disk_at_the_last_file_leaves_nothing(folder, cache, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"No space left.*AGE_DATA"):
        prepare(folder, cache)
    assert homes(cache) == []


@pytest.mark.fault("read-only data folder")
def test_a_cache_that_cannot_be_made_says_so(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="cannot write the pixel cache.*AGE_DATA"):
        prepare(folder, tmp_path / "file" / "cache")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes")
@pytest.mark.fault("disk full while caching")
def test_a_real_limit_while_caching(folder, cache):
    """The operating system itself refuses the bytes of the tenth face."""
    limit = 9 * CHIP_SIZE**2 * 3 + 1000
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    module.prepare(folder, cache)
except OSError as error:
    print(error)
"""
    said = python(code, folder, cache).communicate(timeout=120)[0]
    assert "cannot write the pixel cache" in said and "it needs 1 MB" in said, said
    assert homes(cache) == []
    assert len(prepare(folder, cache).table) == 12


# Other processes

START = "import os, sys, time; from pathlib import Path; from utils import faces as module; "
START += "folder, cache = Path(sys.argv[1]), Path(sys.argv[2])\n"


def python(code: str, *arguments) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", START + code, *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


SLOW = """
decode = module._decode
def slowly(entry):
    if entry.name.startswith("3"):
        os.write(1, b"half done\\n")  # at once: two threads may be here
        time.sleep(float(sys.argv[3]))
    return decode(entry)
module._decode = slowly
module.CHUNK = 4
module.prepare(folder, cache)
"""


@pytest.mark.fault(
    "killed while caching", "nothing half-made is taken for whole; the next run starts over"
)
def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(folder, cache):
    prepare(folder, cache)
    (folder / "70_0_0_20170101.jpg").write_bytes(encoded(texture(70)))
    process = python(SLOW, folder, cache, 600)
    assert process.stdout.readline() == "half done\n"
    process.kill()
    process.communicate()
    assert len(list(cache.glob("*.partial"))) == 1, "killed too early or too late"
    faces = prepare(folder, cache)
    assert len(faces.table) == len(faces.pixels) == 13
    assert len(homes(cache)) == 1, "the half-made cache or the old one is still there"


@pytest.mark.fault("two notebooks that prepare the data at once")
def test_a_second_process_waits_for_the_first_and_takes_its_work(folder, cache, monkeypatch):
    process = python(SLOW, folder, cache, 0.5)
    assert process.stdout.readline() == "half done\n"
    assert not list(cache.glob("*/cache.json"))
    monkeypatch.setattr(module, "_decode", None)  # to decode here as well would fail
    faces = prepare(folder, cache)
    assert len(faces.table) == len(faces.pixels) == 12
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert len(homes(cache)) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory as Linux counts it")
def test_memory_does_not_grow_with_the_number_of_files(tmp_path, cache):
    """Pixels go to the disk chunk by chunk, and hashes are compared block by block.

    3,500 more faces have 172 MB of pixels. 200,000 hashes as floats have 205 MB.
    """
    image = encoded(texture(0, (32, 32)))
    for count in (500, 4000):
        folder = tmp_path / str(count)
        folder.mkdir()
        for i in range(count):
            (folder / f"{i % 100}_0_0_2017{i:013d}.jpg").write_bytes(image)
    code = """
import resource
import numpy as np
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def compare(count):
    hashes = np.random.default_rng(0).integers(0, 256, (count, 32), dtype=np.uint8)
    next(module.near_duplicates(hashes))
module.prepare(folder / "500", cache)
few = peak()
module.prepare(folder / "4000", cache)
many = peak()
compare(5000)
short = peak()
compare(200_000)
print(many - few, peak() - short)
"""
    output = python(code, tmp_path, cache).communicate(timeout=120)[0]
    build, comparison = map(float, output.split())
    assert build < 40, f"{build:.0f} MB more for 3,500 more faces"
    assert comparison < 40, f"{comparison:.0f} MB more for 195,000 more hashes"


# Duplicates


def flipped(hash_: np.ndarray, bits: list[int] | range) -> np.ndarray:
    """A hash (uint8 [32]) with some of its 256 bits turned."""
    unpacked = np.unpackbits(hash_)
    unpacked[list(bits)] ^= 1
    return np.packbits(unpacked)


def random_hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


def hexed(hashes: np.ndarray | list) -> pd.Series:
    return pd.Series([hash_.tobytes().hex() for hash_ in hashes])


@pytest.mark.parametrize("limit", [0, 12, HASH_LIMIT, 40])
@pytest.mark.parametrize("block", [7, 20, 64, 4096])
def test_near_duplicates_are_those_of_brute_force(limit, block):
    """Each pair once, within a block, across borders and in the last, shorter block."""
    rng = np.random.default_rng(limit)
    base = random_hashes(10)
    copies = [
        flipped(base[i % 10], rng.choice(256, rng.integers(0, 45), replace=False))
        for i in range(40)
    ]
    hashes = rng.permutation(np.concatenate([base, copies]))
    bits = np.unpackbits(hashes, axis=1)
    expected = {
        (i, j) for i, j in combinations(range(50), 2) if (bits[i] != bits[j]).sum() <= limit
    }
    found = Counter(
        tuple(pair) for pairs in near_duplicates(hashes, limit, block) for pair in pairs.tolist()
    )
    assert found == Counter(expected)
    assert expected or limit == 0


def test_the_limit_itself_is_near_and_one_bit_more_is_not():
    base = random_hashes(1)[0]
    for distance, count in ((HASH_LIMIT, 1), (HASH_LIMIT + 1, 0)):
        pair = np.stack([base, flipped(base, range(distance))])
        assert sum(len(pairs) for pairs in near_duplicates(pair)) == count


def test_groups_join_chains_and_identical_files_and_are_named_by_the_smallest_name():
    first, second, third = random_hashes(3)
    hashes = [
        first,  # d
        flipped(first, range(0, 20)),  # b: near d
        flipped(first, range(0, 40)),  # e: near b, too far from d
        second,  # a: identical to f
        third,  # c: alone
        second,  # f
    ]
    groups = duplicate_groups(pd.Series(list("dbeacf")), hexed(hashes))
    assert groups.tolist() == ["b", "b", "b", "a", "c", "a"]


def test_groups_do_not_depend_on_the_order_of_rows():
    """Nor on which block of the comparison a pair falls into: 4,300 rows are two blocks.

    Of each chain of three one hash sorts first and two last: its pairs fall into two blocks.
    """
    hashes = random_hashes(4300)
    for i in range(0, 40, 4):
        hashes[i, :6] = 0
        hashes[i + 1] = flipped(hashes[i], range(0, 22))
        hashes[i + 2] = flipped(hashes[i], range(0, 44))
    files = pd.Series([f"{i:05d}.jpg" for i in np.random.default_rng(1).permutation(4300)])
    table = pd.DataFrame({"file": files, "dhash": hexed(hashes)})
    table["group"] = duplicate_groups(table["file"], table["dhash"])
    for i in range(0, 40, 4):
        assert (table["group"][i : i + 3] == files[i : i + 3].min()).all()
    assert (table["group"].value_counts() > 1).sum() == 10
    shuffled = table.sample(frac=1, random_state=2).reset_index(drop=True)
    again = duplicate_groups(shuffled["file"], shuffled["dhash"])
    assert (again == shuffled["group"]).all()


def test_the_hash_reads_gradients_and_survives_small_changes():
    ramp = np.tile(np.arange(CHIP_SIZE, dtype=np.uint8), (CHIP_SIZE, 1))
    assert difference_hash(ramp) == "f" * 64
    assert difference_hash(ramp[:, ::-1]) == "0" * 64

    def distance(one: np.ndarray, two: np.ndarray) -> int:
        hashes = [bytes.fromhex(difference_hash(image)) for image in (one, two)]
        return bin(int.from_bytes(hashes[0]) ^ int.from_bytes(hashes[1])).count("1")

    image = cv2.cvtColor(texture(0), cv2.COLOR_BGR2GRAY)
    darker = (image * 0.7 + 5).astype(np.uint8)
    assert distance(image, darker) <= HASH_LIMIT
    assert distance(image, cv2.GaussianBlur(image, (0, 0), 1.5)) <= HASH_LIMIT
    assert distance(image, cv2.cvtColor(texture(1), cv2.COLOR_BGR2GRAY)) > 2 * HASH_LIMIT


# The split


def test_some_names_and_their_split():
    """Pinned: a change here changes the test set of everyone."""
    pinned = {
        "26_0_1_20170116171048641.jpg.chip.jpg": "train",
        "55_0_0_20170116232725357jpg.chip.jpg": "train",
        "24_0_1_20170116220224657 .jpg.chip.jpg": "train",
        "100_1_0_20170112213303693.jpg.chip.jpg": "valid",
        "23_1_3_20170119164534718.jpg.chip.jpg": "valid",
        "27_0_1_20170116200549785.jpg.chip.jpg": "valid",
        "100_0_0_20170112215240346.jpg.chip.jpg": "test",
        "24_0_2_20170104021847349.jpg.chip.jpg": "test",
        "27_1_1_20170117175920069.jpg.chip.jpg": "test",
    }
    assert split(pd.Series(list(pinned))).tolist() == list(pinned.values())


def test_a_split_is_decided_by_the_group_alone():
    groups = pd.Series([f"{i % 7000}_0_0_2017.jpg" for i in range(10_000)])
    parts = pd.Series(split(groups))
    assert parts.groupby(groups).nunique().max() == 1
    shuffled = groups.sample(frac=1, random_state=0)
    assert (split(shuffled) == parts[shuffled.index]).all()
    some = groups[::17]
    assert (split(some) == parts[some.index]).all()
    assert split(groups[:1]).tolist() == [parts[0]]


def test_shares_of_the_split():
    names = pd.Series([f"{i % 116}_{i % 2}_{i % 5}_2017{i:013d}.jpg" for i in range(10_000)])
    shares = pd.Series(split(names)).value_counts(normalize=True)
    expected = {"train": 0.8, "valid": 0.1, "test": 0.1}
    assert shares.to_dict() == pytest.approx(expected, abs=0.012)  # four standard errors


def test_the_digest_depends_on_files_and_parts_but_not_on_order():
    table = pd.DataFrame({"file": NAMES, "split": split(pd.Series(NAMES))})
    digest = split_digest(table)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert split_digest(table.sample(frac=1, random_state=0)) == digest
    assert split_digest(table[1:]) != digest
    moved = table.assign(split=["test" if part == "train" else "train" for part in table["split"]])
    assert split_digest(moved) != digest
