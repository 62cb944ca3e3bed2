"""From a folder of face images to one table and one array of pixels: row i describes pixels[i]."""

import hashlib
import os
import re
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torchvision.transforms.v2 import functional as F

from utils.download import make_once, unpack
from utils.settings import CHIP_SIZE, OLDEST, Settings, locate
from utils.synthetic import draw_sample

GENDERS = ("male", "female")
ETHNICITIES = ("White", "Black", "Asian", "Indian", "Others")
SPLITS = {"train": 0.8, "valid": 0.1, "test": 0.1}
FOLDS = 5  # the last one is valid and test together
HASH_LIMIT = 24  # two faces with this many of 256 bits unlike, or fewer, are near-duplicates
LABELS, IMAGE_TYPES = "labels.csv", (".jpg", ".jpeg", ".png", ".webp")

Faces = namedtuple("Faces", "table pixels excluded")  # pixels: uint8 RGB [N, H, W, 3]


def load_faces(settings: Settings) -> Faces:
    """`prepare` these faces; a missing sample is drawn, UTKFace unpacked from UTKFACE_ARCHIVE."""
    if settings.faces == "sample":
        make_once(settings.folder, draw_sample)
    elif settings.faces == "utkface" and (archive := os.environ.get("UTKFACE_ARCHIVE")):
        make_once(settings.folder, partial(unpack, locate(archive)))
    return prepare(settings.folder, settings.cache)


def prepare(folder: Path, cache: Path) -> Faces:
    """Decode a folder of face images once; later calls only map the result into memory.
    Labels come from labels.csv, or from the file names. Raises FileNotFoundError where there is no
    usable face, ValueError where labels.csv is no table, OSError where the cache cannot be written.
    """
    own = (folder / LABELS).is_file()
    files = read_labels(folder) if own else [{"file": p.name} for p in sorted(folder.glob("[!.]*"))]
    paths = (folder / file["file"] for file in files)
    states = [(s.st_size, s.st_mtime_ns) for s in map(os.stat, filter(os.path.exists, paths))]
    key = hashlib.sha256(f"3 {pd.__version__} {CHIP_SIZE} {files} {states}".encode())  # 3: format
    make_once(home := cache / key.hexdigest()[:16], partial(_build, folder, files))
    table, excluded = pd.read_pickle(home / "tables.pkl")
    pixels = np.memmap(home / "pixels.u8", np.uint8, "r")
    return Faces(table, pixels.reshape(-1, CHIP_SIZE, CHIP_SIZE, 3), excluded)


def _build(folder: Path, files: list[dict], home: Path) -> None:
    """Write the pixels and the tables; caches of files that have changed since go."""
    for other in filter(Path.is_dir, home.parent.iterdir()):
        shutil.rmtree(other)
    home.mkdir()
    rows, excluded = [], []
    with open(home / "pixels.u8", "wb") as out, ThreadPoolExecutor() as pool:
        for row, pixels in pool.map(partial(_read, folder), files):
            (rows if pixels else excluded).append(row)
            out.write(pixels)
    if not rows:
        text = f"no usable face among the {len(files):,} files of {folder} {excluded[:1]}: try "
        raise FileNotFoundError(text + "`make data`, UTKFACE_ARCHIVE=<file> or AGE_FACES=sample")
    table = pd.DataFrame(rows)
    table["age"] = (table["age"] + 0.5).astype(int)
    table["group"] = duplicate_groups(table)
    table["fold"], table["split"] = fold(table["group"]), split(table["group"])
    for column, known in (("gender", GENDERS), ("ethnicity", ETHNICITIES), ("split", SPLITS)):
        order = [*known, *sorted(set(table[column]) - set(known))]
        table[column] = pd.Categorical(table[column], order).remove_unused_categories()
    left_out = pd.DataFrame(excluded, columns=["file", "reason"])
    pd.to_pickle((table, left_out), home / "tables.pkl")


def _read(folder: Path, row: dict) -> tuple[dict, bytes]:
    """A file's row of the table and its pixels; or its name, why it is left out, and no pixels."""
    name, path = row["file"], folder / row["file"]
    try:
        inside = path.is_relative_to(folder) and ".." not in path.parts and name.isprintable()
        if not (inside and path.is_file() and name.lower().endswith(IMAGE_TYPES)):
            raise ValueError("no image file with a printable name in the folder")
        labels = row if "age" in row else row | parse_name(name) | {"person": ""}
        if not 0 <= labels["age"] <= OLDEST:
            raise ValueError(f"no age between 0 and {OLDEST}, or a second row of {LABELS}")
        data = path.read_bytes()
        chip = to_chip(decode(data))
    except (OSError, ValueError) as error:
        return {"file": name, "reason": str(error)}, b""
    grey = cv2.cvtColor(chip, cv2.COLOR_RGB2GRAY)
    hashes = {"sha256": hashlib.sha256(data).hexdigest(), "dhash": difference_hash(grey)}
    return labels | hashes | quality(grey), chip.tobytes()


def parse_name(name: str) -> dict:
    """Age (years), gender and ethnicity of a name `age_gender_ethnicity_date...`, or ValueError."""
    match = re.match(r"(\d{1,3})_([01])_([0-4])_\d", name)
    if match is None:
        raise ValueError("malformed name: age_gender_ethnicity_date expected")
    age, gender, ethnicity = (int(field) for field in match.groups())
    return {"age": age, "gender": GENDERS[gender], "ethnicity": ETHNICITIES[ethnicity]}


