"""How large the error is, for whom, and how sure we are: figures with 95 % intervals.

Works on the prediction table: the face table (`age`, duplicate `group`, ...) plus `predicted` and,
for conformal intervals, `spread`, all in years. A figure is a dict or row of value, low, high, n.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock

from utils.settings import write_atomically

AGE_BANDS = {f"{low}-{low + 9}": low for low in range(0, 70, 10)} | {"70+": 70}  # lowest ages
SMALL = 30  # faces: the figure of a smaller group is not worth comparing
DRAWS = 2000  # bootstrap resamples


def age_band(ages: pd.Series) -> pd.Series:
    """The band of AGE_BANDS for each age in years, as an ordered categorical."""
    return pd.cut(ages, [*AGE_BANDS.values(), np.inf], right=False, labels=list(AGE_BANDS))


def mean_interval(values: np.ndarray, groups: pd.Series, draws: int = DRAWS, over=1.0) -> dict:
    """Mean of `values` [N] with its 95 % percentile interval from a cluster bootstrap: faces of one
    duplicate group are drawn together, since their errors are not independent (Davison & Hinkley,
    Bootstrap Methods, 1997, ch. 3.8). With `over` [N], of the same faces, it is the mean of
    `values` over that of `over`. NaN where there is no face."""
    if not len(values):
        return {"value": np.nan, "low": np.nan, "high": np.nan, "n": 0}
    codes, columns = pd.factorize(groups)[0], np.broadcast_arrays(np.asarray(values, float), over)
    sums = np.stack([np.bincount(codes, column) for column in columns], 1)
    above, below = np.array([count @ sums for count in _resamples(len(sums), draws)]).T
    low, high = np.quantile(above / below, [0.025, 0.975])
    return {"value": columns[0].mean() / np.mean(over), "low": low, "high": high, "n": len(values)}


@lru_cache(maxsize=8)  # drawing is slow, and many figures are of the same faces
def _resamples(groups: int, draws: int) -> np.ndarray:
    """How often each group is in each resample, [draws, groups]."""
    rng, share = np.random.default_rng(0), np.full(groups, 1 / groups)
    return np.stack([rng.multinomial(groups, share).astype(np.uint8) for _ in range(draws)])


def metrics(predictions: pd.DataFrame) -> pd.DataFrame:
    """MAE (years), CS@5 (share within 5 years) and bias (years, + is too old), with intervals."""
    error = (predictions["predicted"] - predictions["age"]).to_numpy(float)
    figures = {"MAE": np.abs(error), "CS@5": np.abs(error) <= 5, "bias": error}
    rows = {name: mean_interval(v, predictions["group"]) for name, v in figures.items()}
    return pd.DataFrame(rows).T.astype({"n": int})


def metrics_by(predictions: pd.DataFrame, key: str | pd.Series, metric="MAE") -> pd.DataFrame:
    """One of `metrics` for each value of a column or a series: a row each."""
    parts = predictions.groupby(key, observed=True)
    rows = {name: metrics(part).loc[metric] for name, part in parts}
    return pd.DataFrame(rows).T.astype({"n": int}).rename_axis(getattr(key, "name", key))


def label_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Every pair of byte-identical files: file, other_file, age, other_age, difference, group."""
    faces = table[["file", "age", "group", "sha256"]].assign(row=range(len(table)))
    pairs = faces.merge(faces.add_prefix("other_"), left_on="sha256", right_on="other_sha256")
    pairs = pairs[pairs["row"] < pairs["other_row"]].reset_index(drop=True)
    pairs["difference"] = (pairs["age"] - pairs["other_age"]).abs()
    return pairs[["file", "other_file", "age", "other_age", "difference", "group"]]


def label_noise(pairs: pd.DataFrame) -> dict:
    """The MAE (years) that label noise alone would give: if both labels have independent normal
    errors of one spread, they differ by root two times one's mean error."""
    return mean_interval(pairs["difference"] / np.sqrt(2), pairs["group"])


def standardised(predictions: pd.DataFrame, key="ethnicity", draws=DRAWS, **options) -> tuple:
    """MAE (years) of each group of people as if all groups had the same ages.

    Direct standardisation: sum over age bands b of share_b * MAE_gb. `options`: `bands` of the
    faces (default: `age_band`); `standard`, the share of each band (default: among all faces);
    `fewest`: bands with fewer (default: 5) faces of any group are left out for all groups.
    Returns a table, and the MAE [draws, groups] in resamples of whole duplicate groups: the same
    ones for the same faces, so two models' can be subtracted. ValueError where no band is left."""
    rows = _comparable(predictions, key, **options)
    group, mae = rows.pop("group"), _at_equal_age(**rows)
    weights = _resamples(group.max() + 1, draws)[:, group]
    resamples = np.array([_at_equal_age(**rows, weights=drawn) for drawn in weights])
    low, high = np.nanquantile(resamples, [0.025, 0.975], axis=0)
    names, n = np.unique(predictions[key].astype(str)), np.bincount(rows["people"])
    return pd.DataFrame({"value": mae, "low": low, "high": high, "n": n}, names), resamples


def gap(table: pd.DataFrame, resamples: np.ndarray, spread=np.ptp) -> dict:
    """The gap (years) between the groups of `standardised`, by default largest minus smallest. Of
    noisy means that is too large on average. The interval is the basic bootstrap's, which turns
    this bias about (Davison & Hinkley, ch. 5.2), cut off at 0."""
    value, n = float(spread(table["value"].to_numpy(), axis=0)), int(table["n"].sum())
    low, high = 2 * value - np.nanquantile(spread(resamples, axis=1), [0.975, 0.025])
    return {"value": value, "low": max(0.0, low), "high": max(0.0, high), "n": n}


