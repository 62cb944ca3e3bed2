"""The predictor, its command line and its ONNX file, with a small network of random weights."""

import json
import os
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
from utils.predict import COLUMNS, AgePredictor, export_onnx, list_files, main
from utils.settings import CHECKPOINT, CHIP_SIZE, ROOT
from utils.synthetic import draw_face, get_person

INTERVALS = {"level": 0.9, "edges": [0, 30, 50], "factors": [1.0, 2.0, 3.0]}


@pytest.fixture(scope="module")
def chips() -> np.ndarray:
    return np.stack([draw_face(get_person(0, i, gap=False))[0] for i in range(6)])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, one_thread):
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
    return predict.load_predictor(checkpoint)


def write(path, picture: np.ndarray):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(".png", picture[..., ::-1])[1].tobytes())
    return path


@pytest.fixture
def two_faces(monkeypatch):
    """A stand-in for the detector: two faces, the right one first; none in dark photos."""

    def detect(picture, scale=1.0):
        if picture.mean() < 20:
            return []
        height, width = picture.shape[:2]
        points = [(LANDMARKS - 0.5) * 90 + (x * width, height / 2) for x in (0.7, 0.3)]
        return [Face(np.array([*p.min(0), 80.0, 99.0]), p, 0.9) for p in points]

    monkeypatch.setattr(photo, "_detect", detect)
    monkeypatch.setattr(photo, "_look_again", lambda picture, face: face)


# The class


def test_ages_are_the_mean_over_both_mirror_images(predictor, chips):
    table, mirrored = predictor.chips(chips), predictor.chips(chips[:, :, ::-1])
    assert list(table) == ["age", "low", "high", "spread"]
    assert np.allclose(table, mirrored, atol=1e-4)
    assert table["age"].std() > 0.1  # or nothing would be compared
    factor = np.select([table["age"] < 30, table["age"] < 50], INTERVALS["factors"][:2], 3.0)
    assert np.allclose(table["high"] - table["age"], factor * table["spread"])
    assert np.allclose(table["low"], np.maximum(table["age"] - factor * table["spread"], 0))


def test_a_file_without_intervals_gives_ages_only(chips, tmp_path, capsys):
    save_weights(AgeRegressor("resnet18", 32).eval(), tmp_path / "old.safetensors")
    predictor = AgePredictor(tmp_path / "old.safetensors")
    assert predictor.intervals is None
    table = predictor.chips(chips)
    assert table["age"].notna().all() and table[["low", "high", "spread"]].isna().all(axis=None)
    face = write(tmp_path / "face.png", chips[0])
    arguments = [str(face), "--crop", "--checkpoint", str(tmp_path / "old.safetensors")]
    assert main(arguments) == 0
    assert "old.safetensors holds no intervals: ages only" in capsys.readouterr().err


def test_no_chips_give_no_rows(predictor):
    assert predictor.chips(np.empty((0, CHIP_SIZE, CHIP_SIZE, 3), np.uint8)).empty


def test_every_face_has_its_answer_from_left_to_right(predictor, chips, two_faces):
    picture = np.full((300, 600, 3), 128, np.uint8)
    for chip, left in ((chips[1], 100), (chips[2], 340)):
        picture[70:230, left : left + 160] = cv2.resize(chip, (160, 160))
    table = predictor.photo(picture)
    assert list(table) == COLUMNS
    assert table["face"].tolist() == [1, 2] and table["x"].is_monotonic_increasing
    assert table[["age", "low", "high"]].notna().all(axis=None)
    views = np.stack([crop.chips for crop in photo.get_crops(picture)])
    alone = [predictor.chips(chips)["age"] for chips in views]
    assert min(ages.std() for ages in alone) > 0  # the views differ, and the answer is their mean
    assert np.allclose(table["age"], np.mean(alone, axis=1))


