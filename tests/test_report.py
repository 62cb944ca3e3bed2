"""The README's figures are those of figures/results.json, and nobody else's."""

import json

import pandas as pd
import pytest

from utils.evaluation import metrics
from utils.report import readme_with
from utils.settings import ROOT

RESULTS = json.loads((ROOT / "figures" / "results.json").read_text())
README = (ROOT / "README.md").read_text("utf-8")


def test_readme_shows_the_results():
    assert readme_with(RESULTS, README) == README


def test_a_changed_result_changes_the_readme():
    other = RESULTS | {"test_mae": RESULTS["test_mae"] | {"value": 1.23}}
    assert "1.23 [" in readme_with(other, README)


def test_lost_block_is_an_error():
    with pytest.raises(ValueError, match="results block"):
        readme_with(RESULTS, "# no block")


def test_figures_can_be_recomputed_from_the_predictions():
    table = pd.read_csv(ROOT / "figures" / "predictions_test.csv")
    again = metrics(table)
    for key, row in (("test_mae", "MAE"), ("test_cs5", "CS@5"), ("test_bias", "bias")):
        published = RESULTS[key]
        assert published["n"] == len(table)
        for name in ("value", "low", "high"):
            assert again.loc[row, name] == pytest.approx(published[name], abs=0.01)
