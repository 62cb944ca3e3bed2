"""Mutated photos, tables and archives give an answer, or a message that names the file: no hang and
nothing written elsewhere. Found and kept: twin columns, sizes below zero, names not in UTF-8."""

import random
import re
import signal
import sys
import tarfile

import pytest
from PIL import Image, PngImagePlugin
from test_download import IN_UTKFACE, folder, pack  # noqa: F401
from test_photo import encode

from utils import download, faces, model, predict

COUNT = 250  # inputs of each kind; 10,000 for a long run
NOISE = Image.frombytes("L", (48, 32), random.Random(0).randbytes(1536))
KINDS = {"JPEG": "L RGB CMYK", "PNG": "L RGBA LA P 1 I;16", "WEBP": "RGB RGBA", "BMP": "RGB P 1"}
PICTURES = [encode(NOISE.convert(mode), kind) for kind in KINDS for mode in KINDS[kind].split()]
FILES = ["a.jpg", "é, 写真.JPEG", 'new\nline".png', "\udcff.bmp"]
HEADS = "file,age File,AGE file,age,x file,File,age file,age,AGE file,age,group,Group".split()
CELLS = [*'\n\n,,;"\0é', "a.jpg", "../s.jpg", "/etc/s.jpg", "deep/../a.jpg", "1e999", "30", "nan"]
NAMED = r"labels.csv is no CSV|no usable face among .* files of /|s.(tar|zip) lacks .* images"


def mutate(rng: random.Random, data: bytes) -> bytes:
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        at = rng.randrange(len(data) + 1)  # or near the start or the end, where headers are
        at = rng.choice((at, min(at, rng.randrange(99)), max(at, len(data) - rng.randrange(700))))
        old = data[at : at + rng.choice((1, 1, 4, 30, 10**6))]
        turned = bytes(byte ^ 1 << rng.randrange(8) for byte in old[:1]) + old[1:]
        new = b"", turned, turned, old * 2, rng.choice(PICTURES)[at:], rng.randbytes(len(old))
        data = data[:at] + rng.choice(new) + data[at + len(old) :]
    return data


@pytest.mark.skipif(sys.platform != "linux", reason="needs names and alarms as Linux has them")
@pytest.mark.filterwarnings("ignore:Length of header")
@pytest.mark.parametrize("name", ["labels.csv", "ages.json", "s.tar", "s.zip"])
def test_an_answer_or_a_message_that_names_the_file(name, tmp_path, monkeypatch, request):
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs for 10 s"))
    request.addfinalizer(lambda: signal.alarm(0))
    monkeypatch.setattr(PngImagePlugin.ChunkStream, "crc", PngImagePlugin.ChunkStream.crc_skip)
    rng, path, net, answers = random.Random(14), tmp_path / name, tmp_path / "net", 0
    (tmp_path / "a.jpg").write_bytes(PICTURES[0])
    model.save_weights(model.AgeRegressor("small", 32).eval(), net)
    for number in range(COUNT):
        signal.alarm(10)
        try:
            if name == "labels.csv":
                rows = "a.jpg,30\n" + "".join(rng.choices(CELLS, k=number % 12))
                path.write_bytes(mutate(rng, f"{rng.choice(HEADS)}\n{rows}".encode()))
                table = faces.prepare(tmp_path, tmp_path / "cache").table
                assert set(table["file"]) == {"a.jpg"} and table["age"].between(0, 120).all()
            elif name == "ages.json":
                for file in FILES:
                    (tmp_path / file).write_bytes(mutate(rng, rng.choice(PICTURES)))
                predict.main(f"{tmp_path} --crop --form=json --out={path} --check={net}".split())
                assert path.read_text("utf-8").count('"face"') == len(FILES)
            else:
                evil = tarfile.TarInfo("../../evil.jpg")
                evil.size = -512 * rng.randrange(6)
                path.write_bytes(mutate(rng, pack(path, IN_UTKFACE, evil).read_bytes()))
                download.unpack(path, out := tmp_path / f"{number}")
                assert download.check(out) == ""
            answers += 1
        except (ValueError, FileNotFoundError, SystemExit) as error:
            assert re.search(NAMED, str(error)), f"input {number}: {error!r}"
    assert answers > COUNT / 10 and not [*tmp_path.parent.rglob("evil*")]
