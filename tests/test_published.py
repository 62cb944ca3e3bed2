"""The published figures follow from the predictions, and those from the published weights."""

import json
import os

import numpy as np
import pandas as pd
import pytest

from utils import evaluation as ev
from utils.download import file_sha256
from utils.faces import load_faces, split_digest
from utils.model import load_weights
from utils.settings import CHECKPOINT, ROOT, get_settings
from utils.training import predict

RESULTS = json.loads((ROOT / "figures" / "results.json").read_text())
PREDICTIONS = pd.read_csv(ROOT / "figures" / "predictions_test.csv", index_col="file")


def test_figures_are_those_of_the_predictions():
    figures = ev.metrics(PREDICTIONS).T.to_dict()
    for name in figures:
        key = f"test_{name.lower().replace('@', '')}"
        assert RESULTS[key] == pytest.approx(figures[name], abs=0.005)
    bands = ev.age_band(PREDICTIONS["age"])
    for key, column in (("age_band", bands), ("ethnicity", "ethnicity"), ("gender", "gender")):
        table = ev.metrics_by(PREDICTIONS, column).T.to_dict()
        assert RESULTS[f"mae_by_{key}"].keys() == table.keys()
        for name in table:
            assert RESULTS[f"mae_by_{key}"][name] == pytest.approx(table[name], abs=0.005)
    fair, _ = ev.standardised(PREDICTIONS)
    published = {k: row["value"] for k, row in RESULTS["age_standardised_mae"].items()}
    assert fair["value"].to_dict() == pytest.approx(published, abs=0.005)


@pytest.mark.skipif(not os.environ.get("UTKFACE_ARCHIVE"), reason="needs UTKFACE_ARCHIVE")
def test_predictions_are_those_of_the_weights(monkeypatch):
    monkeypatch.setenv("AGE_DATA", str(ROOT / "build" / "test data"))
    table, pixels, _ = load_faces(get_settings("utkface"))
    (model, facts), split = load_weights(CHECKPOINT), split_digest(table)
    assert RESULTS["digests"] == {"split": split, "checkpoint": file_sha256(CHECKPOINT)}
    assert facts["split_digest"] == split
    some = table[table["split"] == "test"].iloc[::8]
    ages = predict(model, pixels, some.index, flip=True)
    assert np.abs(ages - PREDICTIONS["predicted"][some["file"]].to_numpy()).max() < 0.01
    noise = ev.label_noise(ev.label_pairs(table))
    assert RESULTS["label_noise_mae"] == pytest.approx(noise, abs=1e-4)
