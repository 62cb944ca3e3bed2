"""UTKFace from hostile archives, servers and disks; a local server plays the mirror."""

import errno
import gzip
import hashlib
import io
import os
import random
import shutil
import stat
import sys
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from utils import download
from utils.download import check, fetch, make_once, unpack
from utils.settings import get_settings

IMAGES = {f"{20 + i}_0_1_2017011{i}.jpg": random.Random(i).randbytes(6000 + i) for i in range(6)}
IN_UTKFACE = {f"UTKFace/{name}": data for name, data in IMAGES.items()}


def pack(path: Path, members: dict, *special: tarfile.TarInfo) -> Path:
    """A zip, or a tar with the compression that its name tells."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:" + path.suffix.strip(".").replace("tar", "")) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in special:
            archive.addfile(info)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*") if path.name != ".lock")


def unpack_once(source: Path, folder: Path) -> None:
    make_once(folder, partial(unpack, source))


def refused(source: Path, folder: Path, reason: str = "") -> None:
    """By name, with the way out; and no folder is made."""
    with pytest.raises(ValueError, match=f"{source.name} is not UTKFace.*{reason}.*make data"):
        unpack_once(source, folder)
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


@pytest.mark.parametrize("kind", ["tar.gz", "tar.xz", "tar", "zip", "folder", "folder/UTKFace"])
def test_every_source_gives_the_same_images(kind, folder, tmp_path):
    """Of Kaggle's zip and of any other, the outermost UTKFace/ is taken."""
    source, inner = tmp_path / f"source.{kind}", "utkface_aligned_cropped/UTKFace/"
    others = [
        f"{inner}1_0_0_2017.jpg",
        "crop_part1/2_0_0_2017.jpg",
        "UTKFace/deeper/9_0_0_2017.jpg",
    ]
    others += ["UTKFace/._20_0_1_2017.jpg", "UTKFace/notes.txt"]
    if "folder" in kind:
        source.mkdir(parents=True)
        for name, image in IMAGES.items():
            (source / name).write_bytes(image)
        (source / "notes.txt").write_text("not an image")
        (source / "9_0_0_2017.jpg").symlink_to(source / "notes.txt")
        source = tmp_path / "source.folder"
    else:
        pack(source, dict.fromkeys(others, b"other") | IN_UTKFACE)
    unpack_once(source, folder)
    assert content(folder) == IMAGES and names(folder.parent) == ["UTKFace"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_nothing_is_written_outside_or_by_a_link(kind, folder, tmp_path):
    paths = ("../evil.jpg", "UTKFace/../../evil.jpg", "/tmp/evil.jpg", "C:/evil.jpg")
    members = IN_UTKFACE | dict.fromkeys((*paths, "UTKFace/..\\evil.jpg"), b"evil")
    link, links = zipfile.ZipInfo("UTKFace/9_0_0_2017.jpg"), []
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for special in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        links.append(tarfile.TarInfo(f"UTKFace/{len(links)}_0_0_2017.jpg"))
        links[-1].type, links[-1].linkname = special, "/etc/passwd"
    members |= {link: b"/etc/passwd"} if kind == "zip" else {}
    unpack_once(pack(tmp_path / f"bad.{kind}", members, *links), folder)
    assert content(folder) == IMAGES and not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("kind", ["tar.gz", "tar", "zip"])
def test_archives_that_are_cut_damaged_or_locked_are_refused(kind, folder, tmp_path):
    bad = tmp_path / f"bad.{kind}"
    data = pack(bad, IN_UTKFACE).read_bytes()
    end = len(data.rstrip(b"\0")) * 99 // 100  # what follows in a tar is padding
    for length in (0, 1, 20, *(end * tenth // 10 for tenth in range(1, 11))):
        bad.write_bytes(data[:length])
        refused(bad, folder)
    bad.write_bytes(data[: end // 2] + bytes([data[end // 2] ^ 0xFF]) + data[end // 2 + 1 :])
    refused(bad, folder)
    if kind == "zip":
        flag = data.index(b"PK\1\2") + 8  # in the central directory
        bad.write_bytes(data[:flag] + b"\1" + data[flag + 1 :])
        refused(bad, folder, "encrypted")


def test_what_differs_from_the_original_is_told(folder, tmp_path):
    first, second, *rest = sorted(IMAGES)
    members = {name: data for name, data in IN_UTKFACE.items() if not name.endswith(first)}
    members |= {f"UTKFace/{second}": b"changed", "UTKFace/99_1_1_2017.jpg": b"extra"}
    told = f"1 missing: {first}; 1 changed: {second}; 1 extra: 99_1_1_2017.jpg"
    refused(pack(tmp_path / "other.tar", members), folder, told)
    refused(pack(tmp_path / "part1.zip", {"crop_part1/1_0_0_2017.jpg": b""}), folder, "6 missing")
    refused(tmp_path / "absent.zip", folder, "No such file")
    folder.mkdir(parents=True)
    for name in (*rest, ".DS_Store"):
        (folder / name).write_bytes(IMAGES.get(name, b"left aside"))
    assert check(folder) == f"2 missing: {first}, {second}"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_failing_disk_leaves_nothing_and_says_what_to_do(code, archive, folder, monkeypatch):
    def fail(image, out):
        out.write(image.read(100))
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    with pytest.raises(
        OSError, match="cannot write .*UTKFace.*free some space.*AGE_DATA"
    ) as caught:
        unpack_once(archive, folder)
    assert caught.value.errno == code and names(folder.parent) == []
    shutil.rmtree(folder.parent)
    folder.parent.write_text("in the way")
    with pytest.raises(OSError, match="cannot write .*AGE_DATA"):
        unpack_once(archive, folder)


# Downloads


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

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


def test_a_file_is_fetched_once_and_verified(server, folder, monkeypatch):
    path = folder.parent / "weights" / "file.bin"
    with ThreadPoolExecutor(2) as pool:  # at once, as two notebooks might
        paths = list(pool.map(lambda _: fetch(download.URL, path, download.SHA256), range(2)))
    assert paths == [path] * 2 and path.read_bytes() == server.data
    assert server.asked == 1 and names(path.parent) == ["file.bin"]
    path.write_bytes(b"damaged")
    fetch(download.URL, path, download.SHA256)
    assert path.read_bytes() == server.data and server.asked == 2
    monkeypatch.setattr(download, "FileLock", None)
    fetch(download.URL, path, download.SHA256)  # from a read-only disk: no lock, no request
    assert server.asked == 2


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("404", "404"),
        ("lie", "invalid hash"),
        ("cut", "invalid hash|Incomplete"),
        ("no", "refused"),
    ],
)
def test_a_failing_download_names_address_reason_and_way_out(step, reason, server, folder):
    server.step, url = step, "http://127.0.0.1:9/x" if step == "no" else download.URL
    with pytest.raises(ConnectionError, match=f"{url} could not .*({reason}).*browser as .*f.bin"):
        fetch(url, folder.parent / "f.bin", download.SHA256)
    assert names(folder.parent) == []


def test_make_data_asks_fetches_verifies_and_tidies_up(server, folder, monkeypatch, capsys):
    for answer in ("", "no\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        assert download.main([]) == 1
    said = capsys.readouterr()
    assert "non-commercial research only" in said.out and "UTKFACE_ARCHIVE" in said.out
    assert "terms are not accepted" in said.err and server.asked == 0
    server.step = "404"
    assert download.main(["--accept-licence"]) == 1
    assert download.URL in capsys.readouterr().err
    server.step = ""
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n"))
    assert download.main([]) == 0
    assert content(folder) == IMAGES and names(folder.parent) == ["UTKFace"]
    assert download.main([]) == 0 and server.asked == 2
    assert "only compared" in capsys.readouterr().out


def test_make_data_takes_an_archive_or_says_in_a_line_why_not(archive, folder, monkeypatch, capsys):
    assert download.main([str(archive.with_name("absent.zip"))]) == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and "absent.zip" in error and error.count("\n") == 1
    monkeypatch.setattr("utils.settings.ROOT", archive.parent)
    monkeypatch.setenv("UTKFACE_ARCHIVE", archive.name)  # relative to the project
    assert download.main([]) == 0
    assert content(folder) == IMAGES and archive.is_file()
