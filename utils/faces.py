"""From a folder of face images to one table and one array of pixels: row i describes pixels[i]."""

import hashlib
import io
import os
import re
import shutil
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import radius_neighbors_graph
from torchvision.transforms.v2 import functional as F

from utils.download import make_once, unpack
from utils.settings import CHIP_SIZE, OLDEST, Settings, locate
from utils.synthetic import draw_sample

GENDERS = ("male", "female")
ETHNICITIES = ("White", "Black", "Asian", "Indian", "Others")
SPLITS = {"train": 0.8, "valid": 0.1, "test": 0.1}
FOLDS = 5  # the last one is valid and test together
HASH_LIMIT = 24  # two faces with this many of 256 bits unlike, or fewer, are near-duplicates
LABELS, IMAGE_TYPES = "labels.csv", {".jpg", ".jpeg", ".png", ".webp"}
CACHE_VERSION, CHUNK = 2, 256  # files that are decoded before their pixels are written out


class Faces(NamedTuple):
    """A prepared set: the table, uint8 RGB pixels [N, H, W, 3], and what was left out and why."""

    table: pd.DataFrame
    pixels: np.ndarray
    excluded: pd.DataFrame


def load_faces(settings: Settings) -> Faces:
    """The faces of these settings, as `prepare` gives them; nothing is downloaded.

    Where they are missing, the sample is drawn and UTKFace unpacked from UTKFACE_ARCHIVE.
    """
    archive = os.environ.get("UTKFACE_ARCHIVE")
    if settings.faces == "sample":
        make_once(settings.folder, draw_sample)
    elif settings.faces == "utkface" and archive:
        make_once(settings.folder, partial(unpack, locate(archive)))
    return prepare(settings.folder, settings.cache)


def prepare(folder: Path, cache: Path) -> Faces:
    """Decode a folder of face images once; later calls only map the result into memory.

    Labels come from labels.csv, or from the file names. The cache is named by all files' labels,
    sizes and times of change. Raises FileNotFoundError where there is no usable face, ValueError
    where labels.csv is no table, OSError where the cache cannot be written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no face images in {folder}. Three ways out: `make data` downloads UTKFace; "
            "UTKFACE_ARCHIVE=<file> names its archive; AGE_FACES=sample runs on drawn faces"
        )
    if own := (folder / LABELS).is_file():
        files = read_labels(folder)
    else:
        files = [{"file": name} for name in sorted(os.listdir(folder)) if name[0] != "."]
    key = hashlib.sha256(f"{CACHE_VERSION} {CHIP_SIZE}".encode())
    for file in files:
        path = os.path.join(folder, file["file"])
        status = os.stat(path) if os.path.exists(path) else None
        key.update(os.fsencode(f"{file} {status and (status.st_size, status.st_mtime_ns)}\n"))
    home = cache / key.hexdigest()[:16]
    make_once(home, partial(_build, folder, files))
    read = partial(pd.read_csv, dtype=str, na_filter=False)
    numbers = {"age": int, "fold": int, "brightness": float, "sharpness": float}
    table = read(home / "faces.csv").astype(numbers)
    for column, known in (("gender", GENDERS), ("ethnicity", ETHNICITIES), ("split", SPLITS)):
        names = set(table[column]) if own and column != "split" else set(known)
        order = [name for name in known if name in names] + sorted(names - set(known))
        table[column] = pd.Categorical(table[column], order)
    shape = (len(table), CHIP_SIZE, CHIP_SIZE, 3)
    pixels = np.memmap(home / "pixels.u8", np.uint8, "r", shape=shape)
    return Faces(table, pixels, read(home / "excluded.csv"))


def _build(folder: Path, files: list[dict], home: Path) -> None:
    """Write pixels.u8, faces.csv and excluded.csv; caches of files that have changed since go."""
    for other in home.parents[1].iterdir():
        if other.is_dir() and other != home.parent:
            shutil.rmtree(other)
    home.mkdir()
    rows, excluded = [], []
    with open(home / "pixels.u8", "wb") as out, ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), CHUNK):
            for row, pixels in pool.map(partial(_read, folder), files[start : start + CHUNK]):
                (rows if pixels else excluded).append(row)
                out.write(pixels)
    if not rows:
        raise FileNotFoundError(
            f"no usable face among the {len(files):,} files of {folder}: names as 26_0_1_2017.jpg "
            f"(age_gender_ethnicity_date) are expected, or a {LABELS} with the columns file and "
            f"age. The first of them: {excluded[:1]}"
        )
    table = pd.DataFrame(rows)
    table["group"] = duplicate_groups(table)
    table["fold"], table["split"] = fold(table["group"]), split(table["group"])
    table.to_csv(home / "faces.csv", index=False)
    excluded = pd.DataFrame(excluded, columns=["file", "reason"])
    excluded.to_csv(home / "excluded.csv", index=False, errors="backslashreplace")


def _read(folder: Path, row: dict) -> tuple[dict, bytes]:
    """A file's row of the table and its pixels; or its name, why it is left out, and no pixels."""
    name, path = row["file"], folder / row["file"]
    try:
        if "reason" in row:
            return row, b""
        if not path.is_file() or path.suffix.lower() not in IMAGE_TYPES:
            raise ValueError("not an image file")
        if not name.isprintable():
            raise ValueError("malformed name: characters that cannot be printed")
        labels = row if "age" in row else row | parse_name(name) | {"person": ""}
        data = path.read_bytes()
        chip = to_chip(decode(data))
    except OSError as error:
        return {"file": name, "reason": f"cannot be read: {error.strerror or error}"}, b""
    except ValueError as error:
        return {"file": name, "reason": str(error)}, b""
    grey = cv2.cvtColor(chip, cv2.COLOR_RGB2GRAY)
    hashes = {"sha256": hashlib.sha256(data).hexdigest(), "dhash": difference_hash(grey)}
    return labels | hashes | quality(grey), chip.tobytes()


