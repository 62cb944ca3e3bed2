"""From a folder of face images to one table and one array of pixels, without leaks.

The table has one row a face, in order of file name; row i describes `pixels[i]`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torchvision.transforms.v2 import functional as F

from utils.labels import IMAGE_TYPES, LABELS, read_labels
from utils.settings import CHIP_SIZE

GENDERS = ("male", "female")
ETHNICITIES = ("White", "Black", "Asian", "Indian", "Others")
SPLITS = {"train": 0.8, "valid": 0.1, "test": 0.1}
HASH_SIDE = 16  # a difference hash of HASH_SIDE x HASH_SIDE = 256 bits
HASH_LIMIT = 24  # two faces this many bits apart, or fewer, count as near-duplicates
CACHE_VERSION = 1
CHUNK = 256  # files decoded before their pixels are written out

_NAME = re.compile(r"^(\d{1,3})_([01])_([0-4])_\d")


class _File(NamedTuple):
    name: str
    path: str
    labels: dict | str | None = None  # of labels.csv, or why it has none; None: the name has them


class Faces(NamedTuple):
    """A prepared set: the table, uint8 RGB pixels [N, H, W, 3], and what was left out and why."""

    table: pd.DataFrame
    pixels: np.ndarray
    excluded: pd.DataFrame


def parse_name(name: str) -> dict:
    """Age (years), gender and ethnicity from a name `age_gender_ethnicity_date...`.

    Raises ValueError where a field is missing or holds a code that UTKFace does not define.
    """
    match = _NAME.match(name)
    if match is None:
        raise ValueError("malformed name: age_gender_ethnicity_date expected")
    age, gender, ethnicity = (int(field) for field in match.groups())
    return {"age": age, "gender": GENDERS[gender], "ethnicity": ETHNICITIES[ethnicity]}


def prepare(folder: Path, cache: Path) -> Faces:
    """Decode a folder of face images once; later calls only map the result into memory.

    Labels come from the file names, as UTKFace has them, or from a labels.csv in the folder
    (utils.labels). Pixels are CHIP_SIZE px squares. The cache is keyed by every file's name, size
    and time of change, and by the rows of labels.csv. It is built beside its final place and
    then moved: a killed run leaves nothing that is taken for whole, and two processes may ask at
    once.

    Raises FileNotFoundError where the folder is missing or holds no usable face, ValueError where
    labels.csv cannot be read, and OSError where the cache cannot be written.
    """
    files = _list_files(folder)
    home = cache / _fingerprint(files)
    if not (home / "cache.json").is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(cache / ".lock"):
                if not (home / "cache.json").is_file():
                    _build(folder, files, home)
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            need = len(files) * CHIP_SIZE**2 * 3 / 1e6
            raise OSError(
                f"cannot write the pixel cache {cache} ({error.strerror or error}): it needs "
                f"{need:,.0f} MB in a folder that can be written to; free some space, or set "
                "AGE_DATA to another folder"
            ) from error
    text = ("file", "group", "sha256", "dhash", "gender", "ethnicity", "person")
    table = pd.read_csv(home / "faces.csv", dtype=dict.fromkeys(text, str), na_filter=False)
    own = any(file.labels is not None for file in files)
    for column, known in (("gender", GENDERS), ("ethnicity", ETHNICITIES), ("split", SPLITS)):
        names = set(table[column]) if own and column != "split" else set(known)
        order = [name for name in known if name in names] + sorted(names - set(known))
        table[column] = pd.Categorical(table[column], order)
    shape = (len(table), CHIP_SIZE, CHIP_SIZE, 3)
    pixels = np.memmap(home / "pixels.u8", np.uint8, "r", shape=shape)
    return Faces(table, pixels, pd.read_csv(home / "excluded.csv", dtype=str, na_filter=False))


def _list_files(folder: Path) -> list[_File]:
    """What is in a folder, or in its labels.csv, in order of name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: run `make data`, or set AGE_FACES=sample")
    if (folder / LABELS).is_file():
        return [_File(name, str(folder / name), labels) for name, labels in read_labels(folder)]
    with os.scandir(folder) as entries:
        files = [_File(entry.name, entry.path) for entry in entries]
    return sorted(file for file in files if not file.name.startswith("."))


