"""UTKFace from hostile mirrors and archives; a local server stands in for the mirrors."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import random
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils import sources
from utils.settings import ROOT, get_settings

REAL_ARCHIVE = os.environ.get("UTKFACE_ARCHIVE")
IMAGES = {
    f"{20 + i}_0_1_2017011{i}.jpg.chip.jpg": random.Random(i).randbytes(60_000 + i)
    for i in range(6)
}


def make_tar(path: Path, members: dict[str, bytes], *special: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in special:
            archive.addfile(info)
    return path


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def in_utkface(files: dict[str, bytes], folder: str = "UTKFace") -> dict[str, bytes]:
    return {f"{folder}/{name}": data for name, data in files.items()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def everything(folder: Path) -> set[Path]:
    """All that lies under a folder, lock files apart."""
    return {path for path in folder.rglob("*") if path.suffix != ".lock"}


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch) -> Path:
    """The data folder of this test: its name holds a space and letters beyond ASCII."""
    data = tmp_path / "Gesichter für 年齢"
    monkeypatch.setenv("AGE_DATA", str(data))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("UTKFACE_ARCHIVE", raising=False)
    monkeypatch.delenv("AGE_FACES", raising=False)
    monkeypatch.setattr(sources, "BACKOFF", 0.001)
    monkeypatch.setattr(sources, "TIMEOUT", (2, 0.3))
    return data


@pytest.fixture
def folder(data) -> Path:
    return get_settings("utkface").folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return make_tar(tmp_path_factory.mktemp("archive") / "UTKFace.tar.gz", in_utkface(IMAGES))


# --- archives and folders -----------------------------------------------------------------------


def test_tar_zip_and_folder_give_the_same_images(archive, folder, tmp_path):
    zipped = make_zip(tmp_path / "archive.zip", in_utkface(IMAGES))
    bare, parent = tmp_path / "own images", tmp_path / "unzipped"
    for place in (bare, parent / "UTKFace"):
        place.mkdir(parents=True)
        for name, image in IMAGES.items():
            (place / name).write_bytes(image)
    (bare / "notes.txt").write_text("not an image")
    for source, left_out in ((archive, 0), (zipped, 0), (bare, 1), (parent, 0)):
        before = everything(bare) | everything(parent)
        line = sources.unpack(source, folder)
        assert line == f"6 images taken from {source.name}, {left_out} other files left out"
        assert content(folder) == IMAGES
        assert everything(bare) | everything(parent) == before
        assert everything(folder.parent) == {folder, *folder.iterdir()}
        shutil.rmtree(folder)


def test_kaggle_zip_gives_one_of_its_copies(folder, tmp_path):
    other = {"1_0_0_20170101.jpg": b"other"}
    members = {
        **in_utkface(other, "utkface_aligned_cropped/UTKFace"),
        **in_utkface(other, "utkface_aligned_cropped/crop_part1"),
        **in_utkface(other, "crop_part1"),
        **in_utkface(IMAGES),
        "UTKFace/._20_0_1_2017.jpg": b"resource fork",
        "UTKFace/readme.txt": b"text",
        "UTKFace/deeper/99_0_0_2017.jpg": b"deeper",
    }
    line = sources.unpack(make_zip(tmp_path / "archive.zip", members), folder)
    assert content(folder) == IMAGES
    assert line == "6 images taken from archive.zip, 6 other files left out"


@pytest.mark.parametrize(
    "name",
    [
        "../evil.jpg",
        "UTKFace/../../evil.jpg",
        "/tmp/evil.jpg",
        "C:/evil.jpg",
        "UTKFace/..\\evil.jpg",
    ],
)
@pytest.mark.parametrize("make", [make_tar, make_zip])
@pytest.mark.fault(
    "an archive that would write elsewhere", "refused: no link, device or outward path is followed"
)
def test_paths_that_leave_the_folder_are_refused(make, name, folder, tmp_path):
    bad = make(tmp_path / "bad", in_utkface(IMAGES) | {name: b"evil"})
    folder.parent.mkdir()
    before = everything(tmp_path)
    with pytest.raises(ValueError, match="bad is refused.*evil.jpg.*unsafe path"):
        sources.unpack(bad, folder)
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
@pytest.mark.fault("an archive that would write elsewhere")
def test_links_and_devices_in_a_tar_are_refused(kind, folder, tmp_path):
    info = tarfile.TarInfo("UTKFace/9_0_0_2017.jpg")
    info.type, info.linkname = kind, next(iter(in_utkface(IMAGES)))
    bad = make_tar(tmp_path / "bad.tar.gz", in_utkface(IMAGES), info)
    with pytest.raises(ValueError, match="bad.tar.gz is refused.*9_0_0_2017.jpg.*link or a device"):
        sources.unpack(bad, folder)
    assert not everything(folder.parent)


@pytest.mark.fault("an archive that would write elsewhere")
def test_links_in_a_zip_are_refused(folder, tmp_path):
    info = zipfile.ZipInfo("UTKFace/9_0_0_2017.jpg")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    bad = make_zip(tmp_path / "bad.zip", in_utkface(IMAGES) | {info: b"/etc/passwd"})
    with pytest.raises(ValueError, match="9_0_0_2017.jpg.*link or a device"):
        sources.unpack(bad, folder)
    assert not everything(folder.parent)


@pytest.mark.parametrize("kind", ["tar.gz", "tar", "zip"])
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.7, 0.99, 0.999999])
@pytest.mark.fault(
    "an archive cut off at any byte",
    "refused by name, with where to fetch it again; no folder is made",
)
def test_cut_archives_are_refused(kind, share, archive, folder, tmp_path):
    whole = {
        "tar.gz": archive.read_bytes,
        "tar": lambda: gzip.decompress(archive.read_bytes()).rstrip(bytes(1)),  # no padding
        "zip": make_zip(tmp_path / "whole.zip", in_utkface(IMAGES)).read_bytes,
    }[kind]()
    cut = tmp_path / f"cut.{kind}"
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=f"cut.{kind} is damaged, cut off.*make data"):
        sources.unpack(cut, folder)
    assert not everything(folder.parent)


@pytest.mark.parametrize("kind", ["tar.gz", "tar", "zip"])
@pytest.mark.fault("an archive cut off at any byte")
def test_a_small_archive_cut_at_every_byte_is_refused(kind, folder, tmp_path):
    small = {f"UTKFace/{i}_0_0_2017.jpg": bytes([i]) * 600 for i in (1, 2)}
    whole = {
        "tar.gz": make_tar(tmp_path / "small.tar.gz", small).read_bytes(),
        "tar": gzip.decompress(make_tar(tmp_path / "small.tar.gz", small).read_bytes()),
        "zip": make_zip(tmp_path / "small.zip", small).read_bytes(),
    }[kind]
    end = len(whole)
    if kind == "tar":  # filled up with zeros: it is whole from the second block of zeros on
        end = len(whole.rstrip(b"\0")) // 512 * 512 + 2 * 512
        cuts = {*range(0, end, 37), *(b + d for b in range(0, end, 512) for d in (-1, 0, 1))}
    else:
        cuts = set(range(end))
    cut = tmp_path / f"cut.{kind}"
    for length in sorted(cut for cut in cuts if 0 <= cut < end):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"cut.{kind} is damaged, cut off"):
            sources.unpack(cut, folder)
            pytest.fail(f"{length} of {len(whole)} bytes were taken for whole")
    assert not everything(folder.parent)
    cut.write_bytes(whole)
    sources.unpack(cut, folder)
    assert content(folder) == {Path(name).name: data for name, data in small.items()}


@pytest.mark.fault("an archive cut off at any byte")
def test_a_tar_that_ends_between_two_members_is_refused(archive, folder, tmp_path):
    data = gzip.decompress(archive.read_bytes())
    cut = tmp_path / "cut.tar"
    cut.write_bytes(data[: 512 + -(-60_000 // 512) * 512])  # the first header and image, whole
    with pytest.raises(ValueError, match="cut.tar is damaged, cut off.*no end mark"):
        sources.unpack(cut, folder)
    assert not everything(folder.parent)


@pytest.mark.fault("an archive damaged inside, or locked")
def test_an_encrypted_zip_is_refused(folder, tmp_path):
    path = make_zip(tmp_path / "secret.zip", in_utkface(IMAGES))
    packed = bytearray(path.read_bytes())
    packed[packed.index(b"PK\1\2") + 8] |= 1  # the flag in the central directory
    path.write_bytes(packed)
    with pytest.raises(ValueError, match="secret.zip.*encrypted"):
        sources.unpack(path, folder)


@pytest.mark.fault("an archive damaged inside, or locked", "refused by name; no folder is made")
def test_damage_inside_an_archive_is_noticed(archive, folder, tmp_path):
    damaged = bytearray(archive.read_bytes())
    damaged[len(damaged) // 2] ^= 0xFF
    bad = tmp_path / "bad.tar.gz"
    bad.write_bytes(damaged)
    with pytest.raises(ValueError, match="bad.tar.gz is damaged"):
        sources.unpack(bad, folder)
    assert not everything(folder.parent)


def test_sources_without_the_set_are_refused(folder, tmp_path):
    part1 = make_zip(tmp_path / "part1.zip", in_utkface(IMAGES, "crop_part1"))
    (tmp_path / "empty").mkdir()
    for source in (part1, tmp_path / "empty"):
        with pytest.raises(ValueError, match=f"{source.name} holds no UTKFace/ folder"):
            sources.unpack(source, folder)
    with pytest.raises(FileNotFoundError, match=r"absent.zip does not exist"):
        sources.unpack(tmp_path / "absent.zip", folder)
    assert not everything(folder.parent)


# --- the disk -----------------------------------------------------------------------------------


@pytest.mark.fault(
    "disk full while fetching or unpacking",
    "told before it starts where it can be known, with the MB needed; nothing half-made stays",
)
def test_too_little_disk_is_told_before_unpacking(archive, folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="disk too full, 0 MB needed.*AGE_DATA") as caught:
        sources.unpack(archive, folder)
    assert caught.value.errno == errno.ENOSPC
    assert not everything(folder.parent)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
@pytest.mark.fault("disk full while fetching or unpacking")
def test_a_failing_disk_leaves_nothing(code, archive, folder, monkeypatch):
    copy, copied = shutil.copyfileobj, []

    def fail_at_third(image, out):
        copy(image, out)
        copied.append(out.name)
        if len(copied) == 3:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(shutil, "copyfileobj", fail_at_third)
    with pytest.raises(OSError, match="cannot make .*AGE_DATA.*No half-made folder") as caught:
        sources.unpack(archive, folder)
    assert caught.value.errno == code and len(copied) == 3
    assert not everything(folder.parent)


@pytest.mark.fault("read-only data folder")
def test_things_in_the_way_are_named(archive, folder, data):
    data.write_text("a file where the data folder should be")
    with pytest.raises(OSError, match="cannot make .*move away what is in the way"):
        sources.unpack(archive, folder)
    data.unlink()
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="cannot make .*UTKFace.*move away what is in the way"):
        sources.unpack(archive, folder)
    assert content(folder) == {"notes.txt": b"mine"}
    (folder / "notes.txt").unlink()  # an empty folder is not in the way
    sources.unpack(archive, folder)
    assert content(folder) == IMAGES


@pytest.mark.fault(
    "read-only data folder",
    "what is there is read; what must be written says where, and that AGE_DATA moves it",
)
def test_a_folder_that_is_there_is_read_from_a_read_only_disk(
    archive, folder, original, monkeypatch, capsys
):
    sources.unpack(archive, folder)

    def fail(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(sources, "FileLock", fail)
    monkeypatch.setattr(Path, "mkdir", fail)
    assert sources.get_folder(get_settings("utkface")) == folder
    assert sources.main([]) == 0
    assert "6 files: the complete original" in capsys.readouterr().out
    assert sources.main([str(archive)]) == 0  # not needed, and that is told
    assert "is there already" in capsys.readouterr().out


# --- several processes --------------------------------------------------------------------------

# The big imports are left out; each copied image is announced and takes 50 ms.
SLOW_UNPACK = """
import shutil, sys, time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock
sys.modules.update({"utils.faces": MagicMock(), "utils.synthetic": MagicMock()})
from utils import sources
copy = shutil.copyfileobj
def slow(image, out):
    copy(image, out)
    print("copied", flush=True)
    time.sleep(0.05)
