"""From a folder of face images to one table and one array of pixels: row i describes pixels[i]."""

import hashlib
import io
import os
import re
import shutil
import unicodedata
from concurrent.futures import ThreadPoolExecutor
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

from utils.download import making, unpack
from utils.settings import CHIP_SIZE, OLDEST, Settings, locate
from utils.synthetic import draw_sample

GENDERS = ("male", "female")
ETHNICITIES = ("White", "Black", "Asian", "Indian", "Others")
SPLITS = {"train": 0.8, "valid": 0.1, "test": 0.1}
FOLDS = 5  # valid and test together are the last one
HASH_SIDE = 16  # a difference hash of HASH_SIDE x HASH_SIDE = 256 bits
HASH_LIMIT = 24  # two faces this many bits apart, or fewer, count as near-duplicates
IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp"}
LABELS = "labels.csv"
CACHE_VERSION = 2
CHUNK = 256  # files decoded before their pixels are written out


class Faces(NamedTuple):
    """A prepared set: the table, uint8 RGB pixels [N, H, W, 3], and what was left out and why."""

    table: pd.DataFrame
    pixels: np.ndarray
    excluded: pd.DataFrame


def load_faces(settings: Settings) -> Faces:
    """The faces of these settings: drawn, or unpacked from UTKFACE_ARCHIVE, where they are missing.

    Nothing is downloaded. Raises FileNotFoundError that names the ways out where UTKFace or
    labels.csv is not there, and what `utils.download.unpack` and `prepare` raise.
    """
    folder, archive = settings.folder, os.environ.get("UTKFACE_ARCHIVE")
    if settings.faces == "own":
        if not (folder / LABELS).is_file():
            raise FileNotFoundError(
                f"{folder / LABELS} is not there: a CSV with the columns file and age, and if you "
                "have them gender, ethnicity and person (README, 'Your own faces')"
            )
    elif any(folder.glob("*.jpg")):
        pass
    elif settings.faces == "sample":
        with making(folder) as new:
            if not any(folder.glob("*.jpg")):
                draw_sample(new)
    elif archive:
        print(unpack(locate(archive), folder), end="")
    else:
        raise FileNotFoundError(
            f"no face images in {folder}. Three ways out: `make data` downloads UTKFace; "
            "UTKFACE_ARCHIVE=<file> names a UTKFace.tar.gz or the Kaggle zip; AGE_FACES=sample "
            "runs on drawn faces"
        )
    return prepare(folder, settings.cache)