def gap_p_value(predictions: pd.DataFrame, key="ethnicity", draws=1000, **options) -> float:
    """Share of permutations with a gap as large: people shuffled within age bands, duplicates
    together. Small means that the gap is more than chance. `options` as in `standardised`."""
    rows, rng = _comparable(predictions, key, **options), np.random.default_rng(0)
    _, first, place = np.unique(rows.pop("group"), return_index=True, return_inverse=True)
    band, people, observed = rows["band"][first], rows["people"][first], _at_equal_age(**rows)
    by_band, larger, shuffled = np.argsort(band, kind="stable"), 0, people.copy()
    for _ in range(draws):
        shuffled[by_band] = people[np.lexsort((rng.random(len(band)), band))]
        rows["people"] = shuffled[place]
        larger += np.ptp(_at_equal_age(**rows)) >= np.ptp(observed) - 1e-9
    return (1 + larger) / (1 + draws)


def _comparable(predictions, key, bands=None, standard=None, fewest=5) -> dict:
    """Arrays [N] of the faces whose age band has enough of every group."""
    bands = age_band(predictions["age"]) if bands is None else bands
    counts = pd.crosstab(bands, predictions[key].astype(str))
    kept = counts.index[(counts >= fewest).all(axis=1)]
    if kept.empty:
        raise ValueError(f"no age band has {fewest} faces of every {key}: nothing to compare")
    standard = counts.sum(axis=1) if standard is None else standard
    rows = {
        "people": pd.factorize(predictions[key].astype(str), sort=True)[0],
        "band": kept.get_indexer(bands),
        "share": bands.astype(object).map(standard.to_dict()).fillna(0).to_numpy(float),
        "error": (predictions["predicted"] - predictions["age"]).abs().to_numpy(float),
        "group": pd.factorize(predictions["group"])[0],
    }
    return {name: values[rows["band"] >= 0] for name, values in rows.items()}


def _at_equal_age(people, band, share, error, weights=1) -> np.ndarray:
    """MAE of each group: a face weighs its band's share over the count of its group and band."""
    cell, weights = people * (band.max() + 1) + band, np.broadcast_to(weights, people.shape)
    weights = weights * share / np.maximum(np.bincount(cell, weights)[cell], 1)
    with np.errstate(invalid="ignore"):  # a resample may lack a whole group
        return np.bincount(people, weights * error) / np.bincount(people, weights)


def conformal(predictions: pd.DataFrame, level: float = 0.9) -> dict:
    """How many spreads an interval must reach to hold `level` of the ages, by predicted age.

    Split-conformal prediction (Angelopoulos & Bates, 2021, sec. 2): a band's factor is the
    ceil((n + 1) level)-th smallest of its n errors over spreads, or that of all faces if n < SMALL.
    Learn it on faces new to the network. Returns level, edges (years) and factors, for JSON.
    Raises ValueError where a spread is missing."""
    if not (predictions["spread"] > 0).all():
        raise ValueError("a face has no spread: the model's head must be a distribution")
    scores = ((predictions["predicted"] - predictions["age"]).abs() / predictions["spread"]).array
    edges, factors = list(AGE_BANDS.values()), []
    bands = np.searchsorted(edges[1:], predictions["predicted"], side="right")
    for band in range(len(edges)):
        own = scores[bands == band] if (bands == band).sum() >= SMALL else scores
        place = int(np.ceil((len(own) + 1) * level)) - 1
        factors.append(round(float(np.append(np.sort(own), np.inf)[place]), 4))
    return {"level": level, "edges": edges, "factors": factors}


def interval(predicted, spread, table: dict) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest age (years, never below 0) [N] of each face, by a table of `conformal`."""
    predicted, spread = np.asarray(predicted, float), np.asarray(spread, float)
    bands = np.searchsorted(table["edges"][1:], predicted, side="right")
    reach = np.asarray(table["factors"])[bands] * spread
    return np.maximum(predicted - reach, 0), predicted + reach


def record(folder: Path, **figures) -> None:
    """Add figures, tables of them, nested dicts or facts to `results.json` in a folder. Others in
    the file stay, also where two notebooks record at once or one is killed while it does. NaN
    becomes null. Raises TypeError for what JSON cannot hold."""
    folder.mkdir(parents=True, exist_ok=True)
    path, new = folder / "results.json", _plain(figures)
    with FileLock(folder / ".results.json.lock"):
        results = json.loads(path.read_text()) if path.is_file() else {}
        text = json.dumps(results | new, indent=1, sort_keys=True, allow_nan=False) + "\n"
        write_atomically(path, lambda file: file.write_text(text))


def _plain(value, name: str = ""):
    """As JSON holds it: four decimals, or four digits where that would be fewer; NaN is null."""
    if isinstance(value, pd.DataFrame | pd.Series | dict):
        rows = value.T if isinstance(value, pd.DataFrame) else value
        return {str(key): _plain(item, key) for key, item in rows.items()}
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, float) or not np.isfinite(value):
        return None if isinstance(value, float) else value
    rounded = float(f"{value:.4f}" if abs(value) >= 0.1 else f"{value:.4g}")
    return int(value) if name == "n" else rounded


def show(figure: dict | pd.Series, digits: int = 2) -> str:
    """A figure as text: `4.90 [4.71, 5.10], n = 2,384`."""
    form = "{value:.{d}f} [{low:.{d}f}, {high:.{d}f}], n = {n:,.0f}"
    return form.format(d=digits, **figure)
