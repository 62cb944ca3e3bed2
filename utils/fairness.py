"""Whom the model fails: errors by group, made comparable across groups of different ages.

Works on the prediction table (age, predicted, group = duplicate group, and a column that names
the group of people, `ethnicity` by default). Ages are compared within the bands of `age_band`.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas as pd
from fairlearn.metrics import MetricFrame
from sklearn.isotonic import IsotonicRegression

from utils.evaluation import DRAWS, SMALL, age_band

METRICS = {  # functions of (labelled, predicted) ages, as MetricFrame takes them
    "n": lambda age, predicted: len(age),
    "MAE": lambda age, predicted: np.abs(predicted - age).mean(),
    "CS@5": lambda age, predicted: (np.abs(predicted - age) <= 5).mean(),
    "bias": lambda age, predicted: (predicted - age).mean(),
    "median error": lambda age, predicted: np.median(np.abs(predicted - age)),
    "90 % below": lambda age, predicted: np.quantile(np.abs(predicted - age), 0.9),
}
FEWEST = 5  # faces of each group that an age band needs to be compared


def by_group(predictions: pd.DataFrame, *keys: str | pd.Series) -> pd.DataFrame:
    """METRICS for each value of `keys` and their crossings; cells under SMALL faces show only n."""
    columns = [predictions[key] if isinstance(key, str) else key for key in keys]
    frame = MetricFrame(
        metrics=METRICS,
        y_true=predictions["age"],
        y_pred=predictions["predicted"],
        sensitive_features=pd.DataFrame({c.name: c.astype(str) for c in columns}),
    )
    table = frame.by_group.astype(float)
    table["n"] = table["n"].fillna(0).astype(int)
    table.loc[table["n"] < SMALL, table.columns != "n"] = np.nan
    return table


class Standardised:
    """Mean error of each group as if all groups had the same ages.

    Direct standardisation: MAE of group g = sum over age bands b of share_b * MAE_gb, with one
    `standard` of shares for all (default: that of all faces given). Bands in which a group has
    fewer than `fewest` faces are left out for all groups; `covered` is the share that remains.
    """

    def __init__(
        self,
        predictions: pd.DataFrame,
        key: str = "ethnicity",
        standard: pd.Series | None = None,
        bands: pd.Series | None = None,
        draws: int = DRAWS,
        fewest: int = FEWEST,
    ) -> None:
        errors = (predictions["predicted"] - predictions["age"]).abs().to_numpy(float)
        self.draws = draws
        bands = age_band(predictions["age"]) if bands is None else bands
        self.people, groups = np.unique(predictions[key].astype(str), return_inverse=True)
        names, levels = pd.factorize(bands, sort=True)[::-1]
        share = pd.Series(levels).value_counts(normalize=True).sort_index()
        if standard is not None:
            share = standard.reindex(names).fillna(0).reset_index(drop=True)
        counts = np.zeros((len(self.people), len(names)))
        np.add.at(counts, (groups, levels), 1)
        kept = (counts >= fewest).all(0)
        if not kept.any():
            raise ValueError(f"no age band has {fewest} faces of every {key}: nothing to compare")
        self.bands, self.covered = list(names[kept]), float(share[kept].sum() / share.sum())
        self.shares = share[kept].to_numpy() / share[kept].sum()
        rows = kept[levels]
        self.errors, self.groups = errors[rows], groups[rows]
        self.levels = (np.cumsum(kept) - 1)[levels[rows]]
        self.clusters = pd.factorize(predictions["group"])[0][rows]
        self.mae = self._mae(self.groups)

    def _mae(self, groups: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        shape = len(self.people), len(self.bands)
        cell = groups * shape[1] + self.levels
        weights = np.ones(len(cell)) if weights is None else weights
        count = np.bincount(cell, weights, shape[0] * shape[1]).reshape(shape)
        total = np.bincount(cell, weights * self.errors, shape[0] * shape[1]).reshape(shape)
        share = self.shares * (count > 0)  # a resample may lack a cell, or seldom a whole group
        with np.errstate(invalid="ignore"):
            return (share * total / np.maximum(count, 1e-9)).sum(1) / share.sum(1)

    @cached_property
    def resamples(self) -> np.ndarray:
        """MAE of each group [draws, groups] in resamples of whole duplicate groups."""
        rng = np.random.default_rng(0)
        count = self.clusters.max() + 1
        weights = (rng.multinomial(count, np.full(count, 1 / count)) for _ in range(self.draws))
        drawn = [self._mae(self.groups, w[self.clusters].astype(float)) for w in weights]
        return np.array(drawn)

    def table(self) -> pd.DataFrame:
        """A row for each group: value, low, high (95 % percentile bootstrap), n faces."""
        low, high = np.nanquantile(self.resamples, [0.025, 0.975], axis=0)
        n = np.bincount(self.groups)
        figures = {"value": self.mae, "low": low, "high": high, "n": n}
        return pd.DataFrame(figures, index=self.people)

    def gap(self, kind: str = "max-min") -> dict:
        """The gap in years with its 95 % interval: "max-min", or "worst-mean" of the groups.

        The largest of several noisy means is too large on average, so a gap is found even where
        there is none. The interval is the basic bootstrap's, which turns that bias about
        (Davison & Hinkley, 1997, ch. 5.2), and does not go below 0.
        """
        spread = _SPREADS[kind]
        value = float(spread(self.mae[None])[0])
        low, high = 2 * value - np.nanquantile(spread(self.resamples), [0.975, 0.025])
        n = len(self.errors)
        return {"value": value, "low": max(0.0, low), "high": max(0.0, high), "n": n}

    def p_value(self, draws: int = 1000, seed: int = 0) -> float:
        """Share of permutations with a max-min gap as large: groups shuffled within age bands.

        Small means that the gap is more than chance. Faces of a duplicate group move together.
        """
        rng = np.random.default_rng(seed)
        # The first face of each duplicate group stands for all of it.
        _, first, place = np.unique(self.clusters, return_index=True, return_inverse=True)
        band, people = self.levels[first], self.groups[first]
        observed = np.ptp(self.mae)
        larger = 0
        for _ in range(draws):
            order = np.lexsort((rng.random(len(band)), band))
            shuffled = np.empty_like(people)
            shuffled[np.argsort(band, kind="stable")] = people[order]
            larger += np.ptp(self._mae(shuffled[place])) >= observed - 1e-12
        return (1 + larger) / (1 + draws)


_SPREADS = {
    "max-min": lambda mae: mae.max(1) - mae.min(1),
    "worst-mean": lambda mae: mae.max(1) - mae.mean(1),
}


def decompose(predictions: pd.DataFrame, key: str = "ethnicity") -> pd.DataFrame:
    """Each group's MAE minus that of all others, split in two parts that add up to it (years).

    `age mix`: what its other ages alone would cause; `within ages`: what remains at equal age
    (Kitagawa, "Components of a Difference Between Two Rates", JASA 1955). A band that one side
    lacks counts as age mix. Raises ValueError where there is one group only.
    """
    bands = age_band(predictions["age"])
    errors = (predictions["predicted"] - predictions["age"]).abs()
    if predictions[key].nunique() < 2:
        raise ValueError(f"all faces have one {key}: two groups are needed for a comparison")
    rows = {}
    for name in sorted(predictions[key].astype(str).unique()):
        inside = (predictions[key].astype(str) == name).to_numpy()
        shares = [
            bands[side].value_counts(normalize=True, sort=False) for side in (inside, ~inside)
        ]
        means = [errors[side].groupby(bands[side], observed=False).mean()
                 for side in (inside, ~inside)]  # fmt: skip
        mine, theirs = means[0].fillna(means[1]).fillna(0), means[1].fillna(means[0]).fillna(0)
        mix = ((shares[0] - shares[1]) * (mine + theirs) / 2).sum()
        within = ((shares[0] + shares[1]) / 2 * (mine - theirs)).sum()
        raw = errors[inside].mean() - errors[~inside].mean()
        rows[name] = {"difference": raw, "age mix": mix, "within ages": within}
    return pd.DataFrame(rows).T


def calibration(valid: pd.DataFrame) -> IsotonicRegression:
    """A correction of predicted ages, blind to groups: the mean labelled age for each predicted
    one, never falling, learnt on validation predictions. Apply it with `.predict(predicted)`."""
    return IsotonicRegression(out_of_bounds="clip").fit(valid["predicted"], valid["age"])