def _fingerprint(files: list[_File]) -> str:
    """Short digest of names, sizes and times of change: another set gives another cache."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {CHIP_SIZE}".encode())
    for file in files:
        if file.labels is not None:
            digest.update(os.fsencode(f"{file.labels}\n"))
        if os.path.lexists(file.path):
            status = (os.stat if os.path.exists(file.path) else os.lstat)(file.path)
            digest.update(os.fsencode(f"{file.name}/{status.st_size}/{status.st_mtime_ns}\n"))
    return digest.hexdigest()[:16]


def _build(folder: Path, files: list[_File], home: Path) -> None:
    for leftover in home.parent.glob("*.partial"):
        shutil.rmtree(leftover)
    partial = home.with_suffix(".partial")
    partial.mkdir()
    try:
        rows, excluded = [], []
        with open(partial / "pixels.u8", "wb") as out:
            for name, result in _decode_all(files):
                if isinstance(result, str):
                    excluded.append({"file": name, "reason": result})
                else:
                    chip, row = result
                    out.write(chip)
                    rows.append(row)
        if not rows:
            wanted = "names like '26_0_1_20170116.jpg' (age_gender_ethnicity_date) are expected"
            if excluded and (folder / LABELS).is_file():
                wanted = f"{LABELS} has {len(excluded):,} rows, the first: {excluded[0]}"
            raise FileNotFoundError(
                f"no usable face among the {len(files):,} files of {folder}: {wanted}, "
                f"or a {LABELS} with the columns file and age"
            )
        table = pd.DataFrame(rows)
        table["group"] = duplicate_groups(table["file"], table["dhash"], table.get("person"))
        table["split"] = split(table["group"])
        table.to_csv(partial / "faces.csv", index=False)
        pd.DataFrame(excluded, columns=["file", "reason"]).to_csv(
            partial / "excluded.csv", index=False, errors="backslashreplace"
        )
        (partial / "cache.json").write_text(json.dumps({"faces": len(table)}))
        partial.replace(home)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for other in home.parent.iterdir():  # caches of files that have changed since
        if other.is_dir() and other != home:
            shutil.rmtree(other, ignore_errors=True)


def _decode_all(files: list[_File]) -> Iterator[tuple[str, str | tuple[bytes, dict]]]:
    """Name and (pixels, row), or name and the reason for leaving it out, in order of name."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), CHUNK):
            chunk = files[start : start + CHUNK]
            yield from zip((e.name for e in chunk), pool.map(_decode, chunk), strict=True)


def _decode(entry: _File) -> str | tuple[bytes, dict]:
    if isinstance(entry.labels, str):
        return entry.labels
    if not os.path.isfile(entry.path) or Path(entry.name).suffix.lower() not in IMAGE_TYPES:
        return "not an image file"
    if not entry.name.isprintable():
        return "malformed name: characters that cannot be printed"
    try:
        labels = entry.labels or parse_name(entry.name)
    except ValueError as error:
        return str(error)
    try:
        data = Path(entry.path).read_bytes()
        if not data:
            return "empty file"
        chip = to_chip(decode(data))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        return f"cannot be decoded: {error}"
    grey = cv2.cvtColor(chip, cv2.COLOR_RGB2GRAY)
    row = {
        "file": entry.name,
        **labels,
        "sha256": hashlib.sha256(data).hexdigest(),
        "dhash": difference_hash(grey),
        **quality(grey),
    }
    return chip.tobytes(), row


def quality(grey: np.ndarray) -> dict[str, float]:
    """Brightness (mean, 0-255) and sharpness (variance of the Laplacian) of uint8 [h, w]."""
    sharpness = cv2.Laplacian(grey, cv2.CV_32F).var()
    return {"brightness": round(float(grey.mean()), 2), "sharpness": round(float(sharpness), 2)}


