"""Intervals: the promised share on new faces, by band, and what they refuse."""

import numpy as np
import pandas as pd
import pytest

from utils.evaluation import SMALL
from utils.intervals import conformal, interval


def predictions(n, seed, wrong=1.0):
    """Faces whose errors have `wrong` times the stated spread, three times that from 60 years."""
    rng = np.random.default_rng(seed)
    predicted = rng.uniform(1, 80, n)
    spread = rng.uniform(2, 8, n)
    scale = wrong * np.where(predicted >= 60, 3, 1)
    age = predicted + spread * scale * rng.standard_t(4, n)
    return pd.DataFrame({"age": age, "predicted": predicted, "spread": spread})


def covered(frame, table):
    low, high = interval(frame["predicted"], frame["spread"], table)
    return ((frame["age"] >= low) | (low == 0)) & (frame["age"] <= high)


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_the_promise_holds_on_new_faces_in_every_band(level):
    table, new = conformal(predictions(4000, 0, wrong=0.5), level), predictions(40_000, 1, 0.5)
    inside = covered(new[new["predicted"] > 30], table)
    assert inside.mean() == pytest.approx(level, abs=0.02)
    for band in (35, 65):
        part = new["predicted"].between(band - 5, band + 5)
        assert inside[part].mean() == pytest.approx(level, abs=0.05)
    old, young = table["factors"][6], table["factors"][3]
    assert old / young == pytest.approx(3, rel=0.3)


def test_a_small_band_takes_the_factor_of_all():
    frame = predictions(2000, 2)
    few = frame[(frame["predicted"] < 60) | (frame.index < SMALL)]
    assert (few["predicted"] >= 70).sum() < SMALL
    table = conformal(few)
    everything = few.assign(
        predicted=30.0 + 0 * few["predicted"], age=few["age"] - few["predicted"] + 30
    )
    assert table["factors"][7] == conformal(everything)["factors"][3]


def test_an_interval_is_never_below_birth():
    low, high = interval([1.0], [4.0], {"edges": [0, 10], "factors": [2.0, 1.0]})
    assert (low[0], high[0]) == (0, 9)


def test_too_few_faces_promise_nothing():
    table = conformal(predictions(5, 3), 0.9)
    assert set(table["factors"]) == {np.inf}


def test_refusals():
    frame = predictions(50, 4)
    with pytest.raises(ValueError, match="not between 0 and 1"):
        conformal(frame, 90)
    with pytest.raises(ValueError, match="must be a distribution"):
        conformal(frame.assign(spread=np.nan))