def parse_name(name: str) -> dict:
    """Age (years), gender and ethnicity from a name `age_gender_ethnicity_date...`.

    Raises ValueError where a field is missing or holds a code that UTKFace does not define.
    """
    match = re.match(r"(\d{1,3})_([01])_([0-4])_\d", name)
    if match is None:
        raise ValueError("malformed name: age_gender_ethnicity_date expected")
    age, gender, ethnicity = (int(field) for field in match.groups())
    return {"age": age, "gender": GENDERS[gender], "ethnicity": ETHNICITIES[ethnicity]}


def read_labels(folder: Path) -> list[dict]:
    """File and labels of each row of labels.csv, or file and reason for none, in order of name.

    Columns: `file` (path in the folder) and `age` (years, rounded); `gender`, `ethnicity` (any
    names) and `person` or `group` where they are known. Images without a row are listed too.
    Raises ValueError where labels.csv is no CSV in UTF-8 with `file` and `age`.
    """
    try:
        text = (folder / LABELS).read_text("utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        options = dict(sep=separator, dtype=str, keep_default_na=False, index_col=False)
        table = pd.read_csv(io.StringIO(text), **options).fillna("")
        table = table.rename(columns=lambda name: name.strip().lower())
        if not {"file", "age"} <= set(table.columns):
            raise ValueError(f"its columns are {', '.join(table.columns)}")
    except ValueError as error:
        raise ValueError(
            f"{folder / LABELS} is no CSV in UTF-8 with the columns 'file' and 'age' ({error}): "
            "mend it or save it as 'CSV UTF-8', and run again"
        ) from error
    images = (path.relative_to(folder) for path in folder.rglob("*"))
    images = [image.as_posix() for image in images if image.suffix.lower() in IMAGE_TYPES]
    images = [image for image in images if not re.search(r"(^|/)\.", image)]
    left, rows = set(images), []
    there = {unicodedata.normalize("NFC", image): image for image in images}
    table = table.apply(lambda column: column.str.strip())
    plain = table["file"].str.replace("\\", "/", regex=False).str.removeprefix("./")
    names, years = plain.str.normalize("NFC").map(there), pd.to_numeric(table["age"], "coerce")
    for row, name, age in zip(table.to_dict("records"), names.fillna(""), years, strict=True):
        if not name:
            reason = "no such image in the folder" if row["file"] else "a row without a file name"
        elif name not in left:
            reason = f"a second row of {LABELS} for this file"
        elif np.isnan(age):
            reason = f"age {row['age']!r} is not a number"
        elif not 0 <= age <= OLDEST:
            reason = f"age {row['age']} is not between 0 and {OLDEST} years"
        else:
            labels = {key: row.get(key) or "unknown" for key in ("gender", "ethnicity")}
            person = row.get("person") or row.get("group") or ""
            rows.append({"file": name, "age": int(age + 0.5), **labels, "person": person})
            reason = ""
        if reason:
            rows.append({"file": name or row["file"] or LABELS, "reason": reason})
        left.discard(name)
    rows += [{"file": name, "reason": f"no row in {LABELS}"} for name in left]
    return sorted(rows, key=lambda row: row["file"])


def decode(data: bytes) -> torch.Tensor:
    """The bytes of an image file to uint8 RGB [3, h, w], turned as its EXIF orientation says.

    Raises ValueError where they are damaged, cut off or no image.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
    except cv2.error as error:
        raise ValueError(f"cannot be decoded: {error.err}") from error
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
    """256 bits of uint8 [h, w], in hex: is each of 16 x 16 cells darker than its right neighbour?

    N. Krawetz's "dhash" (2013): blur, brightness and recompression leave most bits alone.
    """
    small = cv2.resize(grey, (17, 16), interpolation=cv2.INTER_AREA)
    return np.packbits(small[:, :-1] < small[:, 1:]).tobytes().hex()


def near_duplicates(hashes: np.ndarray, limit: int = HASH_LIMIT) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j [P, 2] of hashes (uint8 [N, 32]) at most `limit` bits apart, and the bits [P].

    Of vectors of 0 and 1, the squared Euclidean distance is the number of bits that differ.
    """
    bits = np.unpackbits(hashes, axis=1).astype(np.float32)
    near = radius_neighbors_graph(bits, limit + 0.5, mode="distance", metric="sqeuclidean").tocoo()
    once = near.row < near.col
    return np.stack([near.row, near.col], 1)[once], near.data[once].round().astype(int)


def duplicate_groups(table: pd.DataFrame) -> np.ndarray:
    """For each face [N] the name of its group: the smallest file name among its near-duplicates.

    Near-duplicates of near-duplicates share a group, and so do all faces of one person. Needs the
    columns file, dhash and person ("" where it is not known).
    """
    unique, codes = np.unique(table["dhash"].to_numpy(str), return_inverse=True)
    hashes = np.stack([np.frombuffer(bytes.fromhex(digits), np.uint8) for digits in unique])
    people = len(unique) + pd.factorize(table["person"])[0]  # nodes, as the hashes are
    known = np.stack([codes, people], 1)[table["person"] != ""]
    edges, size = np.concatenate([near_duplicates(hashes)[0], known]), len(unique) + len(table)
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(size, size))
    groups = connected_components(graph, directed=False)[1][codes]
    return table["file"].groupby(groups).transform("min").to_numpy()


def _shares(groups: pd.Series) -> np.ndarray:
    """A number in [0, 1) for each face, by the sha256 of its group's name and nothing else."""
    digests = (hashlib.sha256(name.encode()).digest()[:8] for name in groups)
    return np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])


def split(groups: pd.Series) -> np.ndarray:
    """ "train", "valid" or "test" [N] by a hash of the group's name: the same on any machine."""
    edges = np.cumsum(list(SPLITS.values()))[:-1]
    return np.array(list(SPLITS))[np.searchsorted(edges, _shares(groups), side="right")]


def fold(groups: pd.Series) -> np.ndarray:
    """0 to FOLDS - 1 for each face [N], by the same hash: valid and test are the last fold."""
    return (_shares(groups) * FOLDS).astype(int)


def split_digest(table: pd.DataFrame) -> str:
    """sha256 over the sorted lines `file split`: equal digests mean the same split."""
    lines = sorted(f"{file} {part}\n" for file, part in zip(table.file, table.split, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
