"""Where the faces come from: UTKFace fetched, unpacked and verified, or the drawn sample.

`python -m utils.sources [ARCHIVE_OR_FOLDER] [--accept-licence]` (= `make data`) makes data/UTKFace.
"""

from __future__ import annotations

import argparse
import csv
import errno
import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import struct
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

import requests
from filelock import FileLock
from tqdm import tqdm

from utils.faces import Faces, prepare
from utils.labels import LABELS
from utils.settings import ROOT, Settings, get_settings, locate
from utils.synthetic import draw_sample

MIRRORS = (
    # The authors' own link, reported dead in 2024 and 2026; tried first in case it comes back.
    "https://drive.google.com/uc?export=download&confirm=t&id=0BxYys69jI14kYVM3aVhKS1VhRUk",
    "https://huggingface.co/datasets/py97/UTKFace-Cropped/resolve/"
    "e80f21fb21fa3631380c3cb634b79be3ac2f4cba/UTKFace.tar.gz",
)
ARCHIVE_SIZE = 106_634_631  # bytes
ARCHIVE_SHA256 = "2c0655397b498e81b82d685ee74bee8c2e4364a5897caf3afec6ea48929024a7"
# sha256 over the lines "sha256  name\n" of all files, sorted by name.
CONTENT_DIGEST = "f46941580dc85fe21beb0bae2faca4f7cf8317384a775df25e631c4c612ce01b"
MANIFEST = ROOT / "data" / "utkface_manifest.csv.gz"
LICENCE = """UTKFace (Zhang, Song and Qi, CVPR 2017, https://susanqq.github.io/UTKFace/):
  - for non-commercial research only;
  - the images belong to their owners;
  - no further distribution: do not publish or pass on the images."""

TRIES = 4  # for each mirror
BACKOFF = 1.0  # seconds before the second try, doubled before each later one
TIMEOUT = (10, 30)  # seconds to connect, and without a byte
# What a damaged archive makes the readers raise; OSError only with errno None or EINVAL.
_BROKEN = (EOFError, NotImplementedError, OSError, lzma.LZMAError, struct.error)
_BROKEN += (tarfile.TarError, zipfile.BadZipFile, zlib.error)
Opener = Callable[[], BinaryIO]


class Check(NamedTuple):
    """How a folder compares with the complete original UTKFace; the lists hold file names."""

    files: int
    digest: str
    missing: list[str]
    changed: list[str]
    extra: list[str]

    @property
    def complete(self) -> bool:
        return self.digest == CONTENT_DIGEST

    def __str__(self) -> str:
        if self.complete:
            return f"{self.files:,} files: the complete original UTKFace ({self.digest[:12]}...)"
        text = f"{self.files:,} files: not the complete original UTKFace\n"
        for field in ("missing", "changed", "extra"):
            names = getattr(self, field)
            shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
            text += f"  {field} {len(names):,}" + f": {shown}" * bool(names) + "\n"
        text += "Results will differ from the published ones. To repair the set, delete its folder "
        return text + "and run `make data` again."


class _Refused(requests.RequestException):
    """The mirror does not have the archive: another try is no use."""


def load_faces(settings: Settings) -> Faces:
    """The face table, the uint8 pixels [N, 128, 128, 3] and what was left out.

    Raises what `get_folder` and `utils.faces.prepare` raise.
    """
    return prepare(get_folder(settings), settings.cache)


def get_folder(settings: Settings) -> Path:
    """The folder of face images: drawn or unpacked where it is missing, never downloaded.

    Raises FileNotFoundError where UTKFace or labels.csv is not at hand, ValueError where
    UTKFACE_ARCHIVE is damaged or unsafe, and OSError where the folder cannot be written.
    """
    folder = settings.folder
    if settings.faces != "own" and _has_images(folder):
        return folder
    archive = os.environ.get("UTKFACE_ARCHIVE")
    if settings.faces == "own":
        if not (folder / LABELS).is_file():
            raise FileNotFoundError(
                f"{folder / LABELS} is not there: a CSV with the columns file and age, and if you "
                "have them gender, ethnicity and person (README, 'Your own faces')"
            )
    elif settings.faces == "sample":
        with _writing(folder):
            if not _has_images(folder):
                draw_sample(folder)
    elif archive:
        unpack(locate(archive), folder)
        report = check(folder)
        if not report.complete:
            print(report)
    else:
        raise FileNotFoundError(
            f"no face images in {folder}. Three ways out: `make data` (or `python -m utils.sources`"
            ") downloads UTKFace; UTKFACE_ARCHIVE=<file> names a UTKFace.tar.gz or the Kaggle zip; "
            "AGE_FACES=sample runs on drawn faces"
        )
    return folder


