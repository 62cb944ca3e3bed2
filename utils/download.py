"""`make data` fetches, verifies and unpacks UTKFace; `fetch` also gets what others trained.

python -m utils.download [ARCHIVE_OR_FOLDER] [--accept-licence]
"""

import argparse
import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tarfile
import zipfile
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import URLError

import pandas as pd
import torch
from filelock import FileLock

from utils.settings import ROOT, get_settings, locate

URL = "https://huggingface.co/datasets/py97/UTKFace-Cropped/resolve/"
URL += "e80f21fb21fa3631380c3cb634b79be3ac2f4cba/UTKFace.tar.gz"
SHA256 = "2c0655397b498e81b82d685ee74bee8c2e4364a5897caf3afec6ea48929024a7"
MANIFEST = ROOT / "data" / "utkface_manifest.csv.gz"  # of the original: names and sha256
LICENCE = """UTKFace (https://susanqq.github.io/UTKFace/) is for non-commercial research only. The
images belong to their owners: do not publish them, do not pass them on."""
OTHER_WAYS = """Other ways: get UTKFace.tar.gz (browser: https://susanqq.github.io/UTKFace/) or
the zip of https://www.kaggle.com/datasets/jangedoo/utkface-new, and name it: `make data FROM=file`,
or UTKFACE_ARCHIVE=file. AGE_FACES=sample needs no photographs."""


@contextmanager
def making(path: Path, need: str = ""):
    """One process at a time fills a hidden path, which is renamed to `path` if all went well.

    Raises OSError that says what to do where the disk is full or may not be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(".lock")):
            for left in path.parent.glob(f".{path.name}.*.partial"):  # by a killed process
                shutil.rmtree(left)
            with TemporaryDirectory(".partial", f".{path.name}.", path.parent) as temporary:
                yield (new := Path(temporary, path.name))
                if new.exists():
                    new.replace(path)
    except OSError as error:
        if error.errno is None:  # explained already
            raise
        text = f"cannot write {path} ({error.strerror}). {need}Free some space, move away what is "
        text += "in the way, or set AGE_DATA to a folder you may write to; then run again"
        raise OSError(error.errno, text) from error


def fetch(url: str, path: Path, sha256: str) -> Path:
    """`path`, downloaded from `url` unless it is there with this sha256; no other file is taken.

    Raises ConnectionError where that fails, OSError where the disk is full or read-only.
    """
    if file_sha256(path) == sha256:
        return path
    with making(path) as new:
        if file_sha256(path) != sha256:  # no other process was faster
            try:
                torch.hub.download_url_to_file(url, str(new), sha256, sys.stderr.isatty())
            except (URLError, HTTPException, ConnectionError, TimeoutError, RuntimeError) as error:
                text = f"{url} could not be downloaded ({error}). Run again when there is a network"
                raise ConnectionError(f"{text}, or save it with a browser as {path}") from error
    return path


def file_sha256(path: Path) -> str:
    """sha256 of a file in hex digits; "" where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


@contextmanager
def _open(source: Path):
    """Plain files of a folder, zip or tar by their name, and the function that opens one."""
    if source.is_dir():
        place = source if any(source.glob("*.jpg")) else source / "UTKFace"
        paths = (path for path in place.glob("*") if path.is_file() and not path.is_symlink())
        yield {f"UTKFace/{path.name}": path for path in paths}, partial(open, mode="rb")
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as packed:
            kinds = {info: stat.S_IFMT(info.external_attr >> 16) for info in packed.infolist()}
            yield {i.filename: i for i in kinds if kinds[i] in (0, stat.S_IFREG)}, packed.open
    else:
        with tarfile.open(source) as packed:
            members = {info.name: info for info in packed if info.isreg()}
            packed.fileobj.seek(packed.offset)  # tarfile takes a cut or damaged header for the end
            if packed.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end mark")
            while packed.fileobj.read(1 << 20):  # gzip compares its checksum at the end
                pass
            yield members, packed.extractfile


def unpack(source: Path, folder: Path) -> str:
    """Make `folder` from the .jpg files right in UTKFace/ of an archive or a folder.

    They are written by their base name, and nothing else is: no link, no device, no path. Where
    there are several UTKFace/ (Kaggle's zip), the outermost is taken. Returns `check(folder)`.
    Raises ValueError where the archive is cut off or damaged, or no such file is in it.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: name UTKFace.tar.gz, a zip or a folder")
    with making(folder) as new:
        if any(folder.glob("*.jpg")):
            return check(folder)
        try:
            with _open(source) as (members, read):
                found = [re.fullmatch(r"(.*/)?UTKFace/([^./][^/\\:]*\.jpg)", m) for m in members]
                outermost = min((match[1] or "" for match in found if match), key=len)
                new.mkdir()
                for match in found:
                    if match and (match[1] or "") == outermost:
                        with read(members[match[0]]) as image, open(new / match[2], "wb") as out:
                            shutil.copyfileobj(image, out)
        except Exception as error:  # readers of damaged archives raise nearly anything
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            raise ValueError(
                f"{source} is damaged, cut off, or not the archive of UTKFace ({error}): fetch it "
                "again (data/README.md says where), or unset UTKFACE_ARCHIVE and run `make data`"
            ) from error
        return check(new)


def check(folder: Path) -> str:
    """How the files of a folder differ from the original UTKFace's: "" where they do not."""
    paths = (path for path in folder.iterdir() if path.is_file() and path.name[0] != ".")
    found = {path.name: file_sha256(path)[:16] for path in paths}
    original = pd.read_csv(MANIFEST, dtype=str).set_index("file")["sha256_16"].to_dict()
    both, lines = found.keys() & original.keys(), []
    differences = {
        "missing": original.keys() - both,
        "changed": {name for name in both if found[name] != original[name]},
        "extra": found.keys() - both,
    }
    if not any(differences.values()):
        return ""
    lines = [f"  {what} {len(names):,}: {sorted(names)[:3]}" for what, names in differences.items()]
    return "\n".join(
        [f"{folder} is not the complete original UTKFace; results will differ:", *lines]
    )


def main(arguments: list[str] | None = None) -> int:
    """Make and verify data/UTKFace; returns the exit code."""
    parser = argparse.ArgumentParser("python -m utils.download", description="Get UTKFace.")
    parser.add_argument(
        "source", nargs="?", help="archive or folder; else UTKFACE_ARCHIVE; else the web"
    )
    parser.add_argument("--accept-licence", action="store_true", help="do not ask")
    options = parser.parse_args(arguments)
    source = options.source or os.environ.get("UTKFACE_ARCHIVE")
    folder = get_settings("utkface").folder
    try:
        if any(folder.glob("*.jpg")):
            print(f"{folder} is there and only verified. Delete it to make it anew.")
            differences = check(folder)
        elif source:
            differences = unpack(locate(source), folder)
        else:
            print(LICENCE)
            asked = sys.stdin and sys.stdin.isatty() and not options.accept_licence
            answer = input("Do you accept this licence? [yes/no] ") if asked else ""
            if not options.accept_licence and answer.strip().lower() not in ("y", "yes"):
                raise PermissionError("the licence was not accepted (yes, or --accept-licence)")
            archive = fetch(URL, folder.with_name("UTKFace.tar.gz"), SHA256)
            differences = unpack(archive, folder)
            archive.unlink()
        print(differences or f"{folder}: the complete original UTKFace")
    except (OSError, ValueError) as error:
        ways = f"\n{OTHER_WAYS}" if isinstance(error, ConnectionError) else ""
        print(f"Error: {error}{ways}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
