"""The README's figures are those of figures/results.json, and nobody else's."""

import json

import pandas as pd
import pytest

from utils.evaluation import metrics
from utils.report import MODEL_CARD, README, pages, with_block
from utils.settings import ROOT

RESULTS = json.loads((ROOT / "figures" / "results.json").read_text())


@pytest.mark.parametrize("page", [README, MODEL_CARD], ids=["README", "model card"])
def test_the_pages_show_the_results(page):
    assert pages(RESULTS)[page] == page.read_text("utf-8")


def test_a_changed_result_changes_the_pages():
    other = RESULTS | {"test_mae": RESULTS["test_mae"] | {"value": 1.23}}
    assert all("1.23 [" in text for text in pages(other).values())


def test_a_group_too_small_is_not_compared():
    few = RESULTS["mae_by_gender"]["male"] | {"n": 12, "value": 7.77}
    text = pages(RESULTS | {"mae_by_gender": {"male": few}})[MODEL_CARD]
    assert "too few faces (12)" in text and "7.77" not in text


def test_lost_block_is_an_error():
    with pytest.raises(ValueError, match="README.md has lost its results block"):
        with_block("# no block", "", "README.md")


def test_figures_can_be_recomputed_from_the_predictions():
    table = pd.read_csv(ROOT / "figures" / "predictions_test.csv")
    again = metrics(table)
    for key, row in (("test_mae", "MAE"), ("test_cs5", "CS@5"), ("test_bias", "bias")):
        published = RESULTS[key]
        assert published["n"] == len(table)
        for name in ("value", "low", "high"):
            assert again.loc[row, name] == pytest.approx(published[name], abs=0.01)
