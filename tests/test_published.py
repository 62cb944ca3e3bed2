"""The published figures follow from the predictions, and those from the published weights."""

import json
import os
import sys

import numpy as np
import pandas as pd
import pytest

from utils import evaluation as ev
from utils.faces import load_faces, split_digest
from utils.model import load_weights
from utils.settings import CHECKPOINT, ROOT, get_settings
from utils.training import predict

sys.path.insert(0, str(ROOT / ".ci"))
import results

RESULTS = json.loads((ROOT / "figures" / "results.json").read_text())


def numbers(value, path="") -> dict:
    """Every number and text of nested dicts, by its path."""
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, part in value.items() for k, v in numbers(part, f"{path}/{key}").items()}


def test_results_follow_from_the_predictions(tmp_path):
    ev.record(tmp_path, **results.results())
    found = json.loads((tmp_path / "results.json").read_text())
    published = {key: RESULTS[key] for key in found}
    assert numbers(found) == pytest.approx(numbers(published), abs=1e-4)


@pytest.mark.skipif(not os.environ.get("UTKFACE_ARCHIVE"), reason="needs UTKFACE_ARCHIVE")
def test_predictions_are_those_of_the_weights(monkeypatch):
    monkeypatch.setenv("AGE_DATA", str(ROOT / "build" / "test data"))
    table, pixels, _ = load_faces(get_settings("utkface"))
    model, facts = load_weights(CHECKPOINT)
    assert facts["split_digest"] == split_digest(table) == RESULTS["digests"]["split"]
    some = table[table["split"] == "test"].iloc[::8]
    ages = predict(model, pixels, some.index, flip=True)
    if "calibration" in facts:
        ages = ev.calibrate(ages, facts["calibration"])
    published = ev.published().set_index("file")["predicted"][some["file"]]
    assert np.abs(ages - published.to_numpy()).max() < 0.02, "rounded to 0.01 years"
    noise = ev.label_noise(ev.label_pairs(table))
    assert RESULTS["label_noise_mae"] == pytest.approx(noise, abs=1e-4)


def test_suspects_are_published_faces_with_a_verdict():
    listed = pd.read_csv(ROOT / "data" / "utkface_suspects.csv")
    raw = ev.published("uncalibrated").set_index("file").loc[listed["file"]].reset_index()
    assert len(listed) == listed["file"].nunique() == 200
    verdicts = "not a face, label plainly wrong, cannot say, plausible"
    assert set(listed["verdict"]) == set(verdicts.split(", "))
    same = ["age", "predicted", "spread"]
    pd.testing.assert_frame_equal(listed[same], raw[same], check_dtype=False)