def read_labels(folder: Path) -> list[dict]:
    """Labels for each row of labels.csv and each image without a row, in order of file name.
    Columns: `file` (path in the folder), `age` (years; NaN where there is not one), and if known
    `gender`, `ethnicity`, `person` or `group`. ValueError where it is no CSV with the first two."""
    try:
        head = (folder / LABELS).read_text("utf-8-sig").partition("\n")[0]
        options = dict(sep=max(",;\t", key=head.count), dtype=str, keep_default_na=False)
        table = pd.read_csv(folder / LABELS, encoding="utf-8-sig", index_col=False, **options)
        table = table.rename(columns=lambda name: name.strip().lower()).fillna("").map(str.strip)
        ages = pd.to_numeric(table.set_flags(allows_duplicate_labels=False)["age"], "coerce")
        names = table["file"].str.replace("\\", "/").str.removeprefix("./").str.normalize("NFC")
    except (KeyError, ValueError) as error:
        text = f"{folder / LABELS} is no CSV in UTF-8 with the columns 'file' and 'age' ({error})"
        raise ValueError(f"{text}: mend it or save it as 'CSV UTF-8', and run again") from error
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    images = [p for p in paths if p.lower().endswith(IMAGE_TYPES) and "/." not in f"/{p}"]
    images = pd.Series(images, dtype=str, name="file")
    there = dict(zip(images.str.normalize("NFC"), images, strict=True))
    table["file"] = names.map(there).fillna(table["file"])
    table["age"] = ages.mask(table.duplicated("file"))
    table["person"] = table.get("person", table.get("group", ""))
    table = table.reindex(columns=["file", "age", "gender", "ethnicity", "person"], fill_value="")
    table = table.merge(images, how="outer").pipe(lambda t: t.where(t != ""))  # sorted by file
    unknown = {"file": LABELS, "gender": "unknown", "ethnicity": "unknown", "person": ""}
    return table.fillna(unknown).to_dict("records")


def decode(data: bytes) -> torch.Tensor:
    """The bytes of an image file to uint8 RGB [3, h, w], turned as EXIF says, or ValueError."""
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # there are no bytes, or a PNG ends in zeros
        image = None
    if image is None or (data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data):  # half a JPEG
        raise ValueError("cannot be decoded: damaged, cut off or not an image")
    return torch.from_numpy(image).permute(2, 0, 1)


def to_chip(image: torch.Tensor) -> np.ndarray:
    """uint8 [3, h, w] to uint8 [CHIP_SIZE, CHIP_SIZE, 3]: the central square, antialiased."""
    square = F.center_crop(image, [min(image.shape[1:])] * 2)
    chip = F.resize(square, [CHIP_SIZE, CHIP_SIZE], antialias=True)
    return np.ascontiguousarray(chip.permute(1, 2, 0).numpy())


def quality(grey: np.ndarray) -> dict[str, float]:
    """Brightness (mean, 0-255) and sharpness (variance of the Laplacian) of uint8 [h, w]."""
    sharpness = cv2.Laplacian(grey, cv2.CV_32F).var()
    return {"brightness": round(float(grey.mean()), 2), "sharpness": round(float(sharpness), 2)}


def difference_hash(grey: np.ndarray) -> str:
    """Krawetz's dHash of uint8 [h, w] in hex: is each of 16 x 16 cells darker than the next?"""
    small = cv2.resize(grey, (17, 16), interpolation=cv2.INTER_AREA)
    return np.packbits(small[:, :-1] < small[:, 1:]).tobytes().hex()


def near_duplicates(hashes: np.ndarray, limit: int = HASH_LIMIT) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j [P, 2] of hashes (uint8 [N, 32]) at most `limit` bits apart, and the bits [P]."""
    from sklearn.neighbors import radius_neighbors_graph  # a second, where no hash is compared

    bits = np.unpackbits(hashes, axis=1).astype(np.float32)  # sqeuclidean counts unlike ones
    near = radius_neighbors_graph(bits, limit + 0.5, mode="distance", metric="sqeuclidean").tocoo()
    once = near.row < near.col
    return np.stack([near.row, near.col], 1)[once], near.data[once].round().astype(int)


def duplicate_groups(table: pd.DataFrame) -> np.ndarray:
    """For each face [N] the first file name of its group: near-duplicates, theirs, one person's."""
    hashes = np.frombuffer(bytes.fromhex("".join(table["dhash"])), np.uint8).reshape(-1, 32)
    faces, persons = np.arange(len(table)), pd.factorize(table["person"])[0]
    known = np.stack([faces, len(faces) + persons], 1)[table["person"] != ""]
    edges = np.concatenate([near_duplicates(hashes)[0], known])
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(2 * len(faces), 2 * len(faces)))
    groups = connected_components(graph, directed=False)[1][: len(faces)]
    return table["file"].groupby(groups).transform("min").to_numpy()


def fold(groups: pd.Series, count: int = FOLDS) -> np.ndarray:
    """0 to `count` - 1 for each face [N], by the sha256 of its group's name: same everywhere."""
    digests = (hashlib.sha256(name.encode()).digest()[:8] for name in groups)
    return np.array([int.from_bytes(digest, "big") * count >> 64 for digest in digests])


def split(groups: pd.Series) -> np.ndarray:
    """ "train", "valid" or "test" [N], by the same hash: valid and test are the last fold."""
    parts = np.repeat(list(SPLITS), [round(10 * share) for share in SPLITS.values()])
    return parts[fold(groups, 10)]


def split_digest(table: pd.DataFrame) -> str:
    """sha256 over the sorted lines `file split`: equal digests mean the same split."""
    lines = sorted(f"{file} {part}\n" for file, part in zip(table.file, table.split, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
