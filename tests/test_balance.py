"""Weights against imbalance: what they even out, and that only training faces are counted."""

import numpy as np
import pandas as pd
import pytest

from utils.balance import cell_weights, lds_weights


@pytest.fixture
def table() -> pd.DataFrame:
    """800 White and 100 Asian training faces of 20-29, 100 White of 50-59, and a test face."""
    parts = [("White", 25, "train", 800), ("Asian", 25, "train", 100), ("White", 55, "train", 100),
             ("Indian", 80, "test", 1)]  # fmt: skip
    rows = [dict(ethnicity=e, age=a, split=s) for e, a, s, count in parts for _ in range(count)]
    return pd.DataFrame(rows)


def test_cells_are_evened_out(table):
    even, root, none = (cell_weights(table, power) for power in (1, 0.5, 0))
    say = [
        pd.Series(w[:1000]).groupby([0] * 800 + [1] * 100 + [2] * 100).sum() for w in (even, root)
    ]
    assert say[0].to_numpy() == pytest.approx([1000 / 3] * 3)
    assert say[1][0] / say[1][1] == pytest.approx(np.sqrt(8))
    assert (none == 1).all()
    assert root[:1000].mean() == pytest.approx(1) and np.isfinite(root).all()


def test_only_training_faces_are_counted(table):
    more = pd.concat([table, table[table["split"] == "train"].assign(split="test")])
    for weights in (cell_weights, lds_weights):
        assert weights(more.reset_index(drop=True))[:1000] == pytest.approx(weights(table)[:1000])


def test_lds_lets_ages_borrow_from_their_neighbours_within_a_group():
    rows = [("White", 30, 400), ("White", 31, 4), ("White", 60, 4), ("Asian", 31, 4)]
    table = pd.DataFrame(
        [dict(ethnicity=e, age=a, split="train") for e, a, count in rows for _ in range(count)]
    )
    weights = lds_weights(table, most=1e9)
    common, beside, far, other = weights[[0, 400, 404, 408]]
    assert common < beside < 1.2 * common, "31 borrows from 30"
    assert far > 5 * common and other == pytest.approx(far), "no borrowing across groups"
    assert weights.mean() == pytest.approx(1)
    assert lds_weights(table, most=2).max() < 2.5