def check(folder: Path) -> Check:
    """Hash every file of a folder and compare with the manifest of the original UTKFace."""
    with os.scandir(folder) as entries:
        files = sorted((e for e in entries if not e.name.startswith(".")), key=lambda e: e.name)
    found = {e.name: file_sha256(e.path) for e in files if e.is_file()}
    lines = "".join(f"{sha256}  {name}\n" for name, sha256 in found.items())
    digest = hashlib.sha256(lines.encode()).hexdigest()
    with gzip.open(MANIFEST, "rt", encoding="utf-8", newline="") as text:
        original = {row["file"]: row["sha256_16"] for row in csv.DictReader(text)}
    return Check(
        len(found),
        digest,
        missing=[name for name in original if name not in found],
        changed=[n for n, start in original.items() if n in found and found[n][:16] != start],
        extra=[name for name in found if name not in original],
    )


def unpack(source: Path, folder: Path) -> str:
    """Make `folder` from an archive or another folder; returns a line that says what was taken.

    Of the source (tar in any compression, zip, or a folder, which stays as it is) only the .jpg
    files directly inside one UTKFace/ folder are taken, the outermost where there are several.
    They are written beside `folder` and moved there in one step, under a lock.

    Raises FileNotFoundError where the source is missing, ValueError where it is damaged, holds
    no UTKFace/ folder, or has a member that is a link, a device or outside the archive's own
    folder, and OSError where the disk is full or `folder` cannot be written.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist: name a UTKFace.tar.gz, zip or folder")
    partial_folder = folder.with_name(f".{folder.name}.partial")
    with _writing(folder), ExitStack() as stack:
        if _has_images(folder):
            return f"{folder} is there already"
        shutil.rmtree(partial_folder, ignore_errors=True)  # left by a run that was killed
        try:
            files, left_out = _pick(source, stack)
            _need_disk(folder, sum(-(-size // 4096) * 4096 for size, _ in files.values()))
            partial_folder.mkdir()
            for name, (_, opener) in tqdm(files.items(), "Unpacking", unit=" files", disable=None):
                with opener() as image, open(partial_folder / name, "wb") as out:
                    shutil.copyfileobj(image, out)
            if folder.is_dir():
                folder.rmdir()  # succeeds where it is empty
            partial_folder.replace(folder)
        except _BROKEN as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise
            reason = next(iter(str(error).splitlines()), "empty").rstrip(":")
            raise ValueError(
                f"{source} is damaged, cut off, or no tar or zip archive ({reason}): fetch it again"
                " (data/README.md says where), or unset UTKFACE_ARCHIVE and run `make data`"
            ) from error
        finally:
            shutil.rmtree(partial_folder, ignore_errors=True)
    return f"{len(files):,} images taken from {source.name}, {left_out:,} other files left out"


def download(
    target: Path,
    accept_licence: bool = False,
    mirrors: Sequence[str] = MIRRORS,
    size: int = ARCHIVE_SIZE,
    sha256: str = ARCHIVE_SHA256,
) -> Path:
    """Fetch the archive (`size` bytes) from the first mirror that has it, verified, to `target`.

    What arrived before an interruption stays in `target`.part, and the next call asks only for
    the rest. Raises PermissionError where the licence is not accepted, ConnectionError where no
    mirror serves the archive, and OSError where the disk is full or cannot be written.
    """
    part = target.with_name(f"{target.name}.part")
    with _writing(target):
        if target.is_file() and file_sha256(target) == sha256:
            return target
        _ask_licence(accept_licence)
        # Twice more for the images, which compress little and fill whole disk blocks.
        _need_disk(target, 3 * size - (part.stat().st_size if part.is_file() else 0))
        failures = []
        for url in mirrors:
            host = urlsplit(url).netloc
            print(f"Downloading {size / 1e6:,.1f} MB from {host}", flush=True)
            try:
                _fetch(url, part, size, sha256)
            except requests.RequestException as error:
                failures.append(f"{host}: {_reason(error)}")
                print(f"  given up: {_reason(error)}")
            else:
                part.replace(target)
                return target
    raise ConnectionError(
        f"UTKFace could not be downloaded ({'; '.join(failures)}). Run again later to go on where "
        "it stopped; or fetch the archive with a browser (data/README.md says where) and set "
        "UTKFACE_ARCHIVE to it"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Make and verify data/UTKFace; returns the exit code."""
    parser = argparse.ArgumentParser("python -m utils.sources", description="Get UTKFace.")
    parser.add_argument(
        "source",
        nargs="?",
        metavar="ARCHIVE_OR_FOLDER",
        help="UTKFace.tar.gz, the Kaggle zip or a folder; else UTKFACE_ARCHIVE; else a download",
    )
    parser.add_argument("--accept-licence", action="store_true", help="do not ask")
    options = parser.parse_args(arguments)
    source = options.source or os.environ.get("UTKFACE_ARCHIVE")
    folder = get_settings("utkface").folder
    try:
        # A folder that is there may lie on a read-only disk: no lock to verify it.
        with nullcontext() if _has_images(folder) else _writing(folder):
            if _has_images(folder):
                print(f"{folder} is there already and is only verified. Delete it to make it anew.")
            elif source:
                print(unpack(locate(source), folder))
            else:
                archive = download(folder.with_name("UTKFace.tar.gz"), options.accept_licence)
                print(unpack(archive, folder))
                archive.unlink()
        print(check(folder))
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, EOFError):
        print("\nInterrupted. Run again to go on.", file=sys.stderr)
        return 130
    return 0


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(_is_image(name) for name in os.listdir(folder))


