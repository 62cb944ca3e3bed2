"""How large the error is, for whom, and how sure we are: figures (value, low, high, n) with 95 %
intervals, from the prediction table: the face table plus `predicted` and `spread`, in years."""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock

from utils.settings import ROOT, write_atomically

AGE_BANDS = {f"{low}-{low + 9}": low for low in range(0, 70, 10)} | {"70+": 70}  # lowest ages
PUBLISHED = "file age gender ethnicity group fold split brightness sharpness".split()
SMALL = 30  # faces: the figure of a smaller group is not worth comparing


def published(run: str = "crossfit") -> pd.DataFrame:
    """A run's published ages and spreads (NaN if not kept) in years, in UTKFace's face table.
    "crossfit": each of the 23,705 faces by a network trained without its fold, "uncalibrated" the
    same before `calibrate`; others: the faces they were evaluated on (.ci/experiments.py)."""
    names = {run: "predicted", f"{run} spread": "spread"}
    kept = [*PUBLISHED, *names].__contains__
    table = pd.read_csv(ROOT / "figures" / "predictions.csv.gz", usecols=kept)
    if run not in table:
        raise KeyError(f"{run!r} is no run of predictions.csv.gz: see .ci/experiments.py")
    table = table.rename(columns=names).reindex(columns=[*PUBLISHED, *names.values()])
    return table.dropna(subset="predicted")


def publish(folder: Path, faces: pd.DataFrame, **runs: np.ndarray) -> None:
    """Add (or replace) ages in years of these faces by `runs` in a folder's predictions.csv.gz."""
    path = folder / "predictions.csv.gz"
    with FileLock(folder / ".results.json.lock"):
        table = (pd.read_csv(path) if path.is_file() else faces[PUBLISHED]).set_index("file")
        table = table.copy()  # in one piece, which more columns can join
        for run, ages in runs.items():
            table.loc[faces["file"], run] = np.round(np.asarray(ages, float), 2)
        packed = {"method": "gzip", "mtime": 0}  # the same bytes for the same numbers
        write_atomically(path, lambda file: table.to_csv(file, compression=packed))


def age_band(ages: pd.Series) -> pd.Series:
    """The band of AGE_BANDS for each age in years, as an ordered categorical."""
    return pd.cut(ages, [*AGE_BANDS.values(), np.inf], right=False, labels=list(AGE_BANDS))


def mean_interval(values: np.ndarray, groups: pd.Series, draws: int = 2000, over=1.0) -> dict:
    """Mean of `values` [N], or its ratio to that of `over`, and an interval: a bootstrap of whole
    duplicate groups, whose errors are alike (Davison & Hinkley, 1997, ch. 3.8). NaN if N is 0."""
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
    error, group = predictions["predicted"] - predictions["age"], predictions["group"]
    figures = {"MAE": error.abs(), "CS@5": error.abs() <= 5, "bias": error}
    return pd.DataFrame([mean_interval(v, group) for v in figures.values()], list(figures))


def metrics_by(predictions: pd.DataFrame, key: str | pd.Series, metric="MAE") -> pd.DataFrame:
    """One of `metrics` for each value of a column or a series: a row each."""
    rows = {k: metrics(part).loc[metric] for k, part in predictions.groupby(key, observed=True)}
    return pd.DataFrame(rows).T.astype({"n": int}).rename_axis(getattr(key, "name", key))


