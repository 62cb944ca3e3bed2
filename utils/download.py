"""`make data` fetches, verifies and unpacks UTKFace; `fetch` also gets what others trained."""

import argparse
import hashlib
import os
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock

from utils.settings import ROOT, get_settings, locate

REVISION = "py97/UTKFace-Cropped/resolve/e80f21fb21fa3631380c3cb634b79be3ac2f4cba"
URL = f"https://huggingface.co/datasets/{REVISION}/UTKFace.tar.gz"
SHA256 = "2c0655397b498e81b82d685ee74bee8c2e4364a5897caf3afec6ea48929024a7"
MANIFEST = ROOT / "data" / "utkface_manifest.csv.gz"  # the original's names and sha256
TERMS = """UTKFace is for non-commercial research only. Its images belong to their owners: do not
publish them or pass them on (see data/README.md). Do you accept these terms (yes or no)? """


def make_once(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a hidden folder, renamed to `path` when complete, unless that is there."""
    if path.exists():
        return
    half = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(".lock")):  # one process at a time
            shutil.rmtree(half, ignore_errors=True)  # what a killed one left
            if not path.exists():
                write(half)
                half.replace(path)
    except OSError as error:
        shutil.rmtree(half, ignore_errors=True)
        error.strerror = f"{error.strerror}: free some space for {path}, or set AGE_DATA"
        raise


def fetch(url: str, path: Path, sha256: str, way_out: str = "") -> Path:
    """`path`, from `url` if not there with this sha256; or ConnectionError, ending in `way_out`."""
    try:
        if not path.is_file() or file_sha256(path) != sha256:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), sha256, sys.stderr.isatty())
    except Exception as error:  # of the network, the server, the sha256 or the disk
        text = f"{url} could not be downloaded ({error}): run again when there is a network"
        raise ConnectionError(f"{text}, or save it with a browser as {path}{way_out}") from error
    return path


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes, as hex digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _members(source: Path) -> Iterator[tuple[str, bytes]]:
    """Name and first megabyte of each file of a folder, or of a tar or zip; never a link."""
    if source.is_dir():
        yield from ((p.name, p.read_bytes()) for p in source.rglob("*.jpg") if p.is_file())
        return
    zipped = zipfile.is_zipfile(source)
    with zipfile.ZipFile(source) if zipped else tarfile.open(source) as packed:
        for member in packed.infolist() if zipped else packed:
            if not zipped and packed.offset <= member.offset:  # and so on for ever
                raise ValueError("a file in it has a size below zero")
            if zipped or member.isreg():
                name = Path(member.filename if zipped else member.name).name
                yield name, (packed.open if zipped else packed.extractfile)(member).read(1 << 20)


def unpack(source: Path, folder: Path) -> None:
    """Make a folder of the images in a source that are UTKFace's; ValueError if any is lacking."""
    original, images, reason = _manifest(), {}, ""
    try:
        for name, data in _members(source):
            if (name, hashlib.sha256(data).hexdigest()[:16]) in original:  # and nothing else
                images[name] = data
    except Exception as error:  # readers of a damaged archive raise nearly anything
        reason = f" ({error})"
    if lacking := sorted({name for name, _ in original} - set(images)):
        text = f"{source} lacks {len(lacking):,} images of UTKFace, first {lacking[0]}{reason}: "
        advice = "fetch it again (data/README.md), or unset UTKFACE_ARCHIVE and run `make data`"
        raise ValueError(text + advice)
    folder.mkdir()
    for name, data in images.items():
        (folder / name).write_bytes(data)


def _manifest() -> set[tuple[str, str]]:
    return set(pd.read_csv(MANIFEST, dtype=str).itertuples(index=False, name=None))


def check(folder: Path) -> str:
    """How a folder differs from the original UTKFace, by names and sha256; "" if it does not."""
    found = {(path.name, file_sha256(path)[:16]) for path in folder.glob("[!.]*") if path.is_file()}
    names = sorted({name for name, _ in found ^ _manifest()})
    return f"{len(names):,} files missing, changed or extra, first {names[0]}" if names else ""


def main(arguments: list[str] | None = None) -> None:
    """Make and verify data/UTKFace."""
    parser = argparse.ArgumentParser("python -m utils.download", description="Get UTKFace.")
    parser.add_argument("source", nargs="?", default=os.environ.get("UTKFACE_ARCHIVE"))
    parser.add_argument("--accept-licence", action="store_true")
    options = parser.parse_args(arguments)
    folder = get_settings("utkface").folder
    try:
        if options.source:
            make_once(folder, partial(unpack, locate(options.source)))
        elif not folder.exists():
            if not options.accept_licence and input(TERMS).strip().lower() != "yes":
                raise PermissionError("nothing is downloaded where the terms are not accepted")
            archive = fetch(URL, folder.with_name("UTKFace.tar.gz"), SHA256)
            make_once(folder, partial(unpack, archive))
            archive.unlink(missing_ok=True)
        print(f"{folder}: {check(folder) or 'the complete original'}. Delete it to make it anew.")
    except (OSError, ValueError, EOFError) as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