def prepare(folder: Path, cache: Path) -> Faces:
    """Decode a folder of face images once; later calls only map the result into memory.

    Labels come from labels.csv where the folder has one, else from the file names. Of the cache,
    a folder named by the names, sizes, times and labels of all files, only the newest is kept.
    Raises FileNotFoundError where no face can be used, OSError where the cache cannot be written.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: run `make data`, or set AGE_FACES=sample")
    if (folder / LABELS).is_file():
        files = read_labels(folder)
    else:
        files = [(name, None) for name in sorted(os.listdir(folder)) if name[0] != "."]
    key = hashlib.sha256(f"{CACHE_VERSION} {CHIP_SIZE}".encode())
    for name, labels in files:
        path = os.path.join(folder, name)
        status = os.stat(path) if os.path.exists(path) else None
        facts = (name, labels, status and (status.st_size, status.st_mtime_ns))
        key.update(os.fsencode(f"{facts}\n"))
    home = cache / key.hexdigest()[:16]
    if not home.is_dir():
        need = len(files) * CHIP_SIZE**2 * 3 / 1e6
        with making(home, f"It needs {need:,.0f} MB. ") as new:
            if not home.is_dir():
                for old in cache.iterdir():  # of files that have changed since
                    if old.is_dir() and old != new.parent:
                        shutil.rmtree(old)
                _build(folder, files, new)
    text = ("file", "group", "sha256", "dhash", "gender", "ethnicity", "person")
    table = pd.read_csv(home / "faces.csv", dtype=dict.fromkeys(text, str), na_filter=False)
    for column, known in (("gender", GENDERS), ("ethnicity", ETHNICITIES)):
        names = sorted(set(table[column]) - set(known))
        table[column] = pd.Categorical(table[column], [*known, *names])
        if (folder / LABELS).is_file():
            table[column] = table[column].cat.remove_unused_categories()
    table["split"] = pd.Categorical(table["split"], list(SPLITS))
    shape = (len(table), CHIP_SIZE, CHIP_SIZE, 3)
    pixels = np.memmap(home / "pixels.u8", np.uint8, "r", shape=shape)
    return Faces(table, pixels, pd.read_csv(home / "excluded.csv", dtype=str, na_filter=False))


def _build(folder: Path, files: list, home: Path) -> None:
    """Write pixels.u8, faces.csv and excluded.csv, chunk by chunk."""
    home.mkdir()
    rows, excluded = [], []
    with open(home / "pixels.u8", "wb") as out, ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(files), CHUNK):
            chunk = files[start : start + CHUNK]
            for (name, _), face in zip(
                chunk, pool.map(lambda file: _read(folder, *file), chunk), strict=True
            ):
                if isinstance(face, str):
                    excluded.append({"file": name, "reason": face})
                else:
                    out.write(face[0])
                    rows.append(face[1])
    if not rows:
        raise FileNotFoundError(
            f"no usable face among the {len(files):,} files of {folder} (the first: "
            f"{excluded[:1]}): names like '26_0_1_20170116.jpg' (age_gender_ethnicity_date) are "
            f"expected, or a {LABELS} with the columns file and age"
        )
    table = pd.DataFrame(rows)
    table["group"] = duplicate_groups(table["file"], table["dhash"], table["person"])
    table["fold"], table["split"] = fold(table["group"]), split(table["group"])
    table.to_csv(home / "faces.csv", index=False)
    excluded = pd.DataFrame(excluded, columns=["file", "reason"])
    excluded.to_csv(home / "excluded.csv", index=False, errors="backslashreplace")


def _read(folder: Path, name: str, labels: dict | str | None) -> tuple[bytes, dict] | str:
    """The pixels of one file and its row of the table, or the reason why it is left out."""
    if isinstance(labels, str):
        return labels
    path = folder / name
    if not path.is_file() or path.suffix.lower() not in IMAGE_TYPES:
        return "not an image file"
    if not name.isprintable():
        return "malformed name: characters that cannot be printed"
    try:
        labels = labels or parse_name(name)
        data = path.read_bytes()
        if not data:
            return "empty file"
        chip = to_chip(decode(data))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except ValueError as error:
        return str(error)
    grey = cv2.cvtColor(chip, cv2.COLOR_RGB2GRAY)
    row = {"file": name, "person": "", **labels, "sha256": hashlib.sha256(data).hexdigest()}
    return chip.tobytes(), {**row, "dhash": difference_hash(grey), **quality(grey)}


def parse_name(name: str) -> dict:
    """Age (years), gender and ethnicity from a name `age_gender_ethnicity_date...`.

    Raises ValueError where a field is missing or holds a code that UTKFace does not define.
    """
    match = re.match(r"(\d{1,3})_([01])_([0-4])_\d", name)
    if match is None:
        raise ValueError("malformed name: age_gender_ethnicity_date expected")
    age, gender, ethnicity = (int(field) for field in match.groups())
    return {"age": age, "gender": GENDERS[gender], "ethnicity": ETHNICITIES[ethnicity]}


def read_labels(folder: Path) -> list[tuple[str, dict | str]]:
    """Each file of labels.csv and its labels, or the reason why it has none, in order of name.

    Columns: `file` (relative to the folder) and `age` (years, rounded to whole ones); if there,
    `gender`, `ethnicity` (any names) and `person` or `group`. Images without a row are listed.
    Raises ValueError where labels.csv is no CSV in UTF-8, or lacks `file` or `age`.
    """
    path = folder / LABELS
    try:
        text = path.read_text("utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        options = dict(sep=separator, dtype=str, keep_default_na=False, index_col=False)
        table = pd.read_csv(io.StringIO(text), **options)
    except ValueError as error:
        raise ValueError(
            f"{path} is no CSV in UTF-8 ({error}): save it as 'CSV UTF-8' and run again"
        ) from error
    table.columns = table.columns.str.strip().str.lower()
    if not {"file", "age"} <= set(table.columns):
        raise ValueError(
            f"{path} has the columns {', '.join(table.columns)}: 'file' and 'age' are needed, "
            "'gender', 'ethnicity' and 'person' are read where they are there"
        )
    table = table.fillna("").apply(lambda column: column.str.strip())
    table["years"] = pd.to_numeric(table["age"], errors="coerce")
    names = (path.relative_to(folder) for path in folder.rglob("*"))
    names = [name.as_posix() for name in names if name.suffix.lower() in IMAGE_TYPES]
    there = {_plain(name): name for name in names if not re.search(r"(^|/)\.", name)}
    good, bad = {}, []
    for row in table.to_dict("records"):
        name = there.get(_plain(row["file"]), "")
        if not name:
            reason = "no such image in the folder" if row["file"] else "a row without a file name"
            bad.append((row["file"] or LABELS, reason))
        elif name in good:
            bad.append((name, f"a second row of {LABELS} for this file"))
        elif pd.isna(row["years"]):
            good[name] = f"age {row['age']!r} is not a number"
        elif not 0 <= row["years"] <= OLDEST:
            good[name] = f"age {row['age']} is not between 0 and {OLDEST} years"
        else:
            good[name] = {
                "age": int(row["years"] + 0.5),
                "gender": row.get("gender") or "unknown",
                "ethnicity": row.get("ethnicity") or "unknown",
                "person": row.get("person") or row.get("group") or "",
            }
    bad += [(name, f"no row in {LABELS}") for name in there.values() if name not in good]
    return sorted([*good.items(), *bad], key=lambda row: row[0])


def _plain(name: str) -> str:
    """One spelling for a path that Windows, macOS and Linux write in three ways."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")


