"""The predictor, its command line and its ONNX file, with a small network of random weights."""

import json
import os
import re
import subprocess
import sys

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from utils import photo, predict
from utils.model import AgeRegressor, save_weights
from utils.photo import LANDMARKS, Face
from utils.predict import COLUMNS, AgePredictor, export_onnx, main
from utils.settings import CHECKPOINT, ROOT
from utils.synthetic import draw_face, get_person

INTERVALS = {"level": 0.9, "edges": [0, 30, 50], "factors": [1.0, 2.0, 3.0]}


@pytest.fixture(scope="module")
def chips() -> np.ndarray:
    return np.stack([draw_face(get_person(0, i, gap=False)) for i in range(6)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A network of random weights, with intervals."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AgeRegressor("resnet18", 48, head="distribution")
        torch.nn.init.normal_(model.backbone.fc.weight, std=0.5)  # or all ages are one
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(model.eval(), path, intervals=INTERVALS)
    return path


@pytest.fixture(scope="module")
def predictor(checkpoint) -> AgePredictor:
    return AgePredictor(checkpoint)


@pytest.fixture
def two_faces(monkeypatch):
    """In place of the detector: two faces, the right one first; none in dark photos."""

    def detect(picture, scale=1.0):
        height, width = picture.shape[:2]
        points = [(LANDMARKS - 0.5) * 90 + (x * width, height / 2) for x in (0.7, 0.3)]
        faces = [Face(np.array([*p.min(0), 80.2, 99.0]), p, 0.9) for p in points]
        return faces if picture.mean() > 20 else []

    monkeypatch.setattr(photo, "_detect", detect)
    monkeypatch.setattr(photo, "_look_again", lambda picture, face: face)


@pytest.fixture
def folder(tmp_path, chips):
    """Good and bad files, in a folder with a space and letters beyond ASCII."""
    home = tmp_path / "meine Fotos 写真"
    (home / "deep").mkdir(parents=True)
    for name, chip in {"deep/a": chips[0], "deep/b": chips[1], "night": chips[0] // 100}.items():
        (home / f"{name}.png").write_bytes(cv2.imencode(".png", chip[..., ::-1])[1].tobytes())
    (home / "text.jpg").write_text("no picture")
    (home / ".hidden.jpg").write_text("left alone")
    (home / "notes.txt").write_text("left alone")
    (home / "cut.png").write_bytes((home / "deep" / "a.png").read_bytes()[:900])
    return home


def test_ages_are_the_mean_over_both_mirror_images(predictor, chips):
    table, mirrored = predictor.chips(chips), predictor.chips(chips[:, :, ::-1])
    assert list(table) == ["age", "low", "high", "spread"] and table["age"].std() > 0.1
    assert np.allclose(table, mirrored, atol=1e-4)
    factor = np.select([table["age"] < 30, table["age"] < 50], INTERVALS["factors"][:2], 3.0)
    assert np.allclose(table["high"] - table["age"], factor * table["spread"])
    assert np.allclose(table["low"], np.maximum(table["age"] - factor * table["spread"], 0))
    assert predictor.chips(chips[:0]).empty


def test_every_face_has_its_answer_from_left_to_right(predictor, chips, two_faces):
    picture = np.full((300, 600, 3), 128, np.uint8)
    for chip, left in ((chips[1], 100), (chips[2], 340)):
        picture[70:230, left : left + 160] = cv2.resize(chip, (160, 160))
    table = predictor.photo(picture)
    assert table["face"].tolist() == [1, 2] and table["x"].is_monotonic_increasing
    views = np.stack([crop.chips for crop in photo.get_crops(picture)])
    alone = [predictor.chips(chips)["age"] for chips in views]
    assert min(ages.std() for ages in alone) > 0  # the views differ, and the answer is their mean
    assert np.allclose(table["age"], np.mean(alone, axis=1))
    assert table[["low", "high"]].notna().all(axis=None)
    nobody = predictor.photo(picture // 100)
    assert nobody.empty and list(nobody) == list(table) == COLUMNS


def test_a_refused_face_has_its_reason_and_no_age(predictor, chips):
    row = predictor.photo(chips[0] // 100, crop=True).loc[0]
    assert row[["age", "low", "high"]].isna().all()
    assert re.fullmatch("too dark: mean brightness . of 255; .*no answer", row["warnings"])


def test_an_answer_does_not_wait_for_the_next_file(predictor, folder):
    paths = (folder / "deep" / name for name in ["a.png", None])  # None is an error once read
    assert next(predictor.files(paths, crop=True))["age"].notna().all()


def test_a_folder_becomes_a_table_and_bad_files_are_listed(folder, checkpoint, capsys, two_faces):
    out = folder / "out.csv"
    assert main([str(folder), "--checkpoint", str(checkpoint), "--output", str(out)]) == 1
    assert out.read_text().count(",80,99,") == 4  # boxes are whole pixels
    table, told = pd.read_csv(out), capsys.readouterr().err
    names = table["file"].str.rpartition("/")[2]
    assert names.tolist() == ["cut.png", *["a.png"] * 2, *["b.png"] * 2, "night.png", "text.jpg"]
    assert table[table["error"].isna()][["age", "low", "high"]].notna().all(axis=None)
    reasons = table.set_index(names)["error"].dropna()
    assert reasons["text.jpg"].startswith("text.jpg is no JPEG, PNG, WebP or BMP: ")
    assert reasons["cut.png"].startswith("cut.png is damaged or cut off")
    assert reasons["night.png"] == predict.NO_FACE
    assert len(reasons) == 3 and all(f"{name}: " in told for name in reasons.index)


def test_json_and_crops(folder, checkpoint, capsys):
    names = [str(folder / "deep" / "a.png"), str(folder / "gone.png")]
    code = main([*names, "--crop", "--format", "json", "--checkpoint", str(checkpoint)])
    rows = json.loads(capsys.readouterr().out)
    assert code == 1 and [row["file"] for row in rows] == names and list(rows[0]) == COLUMNS
    assert rows[0]["age"] > 0 and rows[0]["error"] == "" and rows[0]["x"] is None
    assert rows[1]["error"] == "No such file or directory" and rows[1]["age"] is None


def test_a_file_without_intervals_gives_ages_only(folder, tmp_path, capsys):
    save_weights(AgeRegressor("resnet18", 32).eval(), tmp_path / "old.safetensors")
    code = main([str(folder / "deep"), "--crop", "--checkpoint", str(tmp_path / "old.safetensors")])
    told = capsys.readouterr()
    header, *lines = told.out.splitlines()
    assert code == 0 and header == ",".join(COLUMNS) and len(lines) == 2
    assert all(float(line.split(",")[6]) and line.split(",")[7:9] == ["", ""] for line in lines)
    assert told.err == ""


def test_errors_that_end_the_run(tmp_path, folder, checkpoint, capsys, monkeypatch):
    monkeypatch.setenv("AGE_FACE_DETECTOR", str(tmp_path / "gone.onnx"))
    photo.load_detector.cache_clear()
    (tmp_path / "empty").mkdir()
    face, weights = str(folder / "deep" / "a.png"), ["--checkpoint", str(checkpoint)]
    for arguments, message in [
        ([face, "--checkpoint", str(tmp_path / "none.safetensors")], "none.safetensors is not"),
        ([str(tmp_path / "empty"), *weights], "no picture in"),
        ([face, *weights], "AGE_FACE_DETECTOR names"),
        ([face, "--crop", "--output", f"{tmp_path}/no/x.csv", *weights], "cannot be written"),
    ]:
        with pytest.raises(SystemExit, match=f"^Error: .*{message}"):  # on stderr, exit code 1
            main(arguments)
        assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit, match="^2$"):
        main([])


@pytest.mark.skipif(not CHECKPOINT.is_file(), reason="needs the published weights")
def test_as_a_command(folder):
    command = [sys.executable, "-m", "utils.predict", folder / "deep", "--crop", "--format", "json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert all(0 <= row["low"] < row["age"] < row["high"] < 120 for row in json.loads(run.stdout))


@pytest.mark.parametrize("published", [False, True])
def test_onnx_gives_the_same_ages_and_tells_its_intervals(predictor, published, chips, tmp_path):
    if published and not (CHECKPOINT.is_file() and os.environ.get("UTKFACE_ARCHIVE")):
        pytest.skip("the published network: only where UTKFACE_ARCHIVE is given as well")
    predictor = AgePredictor() if published else predictor
    export_onnx(predictor, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]  # its weights inside
    onnx = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "model.onnx")
    (given,) = onnx.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("chips", "tensor(uint8)", [3, 128, 128])
    for count in (1, 6):
        answers = onnx.run(["age", "spread"], {"chips": chips[:count].transpose(0, 3, 1, 2)})
        table = predictor.chips(chips[:count])[["age", "spread"]]
        assert [answer.shape for answer in answers] == [(count,)] * 2
        assert np.abs(np.stack(answers, 1) - table).max(axis=None) < 0.01
    facts = onnx.get_modelmeta().custom_metadata_map
    assert json.loads(facts["intervals"]) == predictor.intervals
    assert facts["crop"].startswith("UTKFace chip")