shutil.copyfileobj = slow
print(sources.unpack(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def start_unpack(archive: Path, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-X", "utf8", "-c", SLOW_UNPACK, str(archive), str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8")


@pytest.mark.fault(
    "killed while unpacking", "nothing half-made is taken for whole; the next run starts over"
)
def test_a_killed_run_leaves_nothing_taken_for_whole(archive, folder):
    process = start_unpack(archive, folder)
    assert process.stdout.readline() == process.stdout.readline() == "copied\n"
    process.kill()
    process.communicate()
    assert len(everything(folder.parent)) > 1  # it was in the middle
    assert not folder.exists()
    with pytest.raises(FileNotFoundError):
        sources.get_folder(get_settings("utkface"))
    sources.unpack(archive, folder)
    assert content(folder) == IMAGES
    assert everything(folder.parent) == {folder, *folder.iterdir()}


@pytest.mark.fault(
    "two notebooks that prepare the data at once",
    "the second waits and takes the work of the first",
)
def test_two_processes_at_once_unpack_once(archive, folder):
    output = [p.communicate()[0] for p in [start_unpack(archive, folder) for _ in range(2)]]
    assert sorted(text.count("copied") for text in output) == [0, 6]
    assert sum("is there already" in text for text in output) == 1
    assert content(folder) == IMAGES


# --- downloads ----------------------------------------------------------------------------------


class Mirror(ThreadingHTTPServer):
    """Serves `data`; each request follows the next step of `plan`, later ones are served well."""

    daemon_threads = True

    def __init__(self, data: bytes, *plan: str | int) -> None:
        super().__init__(("127.0.0.1", 0), MirrorHandler)
        self.data, self.plan = data, list(plan)
        self.ranges: list[str | None] = []
        self.sent: list[int] = []
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/UTKFace.tar.gz"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is part of the tests."""

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class MirrorHandler(BaseHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        mirror = self.server
        step = mirror.plan.pop(0) if mirror.plan else "serve"
        asked = self.headers["Range"]
        mirror.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        body, status, kind = mirror.data, 200, "application/gzip"
        if isinstance(step, int):
            body, status = b"sorry", step
        elif step in ("html", "html in disguise"):
            body = b"<html>Quota exceeded</html>" * 100
            kind = "text/html; charset=utf-8" if step == "html" else kind
        elif step == "lie":
            body = body[:100] + bytes(len(body) - 100)
        elif step == "shorter":
            body = body[:-1000]
        elif step == "endless":
            body += bytes(500_000)
        elif asked and step != "ignore range":
            start += 10 * (step == "shift")
            body, status = body[start:], 206
        self.send_response(status)
        if step not in ("endless", "cut", "html in disguise"):
            self.send_header("Content-Length", str(len(body)))
        if status == 206:
            total = len(mirror.data)
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        self.send_header("Content-Type", kind)
        self.end_headers()
        if step in ("drop", "stall", "cut"):
            body = body[: len(body) // 2]
        self.wfile.write(body)
        mirror.sent.append(len(body))
        if step == "stall":
            mirror.closing.wait(20)


@pytest.fixture
def mirrors(archive):
    """A function that starts a mirror of the archive, following a plan."""
    started: list[Mirror] = []

    def start(*plan: str | int) -> Mirror:
        started.append(Mirror(archive.read_bytes(), *plan))
        return started[-1]

    yield start
    for mirror in started:
        mirror.close()


@pytest.fixture
def fetch(archive, data):
    """`download` of the archive of these tests from the mirrors given."""
    whole = archive.read_bytes()

    def run(*servers: Mirror, target: Path = data / "UTKFace.tar.gz", **options) -> Path:
        return sources.download(
            target,
            mirrors=[server.url for server in servers],
            size=len(whole),
            sha256=hashlib.sha256(whole).hexdigest(),
            **{"accept_licence": True, **options},
        )

    return run


@pytest.mark.parametrize(
    ("plan", "requests"),
    [
        ([], 1),
        ([500, 503, 429], 4),
        (["drop"], 2),
        (["cut"], 2),
        (["drop", "drop", "drop"], 4),
        (["stall"], 2),
        (["drop", "ignore range"], 2),
        (["drop", 416], 3),
        (["drop", "shift"], 3),
        (["drop", "lie"], 2),
    ],
)
@pytest.mark.fault(
    "a download that breaks off or stalls",
    "tried again after a pause, from the byte where it stopped; the result is verified",
)
def test_passing_faults_are_survived(plan, requests, mirrors, fetch, archive):
    if "lie" in plan:  # a mirror that lies to the end; the next one is honest
        servers = [mirrors("drop", "lie"), mirrors()]
    else:
        servers = [mirrors(*plan)]
    started = time.perf_counter()
    target = fetch(*servers)
    assert time.perf_counter() - started < 5  # a stalled mirror holds on for longer
    assert target.read_bytes() == archive.read_bytes()
    assert len(servers[0].ranges) == requests
    assert [path.name for path in everything(target.parent)] == ["UTKFace.tar.gz"]


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (404, "HTTP status 404"),
        (403, "HTTP status 403"),
        ("html", "a web page came"),
        ("html in disguise", "not a gzip file"),
        ("shorter", "bytes instead of"),
        ("endless", "more than"),
        ("lie", "differs from the original"),
    ],
)
@pytest.mark.fault(
    "a mirror that sends something else", "the next mirror is asked; nothing unverified is unpacked"
)
def test_a_mirror_without_the_archive_is_left_at_once(
    step, reason, mirrors, fetch, archive, capsys
):
    bad, good = mirrors(*[step] * 9), mirrors()
    assert fetch(bad, good).read_bytes() == archive.read_bytes()
    assert len(bad.ranges) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "given up" in line]
    assert reason in line


@pytest.mark.fault(
    "no network",
    "says what failed and how to go on without: another time, a file by hand, the drawn sample",
)
def test_no_mirror_left(mirrors, fetch, data):
    dead = mirrors()
    dead.close()
    with pytest.raises(ConnectionError) as caught:
        fetch(mirrors(404), mirrors("html"), mirrors(*[500] * sources.TRIES), dead)
    message = str(caught.value)
    for part in ("status 404", "web page", "status 500", "refused", "UTKFACE_ARCHIVE", "README"):
        assert part in message
    assert message.count("127.0.0.1") == 4 and "\n" not in message
    assert not (data / "UTKFace.tar.gz").exists()


@pytest.mark.fault("a download that breaks off or stalls")
def test_a_later_run_fetches_only_the_rest(mirrors, fetch, archive, data, monkeypatch):
    size, part = archive.stat().st_size, data / "UTKFace.tar.gz.part"
    monkeypatch.setattr(sources, "TRIES", 1)
    with pytest.raises(ConnectionError, match="IncompleteRead|ended after"):
        fetch(mirrors("drop"))
    have = part.stat().st_size
    assert 0 < have <= size // 2
    mirror = mirrors()
    assert fetch(mirror).read_bytes() == archive.read_bytes()
    assert mirror.ranges == [f"bytes={have}-"]
    assert mirror.sent == [size - have]
    assert not part.exists()
    fetch(mirror)  # the verified archive is there: nothing is asked for
    assert len(mirror.ranges) == 1


@pytest.mark.fault("killed while downloading", "the next run asks for the rest only")
def test_killed_while_downloading_then_resumed(mirrors, fetch, archive, data):
    whole, part, stalled = archive.read_bytes(), data / "UTKFace.tar.gz.part", mirrors("stall")
    code = (
        "import sys; from pathlib import Path; from unittest.mock import MagicMock\n"
        "sys.modules.update({'utils.faces': MagicMock(), 'utils.synthetic': MagicMock()})\n"
        "from utils import sources\n"
        "sources.download(Path(sys.argv[1]), True, [sys.argv[2]], int(sys.argv[3]), 'x' * 64)"
    )
    words = [str(part.with_suffix("")), stalled.url, str(len(whole))]
    process = subprocess.Popen(
        [sys.executable, "-X", "utf8", "-c", code, *words], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    have = part.stat().st_size
    assert 0 < have < len(whole) and not part.with_suffix("").exists()
    mirror = mirrors()
    assert fetch(mirror).read_bytes() == whole
    assert mirror.ranges == [f"bytes={have}-"]


@pytest.mark.parametrize("left", [b"\x1f\x8brubbish", bytes(10_000_000)])
@pytest.mark.fault("a download that breaks off or stalls")
def test_a_wrong_left_over_is_thrown_away(left, mirrors, fetch, archive, data):
    data.mkdir()
    (data / "UTKFace.tar.gz.part").write_bytes(left)
    mirror = mirrors()
    assert fetch(mirror).read_bytes() == archive.read_bytes()
    assert mirror.ranges[-1] is None


def test_a_whole_left_over_is_verified_not_fetched(mirrors, fetch, archive, data):
    data.mkdir()
    shutil.copy(archive, data / "UTKFace.tar.gz.part")
    mirror = mirrors()
    assert fetch(mirror).read_bytes() == archive.read_bytes()
    assert mirror.ranges == []


def test_a_damaged_archive_of_an_earlier_run_is_fetched_again(mirrors, fetch, archive, data):
    data.mkdir()
    (data / "UTKFace.tar.gz").write_bytes(b"damaged")
    assert fetch(mirrors()).read_bytes() == archive.read_bytes()


@pytest.mark.fault("disk full while fetching or unpacking")
def test_too_little_disk_is_told_before_downloading(mirrors, fetch, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    mirror = mirrors()
    with pytest.raises(OSError, match="disk too full"):
        fetch(mirror)
    assert mirror.ranges == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_the_licence_nothing_is_asked_for(mirrors, fetch, monkeypatch, capsys):
    mirror = mirrors()
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))  # no terminal
    with pytest.raises(PermissionError, match="--accept-licence"):
        fetch(mirror, accept_licence=False)
    monkeypatch.setattr(sys, "stdin", Terminal("no\n"))
    with pytest.raises(PermissionError, match="not accepted"):
        fetch(mirror, accept_licence=False)
    assert mirror.ranges == []
    assert capsys.readouterr().out.count("non-commercial research only") == 2
    monkeypatch.setattr(sys, "stdin", Terminal("yes\n"))
    assert fetch(mirror, accept_licence=False).is_file()


# --- verification -------------------------------------------------------------------------------


@pytest.fixture
def original(monkeypatch, tmp_path) -> None:
    """Take the six images of these tests for the complete original."""
    hashes = {name: hashlib.sha256(image).hexdigest() for name, image in sorted(IMAGES.items())}
    lines = "".join(f"{value}  {name}\n" for name, value in hashes.items())
    monkeypatch.setattr(sources, "CONTENT_DIGEST", hashlib.sha256(lines.encode()).hexdigest())
    rows = "".join(f"{name},{value[:16]}\n" for name, value in hashes.items())
    manifest = tmp_path / "manifest.csv.gz"
    manifest.write_bytes(gzip.compress(f"file,sha256_16\n{rows}".encode()))
    monkeypatch.setattr(sources, "MANIFEST", manifest)


def test_check_counts_what_differs(archive, folder, original):
    sources.unpack(archive, folder)
    (folder / ".DS_Store").write_bytes(b"left aside")
    assert sources.check(folder).complete
    assert "6 files: the complete original" in str(sources.check(folder))
    first, second, *rest = sorted(IMAGES)
    (folder / first).unlink()
    (folder / second).write_bytes(b"changed")
    (folder / "99_1_1_2017.jpg").write_bytes(b"extra")
    report = sources.check(folder)
    assert not report.complete
    assert report[0] == 6
    assert report[2:] == ([first], [second], ["99_1_1_2017.jpg"])
    assert f"missing 1: {first}\n  changed 1: {second}\n  extra 1: 99_1" in str(report)
    for name in rest:
        (folder / name).unlink()
    assert f"missing 5: {first}, {rest[0]}, {rest[1]}, ...\n" in str(sources.check(folder))


def test_manifest_is_small_and_well_formed():
    packed = sources.MANIFEST.read_bytes()
    assert len(packed) < 700_000
    assert packed[4:8] == bytes(4)  # no time of making: the same bytes whenever it is made
    header, *rows = gzip.decompress(packed).decode().splitlines()
    assert header == "file,sha256_16"
    names, hashes = zip(*(row.split(",") for row in rows), strict=True)
    assert len(set(names)) == 23_708 and list(names) == sorted(names)
    assert all(len(value) == 16 and int(value, 16) >= 0 for value in hashes)


@pytest.mark.skipif(not REAL_ARCHIVE, reason="UTKFACE_ARCHIVE is not set")
def test_the_real_archive_is_the_complete_original(folder, monkeypatch, capsys):
    monkeypatch.setenv("UTKFACE_ARCHIVE", str(Path(REAL_ARCHIVE).expanduser().resolve()))
    assert sources.main([]) == 0
    assert "23,708 files: the complete original UTKFace" in capsys.readouterr().out
    started = time.perf_counter()
    report = sources.check(folder)
    assert time.perf_counter() - started < 10
    assert report == (23_708, sources.CONTENT_DIGEST, [], [], [])
    shutil.rmtree(folder)  # pytest would keep the faces


# --- what notebooks and the command line call ---------------------------------------------------


@pytest.mark.fault("no data", "names the three ways to get faces")
def test_get_folder_for_utkface(archive, folder, original, monkeypatch, capsys):
    settings = get_settings("utkface")
    with pytest.raises(FileNotFoundError) as caught:
        sources.get_folder(settings)
    for way_out in ("make data", "UTKFACE_ARCHIVE", "AGE_FACES=sample"):
        assert way_out in str(caught.value)
    monkeypatch.setenv("UTKFACE_ARCHIVE", str(archive.with_name("absent.tar.gz")))
    with pytest.raises(FileNotFoundError, match=r"absent.tar.gz does not exist"):
        sources.get_folder(settings)
    monkeypatch.setenv("UTKFACE_ARCHIVE", str(archive))
    assert sources.get_folder(settings) == folder
    assert content(folder) == IMAGES
    monkeypatch.delenv("UTKFACE_ARCHIVE")
    assert sources.get_folder(settings) == folder
    assert capsys.readouterr().out == ""  # complete: no word


def test_get_folder_tells_of_an_incomplete_set(archive, monkeypatch, capsys):
    monkeypatch.setenv("UTKFACE_ARCHIVE", str(archive))
    sources.get_folder(get_settings("utkface"))
    assert "6 files: not the complete original" in capsys.readouterr().out


def test_a_relative_archive_is_found_from_a_notebook(archive, folder, monkeypatch, tmp_path):
    monkeypatch.setattr("utils.settings.ROOT", archive.parent)
    monkeypatch.setenv("UTKFACE_ARCHIVE", archive.name)
    monkeypatch.chdir(tmp_path)
    assert sources.get_folder(get_settings("utkface")) == folder


@pytest.mark.fault("two notebooks that prepare the data at once")
def test_the_sample_is_drawn_once_and_prepared(monkeypatch):
    settings, calls = get_settings("sample"), []

    def draw(folder: Path) -> None:
        calls.append(folder)
        time.sleep(0.2)
        folder.mkdir()
        (folder / "26_0_1_2017.jpg").write_bytes(b"drawn")

    monkeypatch.setattr(sources, "draw_sample", draw)
    monkeypatch.setattr(sources, "prepare", lambda *arguments: arguments)
    with ThreadPoolExecutor(2) as pool:  # at once, as two notebooks might
        for faces in pool.map(sources.load_faces, [settings] * 2):
            assert faces == (settings.folder, settings.cache)
    sources.load_faces(settings)
    assert calls == [settings.folder]


def test_command_line_downloads_verifies_and_tidies_up(
    mirrors, archive, folder, original, monkeypatch, capsys
):
    whole, mirror = archive.read_bytes(), mirrors("drop")
    known = {"size": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    download = partial(sources.download, mirrors=[mirror.url], **known)
    monkeypatch.setattr(sources, "download", download)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert sources.main([]) == 1
    assert capsys.readouterr().err.startswith("Error: the licence must be accepted")
    assert sources.main(["--accept-licence"]) == 0
    assert "6 files: the complete original UTKFace" in capsys.readouterr().out
    assert content(folder) == IMAGES
    assert everything(folder.parent) == {folder, *folder.iterdir()}
    assert sources.main([]) == 0  # verified only: no licence, no download
    assert "is there already" in capsys.readouterr().out
    assert len(mirror.ranges) == 2


def test_command_line_takes_an_archive_or_tells_in_one_line(
    archive, folder, data, original, monkeypatch, capsys
):
    assert sources.main([str(archive.with_name("absent.zip"))]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and "absent.zip" in error and error.count("\n") == 1
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("in the way")
    assert sources.main([str(archive)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == error.count("cannot make") == 1
    shutil.rmtree(data)
    assert sources.main([str(archive)]) == 0
    assert content(folder) == IMAGES
    shutil.rmtree(data)
    monkeypatch.setenv("UTKFACE_ARCHIVE", str(archive))
    assert sources.main([]) == 0
    assert content(folder) == IMAGES