def test_a_refused_face_has_its_reason_and_no_age(predictor, chips):
    table = predictor.photo(chips[0] // 100, crop=True)
    assert table.loc[0, ["age", "low", "high"]].isna().all()
    assert table.loc[0, "warnings"].startswith("too dark: mean brightness")
    assert table.loc[0, "warnings"].endswith("no answer")


# The command line


@pytest.fixture
def folder(tmp_path, chips):
    """Good and bad files, in a folder with a space and letters beyond ASCII."""
    home = tmp_path / "meine Fotos 写真"
    for place, chip in enumerate(chips):
        write(home / "deep" / f"{place}.png", chip)
    write(home / "night.png", chips[0] // 100)
    (home / "text.jpg").write_text("no picture")
    (home / "notes.txt").write_text("left alone")
    (home / "cut.png").write_bytes(write(home / "whole.png", chips[1]).read_bytes()[:900])
    return home


def test_a_folder_becomes_a_table_and_bad_files_are_listed(folder, checkpoint, capsys, two_faces):
    out = folder / "out.csv"
    code = main([str(folder), "--checkpoint", str(checkpoint), "--output", str(out)])
    table = pd.read_csv(out)
    assert code == 1 and list(table) == COLUMNS
    good = table[table["error"].isna()]
    assert len(good) == 14 and good["face"].tolist() == [1, 2] * 7  # two in each of seven files
    assert good[["age", "low", "high"]].notna().all(axis=None)
    reasons = table.dropna(subset="error").set_index("file")["error"]
    reasons.index = reasons.index.map(lambda name: name.rpartition("/")[2])
    assert reasons["text.jpg"].startswith("text.jpg is no picture that can be read here")
    assert reasons["cut.png"].startswith("cut.png is damaged or cut off")
    assert reasons["night.png"] == predict.NO_FACE
    assert len(reasons) == 3
    told = capsys.readouterr().err
    assert all(f"{name}: " in told for name in reasons.index)


def test_json_and_crops(folder, checkpoint, capsys):
    names = [str(folder / "whole.png"), str(folder / "gone.png")]
    code = main([*names, "--crop", "--format", "json", "--checkpoint", str(checkpoint)])
    rows = json.loads(capsys.readouterr().out)
    assert code == 1 and [row["file"] for row in rows] == names
    assert rows[0]["age"] > 0 and rows[0]["error"] == "" and rows[0]["x"] is None
    assert rows[1]["error"] == "No such file or directory" and rows[1]["age"] is None


def test_all_good_is_exit_code_0(folder, checkpoint, capsys):
    code = main([str(folder / "deep"), "--crop", "--checkpoint", str(checkpoint)])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and len(lines) == 7 and lines[0] == ",".join(COLUMNS)


def test_batches_change_nothing(folder, checkpoint, monkeypatch):
    paths = list_files([str(folder / "deep"), str(folder / "text.jpg")])
    predictor = AgePredictor(checkpoint)
    at_once = pd.concat(predictor.files(paths, crop=True), ignore_index=True)
    monkeypatch.setattr(predict, "BATCH", 2)
    parts = list(predictor.files(paths, crop=True))
    assert len(parts) == 4
    both = [table.set_index("file")["age"].sort_index() for table in (at_once, pd.concat(parts))]
    assert np.allclose(*both, atol=1e-3, equal_nan=True)


def test_errors_that_end_the_run(tmp_path, checkpoint, chips, capsys, monkeypatch):
    face = str(write(tmp_path / "face.png", chips[0]))
    assert main([face, "--checkpoint", str(tmp_path / "none.safetensors")]) == 1
    assert "none.safetensors is not there" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty"), "--checkpoint", str(checkpoint)]) == 1
    assert "no picture in" in capsys.readouterr().err
    monkeypatch.setenv("AGE_FACE_DETECTOR", str(tmp_path / "gone.onnx"))
    photo._open_detector.cache_clear()
    assert main([face, "--checkpoint", str(checkpoint)]) == 1
    assert "AGE_FACE_DETECTOR names" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])


def test_as_a_command(tmp_path, chips):
    """With the published weights, as the documents tell it."""
    if not CHECKPOINT.is_file():
        pytest.skip("needs the published weights")
    face = write(tmp_path / "face.png", chips[1])
    command = [sys.executable, "-m", "utils.predict", str(face), "--crop", "--format", "json"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    (row,) = json.loads(run.stdout)
    assert 0 < row["age"] < 120


def test_prediction_needs_no_training_library():
    command = [sys.executable, "-c", "import sys, utils.predict; print('lightning' in sys.modules)"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "False", run.stderr


# ONNX


@pytest.fixture(scope="module")
def session(predictor, tmp_path_factory):
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(predictor, path)
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]  # one file, weights inside
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(path, options)


@pytest.mark.parametrize("count", [1, 6])
def test_onnx_gives_the_same_ages_for_any_batch(session, predictor, chips, count):
    age, spread = session.run(None, {"chips": chips[:count].transpose(0, 3, 1, 2)})
    table = predictor.chips(chips[:count])
    assert age.shape == spread.shape == (count,)
    assert np.abs(age - table["age"]).max() < 0.01
    assert np.abs(spread - table["spread"]).max() < 0.01


def test_onnx_takes_what_a_user_has_and_tells_its_intervals(session):
    (chips,) = session.get_inputs()
    assert (chips.name, chips.type, chips.shape[1:]) == ("chips", "tensor(uint8)", [3, 128, 128])
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["intervals"]) == INTERVALS
    assert facts["crop"].startswith("UTKFace chip")


@pytest.mark.skipif(not os.environ.get("UTKFACE_ARCHIVE"), reason="needs UTKFACE_ARCHIVE")
def test_onnx_of_the_published_weights(chips, tmp_path):
    """Slower by the size of the network: only where the real data are tested as well."""
    runtime = pytest.importorskip("onnxruntime")
    predictor = predict.load_predictor()
    export_onnx(predictor, tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    age, _ = session.run(None, {"chips": chips.transpose(0, 3, 1, 2)})
    assert np.abs(age - predictor.chips(chips)["age"]).max() < 0.01