def label_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Every pair of byte-identical files: file, other_file, age, other_age, difference, group."""
    faces = table.set_index("sha256")[["file", "age", "group"]]
    pairs = faces.join(faces.add_prefix("other_")).query("file < other_file").reset_index(drop=True)
    return pairs.assign(difference=(pairs["age"] - pairs["other_age"]).abs())


def label_noise(pairs: pd.DataFrame) -> dict:
    """The MAE (years) of labels with independent normal errors that differ as these pairs do."""
    return mean_interval(pairs["difference"] / np.sqrt(2), pairs["group"])


def standardised(predictions: pd.DataFrame, key="ethnicity", draws=2000, fewest=5) -> tuple:
    """MAE (years) of each group of people at equal age: the sum over bands of share x MAE; and its
    resamples [draws, groups]. Bands with fewer than `fewest` faces of a group are dropped, or
    ValueError if all are."""
    *rows, group = _comparable(predictions, key, fewest)
    resamples = [_at_equal_age(*rows, drawn[group]) for drawn in _resamples(max(group) + 1, draws)]
    low, high = np.nanquantile(resamples, [0.025, 0.975], axis=0)
    table = {"value": _at_equal_age(*rows), "low": low, "high": high, "n": np.bincount(rows[0])}
    return pd.DataFrame(table, np.unique(predictions[key].astype(str))), np.array(resamples)


def gap(table: pd.DataFrame, resamples: np.ndarray) -> dict:
    """Largest minus smallest MAE (years) of `standardised`. Of noisy means it is too large on
    average: a basic bootstrap interval (Davison & Hinkley, ch. 5.2), at least 0."""
    value, n = float(np.ptp(table["value"])), int(table["n"].sum())
    low, high = 2 * value - np.nanquantile(np.ptp(resamples, axis=1), [0.975, 0.025])
    return {"value": value, "low": max(0.0, low), "high": max(0.0, high), "n": n}


def _comparable(predictions: pd.DataFrame, key: str, fewest: int) -> list[np.ndarray]:
    """People, band, its share, error and duplicate group of the faces in bands that are kept."""
    people, error = predictions[key].astype(str), predictions["predicted"] - predictions["age"]
    bands = age_band(predictions["age"])
    counts = pd.crosstab(bands, people)[lambda counts: (counts >= fewest).all(axis=1)]
    if counts.empty:
        raise ValueError(f"no age band has {fewest} faces of every {key}: nothing to compare")
    share = bands.astype(object).map(dict(counts.sum(axis=1)))
    people, group = pd.factorize(people, sort=True)[0], pd.factorize(predictions["group"])[0]
    band, share = counts.index.get_indexer(bands), share.fillna(0).to_numpy(float)
    return [x[band >= 0] for x in (people, band, share, error.abs().to_numpy(float), group)]


def _at_equal_age(people, band, share, error, weights=1) -> np.ndarray:
    """MAE of each group: a face weighs its band's share over the count of its group and band."""
    cell, weights = people * (band.max() + 1) + band, np.broadcast_to(weights, people.shape)
    weights = weights * share / np.maximum(np.bincount(cell, weights)[cell], 1)
    with np.errstate(invalid="ignore"):  # a resample may lack a whole group
        return np.bincount(people, weights * error) / np.bincount(people, weights)


def calibration(predictions: pd.DataFrame) -> dict:
    """The median of label minus answer (years) in each band of predicted age; 0 if n < SMALL."""
    off = predictions["age"] - predictions["predicted"]
    found = off.groupby(age_band(predictions["predicted"]), observed=False).agg(["median", "size"])
    years = found["median"].where(found["size"] >= SMALL, 0).round(2)
    return {"edges": list(AGE_BANDS.values()), "years": years.tolist()}


def calibrate(predicted, table: dict) -> np.ndarray:
    """Predicted ages (years) [N] moved by a table of `calibration`."""
    predicted, bands = np.asarray(predicted, float), np.digitize(predicted, table["edges"][1:])
    return np.maximum(predicted + np.take(table["years"], bands), 0)


def conformal(predictions: pd.DataFrame, level: float = 0.9) -> dict:
    """How many spreads an interval must reach to hold `level` of the ages, by predicted age (edges
    of bands in years): the ceil((n + 1) level)-th smallest of a band's n errors over spreads, or of
    all if n < SMALL. Split-conformal, on new faces (Angelopoulos & Bates, 2021, sec. 2)."""
    scores = (predictions["predicted"] - predictions["age"]).abs() / predictions["spread"]
    bands = scores.groupby(age_band(predictions["predicted"]), observed=False)
    parts = [[*(own if len(own) >= SMALL else scores), np.inf] for _, own in bands]
    factors = np.round([np.quantile(own, level, method="inverted_cdf") for own in parts], 4)
    return {"level": level, "edges": list(AGE_BANDS.values()), "factors": factors.tolist()}


def interval(predicted, spread, table: dict) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest age (years, never below 0) [N] of each face, by a table of `conformal`."""
    predicted, bands = np.asarray(predicted, float), np.digitize(predicted, table["edges"][1:])
    reach = np.take(table["factors"], bands) * np.asarray(spread)
    return np.maximum(predicted - reach, 0), predicted + reach


def record(folder: Path, **figures) -> None:
    """Add figures, tables of them, nested dicts or facts to a folder's `results.json`. What else is
    in it stays, also where two notebooks record at once. Raises TypeError for what JSON lacks."""
    path = folder / "results.json"
    with FileLock(folder / ".results.json.lock"):  # which makes the folder, too
        results = json.loads(path.read_text()) if path.is_file() else {}
        text = json.dumps(results | _plain(figures), indent=1, sort_keys=True, allow_nan=False)
        write_atomically(path, lambda file: file.write_text(text + "\n"))


def _plain(value, name: str = ""):
    """As JSON holds it: four decimals, or four digits where that would be fewer; NaN is null."""
    if isinstance(value, pd.DataFrame | pd.Series | dict):
        return {str(key): _plain(item, key) for key, item in getattr(value, "T", value).items()}
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, float) or not np.isfinite(value):
        return None if isinstance(value, float) else value
    form = ".4f" if abs(value) >= 0.1 else ".4g"
    return int(value) if name == "n" else float(format(value, form))


def show(figure: dict | pd.Series, digits: int = 2) -> str:
    """A figure as text: `4.90 [4.71, 5.10], n = 2,384`."""
    return "{value:.{d}f} [{low:.{d}f}, {high:.{d}f}], n = {n:,.0f}".format(d=digits, **figure)