def decode(data: bytes) -> torch.Tensor:
    """The bytes of an image file to uint8 RGB [3, h, w], turned as its EXIF orientation says.

    Raises ValueError where they are damaged, cut off or no image.
    """
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
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
    """256 bits as 64 hex digits: is each of 16 x 16 cells darker than its right neighbour?

    The "dhash" of N. Krawetz (2013); blur, brightness and recompression leave most bits alone.
    """
    small = cv2.resize(grey, (HASH_SIDE + 1, HASH_SIDE), interpolation=cv2.INTER_AREA)
    return np.packbits(small[:, :-1] < small[:, 1:]).tobytes().hex()


def near_duplicates(hashes: np.ndarray, limit: int = HASH_LIMIT) -> tuple[np.ndarray, np.ndarray]:
    """Pairs i < j [P, 2] of hashes (uint8 [N, 32]) at most `limit` bits apart, and the bits [P].

    Of vectors of 0 and 1, the squared Euclidean distance is the number of bits that differ.
    """
    bits = np.unpackbits(hashes, axis=1).astype(np.float32)
    graph = radius_neighbors_graph(bits, limit + 0.5, mode="distance", metric="sqeuclidean")
    near = graph.tocoo()
    once = near.row < near.col
    pairs = np.stack([near.row, near.col], axis=1)[once]
    return pairs, near.data[once].round().astype(int)


def duplicate_groups(
    files: pd.Series, dhash: pd.Series, person: pd.Series | None = None, limit: int = HASH_LIMIT
) -> np.ndarray:
    """For each face the name of its group: the smallest file name among its near-duplicates.

    Near-duplicates of near-duplicates share a group; byte-identical files always do, and so do
    all faces of one `person` (a name for each face; "" where it is not known).
    """
    unique, codes = np.unique(dhash.to_numpy(str), return_inverse=True)
    hashes = np.stack([np.frombuffer(bytes.fromhex(digits), np.uint8) for digits in unique])
    edges = near_duplicates(hashes, limit)[0]
    if person is not None:  # each is one more node, joined to the hashes of their faces
        nodes = np.stack([codes, len(unique) + pd.factorize(person)[0]], axis=1)
        edges = np.concatenate([edges, nodes[person != ""]])
    size = len(unique) + len(files)
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(size, size))
    groups = connected_components(graph, directed=False)[1][codes]
    return files.groupby(groups).transform("min").to_numpy()


def _shares(groups: pd.Series) -> np.ndarray:
    """A number in [0, 1) for each face, by the sha256 of its group's name and nothing else."""
    digests = (hashlib.sha256(name.encode()).digest()[:8] for name in groups)
    return np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])


def split(groups: pd.Series) -> np.ndarray:
    """ "train", "valid" or "test" for each face, by a hash of its group's name and nothing else.

    The same names give the same split on any machine, in any order, and no group is divided.
    """
    edges = np.cumsum(list(SPLITS.values()))[:-1]
    return np.array(list(SPLITS))[np.searchsorted(edges, _shares(groups), side="right")]


def fold(groups: pd.Series) -> np.ndarray:
    """0 to FOLDS - 1 for each face, by the same hash: valid and test are the last fold."""
    return (_shares(groups) * FOLDS).astype(int)


def split_digest(table: pd.DataFrame) -> str:
    """sha256 over the sorted lines `file split`: equal digests mean the same split."""
    lines = sorted(f"{file} {part}\n" for file, part in zip(table.file, table.split, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()
