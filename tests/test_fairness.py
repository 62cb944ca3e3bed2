"""Gaps between groups: found where they are planted, not found where there are none."""

import numpy as np
import pandas as pd
import pytest

from utils.evaluation import age_band
from utils.faces import ETHNICITIES
from utils.fairness import Standardised, by_group, calibration, decompose

SEEDS = 60
SPREADS = np.array([2.5, 5, 4.5, 6, 8, 9, 10, 11])  # years, by age band: the old are harder
HALF_NORMAL = np.sqrt(2 / np.pi)  # mean of |x| over the standard deviation of x
PLANTED, FACTOR = "Indian", 1.4


def population(seed: int, factor: float = 1.0, count: int = 2400) -> pd.DataFrame:
    """Groups of unequal size and age mix; the errors depend on age alone, but for one group,
    whose errors are `factor` times as large. One face in eight has a twin in its group."""
    random = np.random.default_rng(seed)
    people = random.choice(ETHNICITIES, count, p=[0.42, 0.19, 0.15, 0.17, 0.07])
    older = {"White": 1.0, "Black": 0.9, "Asian": 0.6, "Indian": 0.8, "Others": 0.6}
    ages = random.gamma(2.0, 18, count) * pd.Series(people).map(older).to_numpy()
    table = pd.DataFrame({"ethnicity": people, "age": ages.clip(1, 99).astype(int)})
    spread = SPREADS[age_band(table["age"]).cat.codes] * np.where(people == PLANTED, factor, 1)
    table["predicted"] = table["age"] + random.normal(0, 1, count) * spread
    table["group"] = [f"g{i - (i % 8 == 7)}" for i in range(count)]
    twins = np.arange(7, count, 8)
    table.loc[twins, ["ethnicity", "age", "predicted"]] = table.loc[
        twins - 1, ["ethnicity", "age", "predicted"]
    ].to_numpy()
    return table.astype({"age": int, "predicted": float})


def truth(fair: Standardised, factor: float) -> float:
    spread = pd.Series(SPREADS, age_band(pd.Series([1])).cat.categories)[fair.bands]
    return (factor - 1) * HALF_NORMAL * float(fair.shares @ spread.to_numpy())


def test_no_gap_is_found_where_none_is_planted():
    alarms = sum(Standardised(population(s)).p_value(200) < 0.05 for s in range(SEEDS))
    assert alarms <= 6, f"{alarms} false alarms of {SEEDS}"


def test_raw_errors_would_cry_wolf():
    """The same faces: groups differ in age mix, so their raw MAE does, at equal skill."""
    raw = [decompose(population(s))["difference"].abs().max() for s in range(10)]
    within = [decompose(population(s))["within ages"].abs().max() for s in range(10)]
    assert np.mean(raw) > 1.5 * np.mean(within)


def test_a_planted_gap_is_found_in_the_right_group_and_size():
    found, right, covered = 0, 0, 0
    for seed in range(40):
        fair = Standardised(population(seed, FACTOR), draws=300)
        found += fair.p_value(200) < 0.05
        right += fair.people[fair.mae.argmax()] == PLANTED
        gap = fair.gap()
        covered += gap["low"] <= truth(fair, FACTOR) <= gap["high"]
    assert found >= 38 and right >= 38, (found, right)
    assert covered >= 34, f"the interval holds the truth in {covered} of 40"


def test_standardised_errors_by_hand():
    rows = [("White", 25, 2.0)] * 6 + [("White", 65, 8.0)] * 6
    rows += [("Asian", 25, 3.0)] * 18 + [("Asian", 65, 9.0)] * 6 + [("Asian", 5, 50.0)] * 6
    table = pd.DataFrame(rows, columns=["ethnicity", "age", "error"])
    table["predicted"], table["group"] = table["age"] + table["error"], range(len(table))
    fair = Standardised(table)
    assert fair.bands == ["20-29", "60-69"], "no White child to compare with"
    assert fair.covered == pytest.approx(36 / 42)
    assert dict(zip(fair.people, fair.mae, strict=True)) == pytest.approx(
        {"Asian": (24 * 3 + 12 * 9) / 36, "White": (24 * 2 + 12 * 8) / 36}
    )
    uniform = pd.Series(1.0, index=["20-29", "60-69"])
    assert Standardised(table, standard=uniform).mae == pytest.approx([6, 5])
    gap = fair.gap()
    assert gap["value"] == gap["low"] == gap["high"] == pytest.approx(1)
    assert fair.gap("worst-mean")["value"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="nothing to compare"):
        Standardised(table[table["age"] != 25].iloc[:8])


def test_decomposition_adds_up_and_tells_the_parts_apart():
    for seed in range(5):
        parts = decompose(population(seed, 1.3))
        assert (parts["age mix"] + parts["within ages"]).to_numpy() == pytest.approx(
            parts["difference"].to_numpy(), abs=1e-9
        )
    rows = [("White", 25, 2.0)] * 9 + [("White", 65, 8.0)] * 1
    rows += [("Asian", 25, 2.0)] * 1 + [("Asian", 65, 8.0)] * 9
    table = pd.DataFrame(rows, columns=["ethnicity", "age", "error"])
    table["predicted"] = table["age"] + table["error"]
    parts = decompose(table)
    assert parts.loc["Asian", "within ages"] == pytest.approx(0)
    assert parts.loc["Asian", "age mix"] == pytest.approx(4.8)


def test_small_cells_show_their_size_and_no_figure():
    table = pd.DataFrame({"ethnicity": ["White"] * 40 + ["Asian"] * 29, "age": 30})
    table["predicted"] = 30 + np.tile([-6.0, 2.0], 35)[:69]
    frame = by_group(table, "ethnicity")
    assert frame.loc["Asian", "n"] == 29 and frame.loc["Asian"].drop("n").isna().all()
    assert frame.loc["White", ["MAE", "CS@5", "bias"]].tolist() == [4, 0.5, -2]
    crossed = by_group(
        table, "ethnicity", (table.index % 2).to_series(name="odd").reset_index(drop=True)
    )
    assert len(crossed) == 4 and crossed["n"].sum() == 69


def test_calibration_bends_predictions_towards_the_labels():
    random = np.random.default_rng(0)
    ages = random.uniform(1, 90, 3000)
    predicted = 15 + 0.6 * ages + random.normal(0, 2, 3000)
    valid = pd.DataFrame({"age": ages[:2000], "predicted": predicted[:2000]})
    corrected = calibration(valid).predict(predicted[2000:])
    before, after = (np.abs(p - ages[2000:]).mean() for p in (predicted[2000:], corrected))
    assert after < 0.5 * before
    assert (np.diff(corrected[np.argsort(predicted[2000:])]) >= 0).all()