def _is_image(name: str) -> bool:
    return name.lower().endswith(".jpg") and not name.startswith(".")


def file_sha256(path: str | Path) -> str:
    """sha256 of a file's bytes, as hex digits."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """One process at a time makes `path`; errors of the disk say what to do about them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # One lock object for a path and thread, so that a caller may hold the lock already.
        with FileLock(path.with_name(f".{path.name}.lock"), is_singleton=True):
            yield
    except OSError as error:
        if error.errno is None or error.__cause__:  # not of the disk, or explained already
            raise
        raise OSError(
            error.errno,
            f"cannot make {path} ({error.strerror}: {error.filename or path}). Free some space, "
            "move away what is in the way, or set AGE_DATA to a folder you may write to; then run "
            "again. No half-made folder was left",
        ) from error


def _need_disk(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        reason = f"disk too full, {needed / 1e6:,.0f} MB needed, {free / 1e6:,.0f} MB free"
        raise OSError(errno.ENOSPC, reason, str(path))


def _ask_licence(accepted: bool) -> None:
    print(LICENCE)
    if accepted:
        return
    if not sys.stdin or not sys.stdin.isatty():
        raise PermissionError("the licence must be accepted: add --accept-licence if you do")
    if input("Do you accept this licence? [yes/no] ").strip().lower() not in ("y", "yes"):
        raise PermissionError("the licence was not accepted: nothing was downloaded")


def _pick(source: Path, stack: ExitStack) -> tuple[dict[str, tuple[int, Opener]], int]:
    """File name -> (bytes, opener) of the images to take, and how many files are left out."""
    folders: dict[tuple[str, ...], dict] = {}
    count = 0
    for name, size, opener in _walk(source) if source.is_dir() else _members(source, stack):
        count += 1
        parts = PurePosixPath(name).parts
        if parts[-2:-1] == ("UTKFace",) and _is_image(parts[-1]):
            folders.setdefault(parts[:-1], {})[parts[-1]] = (size, opener)
    if not folders:
        raise ValueError(
            f"{source} holds no UTKFace/ folder with .jpg files: give the aligned and cropped set "
            "(UTKFace.tar.gz or the Kaggle zip), or a folder with its .jpg files"
        )
    files = folders[min(folders, key=lambda parts: (len(parts), parts))]
    return files, count - len(files)


def _walk(source: Path) -> Iterator[tuple[str, int, Opener]]:
    """Name, bytes and opener of the files of a folder that is the set, or holds UTKFace/."""
    for path in sorted((source if _has_images(source) else source / "UTKFace").glob("*")):
        if path.is_file():
            yield f"UTKFace/{path.name}", path.stat().st_size, partial(open, path, "rb")


def _members(archive: Path, stack: ExitStack) -> Iterator[tuple[str, int, Opener]]:
    """Name, bytes and opener of each file; the archive stays open as long as the stack."""
    if zipfile.is_zipfile(archive):
        packed = stack.enter_context(zipfile.ZipFile(archive))
        for info in packed.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            _refuse_unsafe(archive, info.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
            if info.flag_bits & 1:
                raise zipfile.BadZipFile("it is encrypted")
            if not info.is_dir():
                yield info.filename, info.file_size, partial(packed.open, info)
        return
    packed = stack.enter_context(tarfile.open(archive))
    for info in packed:
        _refuse_unsafe(archive, info.name, info.isreg() or info.isdir())
        if info.isreg():
            yield info.name, info.size, partial(packed.extractfile, info)
    # tarfile takes a cut or a damaged header for the end: look for the end mark, then read on
    # to the end, where gzip compares its checksum.
    packed.fileobj.seek(packed.offset)
    if packed.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError("no end mark")
    while packed.fileobj.read(1 << 20):
        pass


def _refuse_unsafe(archive: Path, name: str, plain: bool) -> None:
    """Only bare file names are ever written; an archive made to harm is refused as a whole."""
    if plain and not name.startswith("/") and not re.search(r"(^|/)\.\.(/|$)|[:\\]", name):
        return
    reason = "has an unsafe path" if plain else "is a link or a device"
    raise ValueError(
        f"{archive} is refused, nothing was unpacked: its member {name!r} {reason}. Fetch the "
        "original archive (data/README.md says where)"
    )


def _reason(error: requests.RequestException) -> str:
    """The last part of the nested messages of requests and urllib3."""
    return str(error).rpartition(": ")[2].split(" ([")[0].rstrip("')\"")


def _fetch(url: str, part: Path, size: int, sha256: str) -> None:
    """Fill `part` from one mirror, trying again after passing faults, and verify it."""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(BACKOFF * 2 ** (attempt - 1))
        try:
            resumed = _receive(url, part, size)
        except _Refused:
            raise
        except requests.RequestException as error:
            failure = error
            print(f"  interrupted: {_reason(error)}")
            continue
        if file_sha256(part) == sha256:
            return
        part.unlink()
        failure = _Refused("the archive differs from the original (sha256)")
        if not resumed:  # else what was there before may be at fault
            raise failure
    raise failure


def _receive(url: str, part: Path, size: int) -> bool:
    """Ask for what `part` lacks and append it; True where bytes of an earlier try were kept."""
    have = part.stat().st_size if part.is_file() else 0
    if have == size:
        return True
    have = have if have < size else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        status = response.status_code
        start = response.headers.get("Content-Range", "").removeprefix("bytes ").split("-")[0]
        if status == 416 or (status == 206 and start != str(have)):
            part.unlink(missing_ok=True)
            raise requests.ConnectionError("the server cannot resume")
        if status in (408, 429) or status >= 500:
            raise requests.ConnectionError(f"HTTP status {status}")
        if status not in (200, 206):
            raise _Refused(f"HTTP status {status}")
        if "html" in response.headers.get("Content-Type", ""):
            raise _Refused("a web page came instead of the archive")
        have = have if status == 206 else 0  # 200: the server sends all, asked or not
        length = response.raw.length_remaining  # None where the server does not tell
        if length is not None and have + length != size:
            raise _Refused(f"the archive has {have + length:,} bytes instead of {size:,}")
        resumed = have > 0
        with (
            open(part, "ab" if resumed else "wb") as out,
            tqdm(total=size, initial=have, unit="B", unit_scale=True, disable=None) as bar,
        ):
            for chunk in response.iter_content(1 << 16):
                if not have and not chunk.startswith(b"\x1f\x8b"):
                    raise _Refused("what came is not a gzip file")
                have += len(chunk)
                if have > size:
                    raise _Refused(f"more than {size:,} bytes came")
                out.write(chunk)
                bar.update(len(chunk))
    if have < size:
        raise requests.ConnectionError(f"the connection ended after {have:,} of {size:,} bytes")
    return resumed


if __name__ == "__main__":
    sys.exit(main())
