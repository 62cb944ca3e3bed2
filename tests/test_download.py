"""UTKFace from hostile archives, servers and disks; a local server plays the mirror."""

import errno
import gzip
import hashlib
import io
import os
import random
import subprocess
import sys
import tarfile
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from utils import download
from utils.download import check, fetch, make_once, unpack
from utils.settings import ROOT, get_settings

IMAGES = {f"{20 + i}_0_1_2017011{i}.jpg": random.Random(i).randbytes(6000 + i) for i in range(6)}
IN_UTKFACE = {f"UTKFace/{name}": data for name, data in IMAGES.items()}


def pack(path: Path, members: dict, *special: tarfile.TarInfo) -> Path:
    """A zip, a tar or a tar.gz, as its name tells."""
    zipped, mode = path.suffix == ".zip", "w:gz" if path.suffix == ".gz" else "w"
    with zipfile.ZipFile(path, "w") if zipped else tarfile.open(path, mode) as archive:
        for name, data in members.items():
            if zipped:
                archive.writestr(name, data)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        for info in () if zipped else special:
            archive.addfile(info)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.name != ".lock")


def refused(source: Path, folder: Path, reason: str = "") -> None:
    """By name, with the way out; and no folder is made."""
    with pytest.raises(ValueError, match=f"(?s){source.name} lacks .*{reason}.*make data"):
        make_once(folder, partial(unpack, source))
    assert names(folder.parent) == []


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """In a folder with a space and letters beyond ASCII; six images are the complete original."""
    monkeypatch.setenv("AGE_DATA", str(tmp_path / "Gesichter für 年齢"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("UTKFACE_ARCHIVE", raising=False)
    rows = (f"{name},{hashlib.sha256(image).hexdigest()[:16]}\n" for name, image in IMAGES.items())
    manifest = gzip.compress(f"file,sha256_16\n{''.join(rows)}".encode())
    (tmp_path / "manifest.csv.gz").write_bytes(manifest)
    monkeypatch.setattr(download, "MANIFEST", tmp_path / "manifest.csv.gz")
    return get_settings("utkface").folder


@pytest.fixture
def archive(tmp_path) -> Path:
    return pack(tmp_path / "UTKFace.tar.gz", IN_UTKFACE)


@pytest.mark.parametrize("kind", ["tar.gz", "tar", "zip"])
def test_the_original_is_taken_from_any_archive_and_nothing_else(kind, folder, tmp_path):
    """Kaggle's zip holds other images too. Nothing is written outside, or by a link."""
    inner = "utkface_aligned_cropped/UTKFace/"
    others = [f"{inner}20_0_1_20170110.jpg", "crop_part1/2_0_0_2017.jpg", "UTKFace/notes.txt"]
    others += ["../evil.jpg", "UTKFace/../../evil.jpg", "/tmp/evil.jpg", "C:/evil.jpg"]
    members, links = dict.fromkeys(others, b"evil") | IN_UTKFACE, []
    for special in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        links.append(tarfile.TarInfo("UTKFace/20_0_1_20170110.jpg"))
        links[-1].type, links[-1].linkname = special, "/etc/passwd"
    source = pack(tmp_path / f"source.{kind}", members, *links)
    make_once(folder, partial(unpack, source))
    assert content(folder) == IMAGES and names(folder.parent) == ["UTKFace"]
    assert not list(tmp_path.rglob("*evil*")) and check(folder) == ""


@pytest.mark.parametrize("kind", ["tar.gz", "zip"])
def test_archives_that_are_cut_damaged_or_locked_are_refused(kind, folder, tmp_path):
    bad = tmp_path / f"bad.{kind}"
    data = pack(bad, IN_UTKFACE).read_bytes()
    end = len(data.rstrip(b"\0")) * 99 // 100  # what follows in a tar is padding
    for length in (0, 20, *(end * fifth // 5 for fifth in range(1, 6))):
        bad.write_bytes(data[:length])
        refused(bad, folder)
    bad.write_bytes(data[: end // 2] + bytes([data[end // 2] ^ 0xFF]) + data[end // 2 + 1 :])
    refused(bad, folder)
    if kind == "zip":
        flag = data.index(b"PK\1\2") + 8  # in the central directory
        bad.write_bytes(data[:flag] + b"\1" + data[flag + 1 :])
        refused(bad, folder, "encrypted")


def test_what_differs_from_the_original_is_counted(folder, tmp_path):
    first, second, *rest = IMAGES
    members = dict([*IN_UTKFACE.items()][1:]) | {f"UTKFace/{second}": b"changed"}
    refused(pack(tmp_path / "other.tar", members), folder, "2 images")
    refused(tmp_path / "absent.zip", folder, "No such file")
    folder.mkdir(parents=True)
    for name in (*rest, ".DS_Store", "99_1_1_2017.jpg"):
        (folder / name).write_bytes(IMAGES.get(name, b"left aside"))
    assert check(folder) == f"3 files missing, changed or extra, first {first}"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_failing_disk_leaves_nothing_and_says_what_to_do(code, archive, folder, monkeypatch):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match=f"{os.strerror(code)}: free some .*AGE_DATA") as caught:
        make_once(folder, partial(unpack, archive))
    assert caught.value.errno == code and names(folder.parent) == []


def test_what_a_killed_process_left_goes(folder):
    command = f"from utils.download import make_once; make_once({folder!r}, write)"
    setup = "import os; from pathlib import *; write = lambda path: (path.mkdir(), os._exit(9))"
    subprocess.run([sys.executable, "-c", f"{setup}; {command}"], cwd=ROOT)
    assert names(folder.parent) == [".UTKFace.partial"]
    make_once(folder, Path.mkdir)
    assert names(folder.parent) == ["UTKFace"]


class Handler(BaseHTTPRequestHandler):
    log_message = print

    def do_GET(self):
        body, step = self.server.data, self.server.step
        self.server.asked += 1
        self.send_response(404 if step == "404" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write({"cut": body[:-9], "lie": body[:-1] + b"?"}.get(step, body))


@pytest.fixture
def server(archive, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.data, server.step, server.asked = archive.read_bytes(), "", 0
    monkeypatch.setattr(download, "URL", f"http://127.0.0.1:{server.server_port}/UTKFace.tar.gz")
    monkeypatch.setattr(download, "SHA256", hashlib.sha256(server.data).hexdigest())
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_file_is_fetched_once_and_verified(server, folder):
    path = folder.parent / "weights" / "file.bin"
    for before, asked in ((None, 1), (server.data, 1), (b"damaged", 2)):
        if before:
            path.write_bytes(before)
        assert fetch(download.URL, path, download.SHA256) == path
        assert path.read_bytes() == server.data and server.asked == asked
    assert names(path.parent) == ["file.bin"]


def test_a_failing_download_names_address_reason_and_way_out(server, folder):
    for server.step, reason in ("404", "404"), ("lie", "invalid hash"), ("cut", "hash|Incomplete"):
        told = f"{download.URL} could not .*({reason}).*browser as .*f.bin"
        with pytest.raises(ConnectionError, match=told):
            fetch(download.URL, folder.parent / "f.bin", download.SHA256)
        assert names(folder.parent) == []


def test_make_data_asks_fetches_verifies_and_tidies_up(server, folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\n"))  # and then its end
    for reason in ("terms", "EOF"):
        with pytest.raises(SystemExit, match=f"Error: .*{reason}"):
            download.main([])
    assert "non-commercial research only" in capsys.readouterr().out and server.asked == 0
    server.step = "404"
    with pytest.raises(SystemExit, match=f"Error: {download.URL}"):
        download.main(["--accept-licence"])
    server.step = ""
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    download.main([])
    assert content(folder) == IMAGES and names(folder.parent) == ["UTKFace"]
    download.main([])
    assert server.asked == 2
    assert "the complete original. Delete it" in capsys.readouterr().out


def test_make_data_takes_an_archive(archive, folder, monkeypatch):
    monkeypatch.setattr("utils.settings.ROOT", archive.parent)
    monkeypatch.setenv("UTKFACE_ARCHIVE", archive.name)  # relative to the project
    download.main([])
    assert content(folder) == IMAGES and archive.is_file()
