"""`make data` fetches, verifies and unpacks UTKFace; `fetch` also gets what others trained."""

import argparse
import errno
import hashlib
import os
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError

import pandas as pd
import torch
from filelock import FileLock

from utils.settings import ROOT, get_settings, locate

REVISION = "py97/UTKFace-Cropped/resolve/e80f21fb21fa3631380c3cb634b79be3ac2f4cba"
URL = f"https://huggingface.co/datasets/{REVISION}/UTKFace.tar.gz"
SHA256 = "2c0655397b498e81b82d685ee74bee8c2e4364a5897caf3afec6ea48929024a7"
MANIFEST = ROOT / "data" / "utkface_manifest.csv.gz"  # the original's names and sha256
IMAGE = re.compile(r"(.*/|)UTKFace/([^./][^/\\:]*\.(?i:jpg))")  # what is taken from an archive
TERMS = """UTKFace (https://susanqq.github.io/UTKFace/) is for non-commercial research only. The
images belong to their owners: do not publish them, do not pass them on.
It is fetched from huggingface.co. If that fails, get UTKFace.tar.gz with a browser from the page
above, or the zip from https://www.kaggle.com/datasets/jangedoo/utkface-new, and name the file:
`make data FROM=<file>`, or UTKFACE_ARCHIVE=<file>. AGE_FACES=sample needs no photographs."""


def make_once(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a hidden path and rename it to `path`, unless that is there already.

    One process at a time; what a killed one left goes. Raises OSError with the way out where the
    disk is full or may not be written to.
    """
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(".lock")):
            for left in path.parent.glob(f".{path.name}.*.partial"):
                shutil.rmtree(left)
            with TemporaryDirectory(".partial", f".{path.name}.", path.parent) as folder:
                if not path.exists():
                    write(new := Path(folder, path.name))
                    new.replace(path)
    except OSError as error:
        if error.errno is None:  # explained already
            raise
        text = f"cannot write {path} ({error.strerror}): free some space, or set AGE_DATA to a "
        raise OSError(error.errno, text + "folder you may write to; then run again") from error


def fetch(url: str, path: Path, sha256: str) -> Path:
    """`path`, downloaded from `url` unless it is there with this sha256; no other file is taken.

    Raises ConnectionError with the way out where that fails, OSError where the disk does.
    """

    def write(new: Path) -> None:
        try:
            torch.hub.download_url_to_file(url, str(new), sha256, sys.stderr.isatty())
        except (URLError, HTTPException, ConnectionError, TimeoutError, RuntimeError) as error:
            text = f"{url} could not be downloaded ({error}): run again when there is a network, "
            raise ConnectionError(f"{text}or save it with a browser as {path}") from error

    if path.is_file() and file_sha256(path) != sha256:
        path.unlink()  # damaged
    make_once(path, write)
    return path


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes, as hex digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def unpack(source: Path, folder: Path) -> None:
    """Fill a new folder with UTKFace from a tar, a zip or a folder.

    Plain .jpg files right in UTKFace/ (of several, as in Kaggle's zip, the outermost) are written
    by their base names, and nothing else is: no link, no device, no other path. Raises ValueError
    where the source is damaged, cut off or not the complete original, and says what differs.
    """
    try:
        with ExitStack() as stack:
            if source.is_dir():
                paths = (source if any(source.glob("*.jpg")) else source / "UTKFace").glob("*")
                plain = (path for path in paths if path.is_file() and not path.is_symlink())
                members, read = {f"UTKFace/{p.name}": p for p in plain}, partial(open, mode="rb")
            elif zipfile.is_zipfile(source):
                packed = stack.enter_context(zipfile.ZipFile(source))
                plain = (m for m in packed.infolist() if m.external_attr >> 28 in (0, 8))
                members, read = {m.filename: m for m in plain}, packed.open
            else:
                packed = stack.enter_context(tarfile.open(source))
                members, read = {m.name: m for m in packed if m.isreg()}, packed.extractfile
            images = [match for match in map(IMAGE.fullmatch, members) if match]
            outermost = min((match[1].count("/") for match in images), default=0)
            folder.mkdir()
            for match in images:
                if match[1].count("/") == outermost:
                    with read(members[match[0]]) as image, open(folder / match[2], "wb") as out:
                        shutil.copyfileobj(image, out)
        if differences := check(folder):
            raise ValueError(differences)
    except Exception as error:  # readers of a damaged archive raise nearly anything
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.ENOENT):
            raise  # of the disk
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"{source} is not UTKFace as published ({reason}): fetch it again (data/README.md says "
            "where), or unset UTKFACE_ARCHIVE and run `make data`"
        ) from error


def check(folder: Path) -> str:
    """How a folder differs from the original UTKFace, by its files' sha256; "" if it does not."""
    files = (path for path in folder.glob("[!.]*") if path.is_file())
    found = {path.name: file_sha256(path)[:16] for path in files}
    original = pd.read_csv(MANIFEST, index_col="file", dtype=str)["sha256_16"].to_dict()
    both = found.keys() & original.keys()
    changed = {name for name in both if found[name] != original[name]}
    lists = {"missing": original.keys() - both, "changed": changed, "extra": found.keys() - both}
    texts = (f"{len(v):,} {k}: {', '.join(sorted(v)[:3])}" for k, v in lists.items() if v)
    return "; ".join(texts)


def main(arguments: list[str] | None = None) -> int:
    """Make and verify data/UTKFace; returns the exit code."""
    parser = argparse.ArgumentParser("python -m utils.download", description="Get UTKFace.")
    parser.add_argument("source", nargs="?", default=os.environ.get("UTKFACE_ARCHIVE"))
    parser.add_argument("--accept-licence", action="store_true")
    options = parser.parse_args(arguments)
    folder = get_settings("utkface").folder
    archive = folder.with_name("UTKFace.tar.gz")
    try:
        if folder.exists():
            print(f"{folder} is there and only compared: delete it to make it anew.")
            print(check(folder) or "It is the complete original.")
            return 0
        if not options.source:
            print(TERMS)
            question = "Do you accept these terms (yes, or run with --accept-licence)? "
            if not options.accept_licence and input(question).strip().lower() != "yes":
                raise PermissionError("nothing is downloaded where the terms are not accepted")
            fetch(URL, archive, SHA256)
        make_once(folder, partial(unpack, locate(options.source or archive)))
        if not options.source:
            archive.unlink(missing_ok=True)
        print(f"{folder} is the complete original.")
    except (OSError, ValueError, EOFError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