def decode(data: bytes) -> torch.Tensor:
    """The bytes of an image file to uint8 RGB [3, h, w], turned as its EXIF orientation says.

    Raises ValueError where they are damaged, cut off or no image.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        raise ValueError(error.err) from error
    without_end = data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data  # of a JPEG
    if image is None or without_end:
        raise ValueError("damaged, cut off or not an image")
    return torch.from_numpy(image).permute(2, 0, 1)


def to_chip(image: torch.Tensor) -> np.ndarray:
    """uint8 [3, h, w] to uint8 [CHIP_SIZE, CHIP_SIZE, 3]: the central square, antialiased."""
    square = F.center_crop(image, [min(image.shape[1:])] * 2)
    chip = F.resize(square, [CHIP_SIZE, CHIP_SIZE], antialias=True)
    return np.ascontiguousarray(chip.permute(1, 2, 0).numpy())


def difference_hash(grey: np.ndarray) -> str:
    """256 bits as 64 hex digits: is each of 16 x 16 cells darker than its right neighbour?

    The "dhash" of N. Krawetz (2013); blur, brightness and recompression leave most bits alone.
    """
    small = cv2.resize(grey, (HASH_SIDE + 1, HASH_SIDE), interpolation=cv2.INTER_AREA)
    return np.packbits(small[:, :-1] < small[:, 1:]).tobytes().hex()


def near_duplicates(
    hashes: np.ndarray, limit: int = HASH_LIMIT, block: int = 4096
) -> Iterator[np.ndarray]:
    """Index pairs [P, 2] of hashes (uint8 [N, 32]) at most `limit` bits apart, block by block.

    With bits as -1 and 1, a product of 256 - 2d means d bits of difference: one matrix product
    compares block x block pairs, and no more than that is ever held in memory.
    """

    def signs(start: int) -> torch.Tensor:
        bits = np.unpackbits(hashes[start : start + block], axis=1)
        return torch.from_numpy(bits.astype(np.float32) * 2 - 1)

    for i in range(0, len(hashes), block):
        rows = signs(i)
        for j in range(i, len(hashes), block):
            close = rows @ signs(j).T >= rows.shape[1] - 2 * limit
            pairs = (close.triu(1) if i == j else close).nonzero()
            yield (pairs + torch.tensor([i, j])).numpy()


def duplicate_groups(
    files: pd.Series,
    dhash: pd.Series,
    person: pd.Series | None = None,
    limit: int = HASH_LIMIT,
) -> np.ndarray:
    """For each face the name of its group: the smallest file name among its near-duplicates.

    Near-duplicates of near-duplicates share a group; byte-identical files always do, and so do
    all faces of one `person` (a name for each face; "" where it is not known).
    """
    unique, codes = np.unique(dhash.to_numpy(str), return_inverse=True)
    hashes = np.stack([np.frombuffer(bytes.fromhex(h), np.uint8) for h in unique])
    labels = np.arange(len(unique))
    for pairs in near_duplicates(hashes, limit):
        if len(pairs):
            edges = labels[pairs].T
            graph = coo_array((np.ones(len(pairs)), edges), shape=(len(unique),) * 2)
            labels = connected_components(graph, directed=False)[1][labels]
    groups = pd.Series(labels[codes], files.index)
    if person is not None:
        known = groups[person != ""]
        pairs = known, known.groupby(person[person != ""]).transform("first")
        graph = coo_array((np.ones(len(known)), pairs), shape=(len(unique),) * 2)
        groups = pd.Series(connected_components(graph, directed=False)[1][groups], files.index)
    return files.groupby(groups).transform("min").to_numpy()


def split(groups: pd.Series) -> np.ndarray:
    """ "train", "valid" or "test" for each face, by a hash of its group's name and nothing else.

    The same names give the same split on any machine, in any order, and no group is divided.
    """
    names, codes = np.unique(groups.to_numpy(str), return_inverse=True)
    digests = [hashlib.sha256(name.encode()).digest()[:8] for name in names]
    share = np.array([int.from_bytes(d, "big") / 2**64 for d in digests])
    edges = np.cumsum(list(SPLITS.values()))[:-1]
    return np.array(list(SPLITS))[np.searchsorted(edges, share, side="right")][codes]


def split_digest(table: pd.DataFrame) -> str:
    """sha256 over the sorted lines `file split`: equal digests mean the same split."""
    lines = sorted(f"{file} {part}\n" for file, part in zip(table.file, table.split, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
