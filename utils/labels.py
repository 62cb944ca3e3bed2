"""Your own faces: a folder of images and its labels.csv, read row by row."""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

LABELS = "labels.csv"
OLDEST = 120  # years
IMAGE_TYPES = {".jpg", ".jpeg", ".png", ".webp"}
UNKNOWN = "unknown"  # gender or ethnicity that labels.csv does not tell


def read_labels(folder: Path) -> list[tuple[str, dict | str]]:
    """For each row of labels.csv its file and labels, or its file and why it cannot be used.

    Columns: `file` (relative to the folder) and `age` (years, rounded to whole ones), and if you
    have them `gender`, `ethnicity` (any names) and `person` or `group` (all images of one go to
    the same part of the split). Images of the folder without a row are listed as well. In order
    of file name.

    Raises ValueError where labels.csv is no CSV in UTF-8, or lacks `file` or `age`.
    """
    table = _read(folder / LABELS)
    there = {_plain(name): name for name in _images(folder)}
    rows, seen = [], set()
    for row in table.to_dict("records"):
        name = there.get(_plain(row["file"]), "")
        if not row["file"]:
            rows.append((LABELS, "a row without a file name"))
        elif not name:
            rows.append((row["file"], "no such image in the folder"))
        elif name in seen:
            rows.append((name, f"a second row of {LABELS} for this file"))
        else:
            seen.add(name)
            rows.append((name, _labels(row)))
    rows += [(name, f"no row in {LABELS}") for name in there.values() if name not in seen]
    return sorted(rows, key=lambda row: row[0])


def _read(path: Path) -> pd.DataFrame:
    """All cells as text, columns in lower case; comma, semicolon or tab between them."""
    try:
        with path.open(encoding="utf-8-sig") as text:
            header = text.readline()
        separator = max(",;\t", key=header.count)
        options = dict(sep=separator, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        table = pd.read_csv(path, index_col=False, **options)
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} is no CSV in UTF-8 ({reason}): save it as 'CSV UTF-8' and run again"
        ) from error
    table.columns = [str(name).strip().lower() for name in table.columns]
    if not {"file", "age"} <= set(table.columns):
        raise ValueError(
            f"{path} has the columns {', '.join(table.columns)}: 'file' and 'age' are needed, "
            "'gender', 'ethnicity' and 'person' are read where they are there"
        )
    return table.fillna("").apply(lambda column: column.str.strip())


def _images(folder: Path) -> Iterator[str]:
    """Images anywhere under the folder, as relative paths with `/`, hidden ones apart."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if Path(name).suffix.lower() in IMAGE_TYPES and not name.startswith("."):
                yield (Path(place) / name).relative_to(folder).as_posix()


def _plain(name: str) -> str:
    """One spelling for a path that Windows, macOS and Linux write in three ways."""
    return unicodedata.normalize("NFC", name.replace("\\", "/")).removeprefix("./")


def _labels(row: dict) -> dict | str:
    try:
        age = float(row["age"])
    except ValueError:
        age = math.nan
    if not math.isfinite(age):
        return f"age {row['age']!r} is not a number"
    if not 0 <= age <= OLDEST:
        return f"age {row['age']} is not between 0 and {OLDEST} years"
    return {
        "age": int(age + 0.5),
        "gender": row.get("gender") or UNKNOWN,
        "ethnicity": row.get("ethnicity") or UNKNOWN,
        "person": row.get("person") or row.get("group") or "",
    }
