"""How large the error is, for whom, and how sure we are: figures with 95 % intervals.

Works on the prediction table: the face table plus a column `predicted` (years).
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock

from utils.model import write_atomically

AGE_BANDS = {"0-9": 0, "10-19": 10, "20-29": 20, "30-39": 30, "40-49": 40, "50-59": 50,
             "60-69": 60, "70+": 70}  # fmt: skip
SMALL = 30  # faces: below this a cell's figure is not worth comparing
DRAWS = 2000  # bootstrap resamples


def age_band(ages: pd.Series) -> pd.Series:
    """The band of AGE_BANDS for each age in years, as an ordered categorical."""
    return pd.cut(ages, [*AGE_BANDS.values(), np.inf], right=False, labels=list(AGE_BANDS))


def mean_interval(values: np.ndarray, groups: pd.Series, draws: int = DRAWS) -> dict:
    """Mean of `values` with its 95 % percentile interval from a cluster bootstrap.

    Faces of one duplicate group are drawn together, since their errors are not independent
    (Davison & Hinkley, Bootstrap Methods, 1997, ch. 3.8). Returns value, low, high, n; the
    figures are NaN where there is no face.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        return {"value": np.nan, "low": np.nan, "high": np.nan, "n": 0}
    low, high = np.quantile(_resampled(groups, draws, values)[0], [0.025, 0.975])
    return {"value": values.mean(), "low": low, "high": high, "n": len(values)}


def ratio_interval(
    values: np.ndarray, base: np.ndarray, groups: pd.Series, draws: int = DRAWS
) -> dict:
    """Mean of `values` over the mean of `base`, both of the same faces, as `mean_interval` does."""
    above, below = _resampled(groups, draws, np.asarray(values), np.asarray(base))
    low, high = np.quantile(above / below, [0.025, 0.975])
    return {"value": np.mean(values) / np.mean(base), "low": low, "high": high, "n": len(values)}


def _resampled(groups: pd.Series, draws: int, *columns: np.ndarray) -> np.ndarray:
    """Means [columns, draws] of each column over the same resamples of whole groups."""
    codes = pd.factorize(groups)[0]
    sizes = np.bincount(codes)
    sums = np.stack([np.bincount(codes, column) for column in columns])
    rng, share = np.random.default_rng(0), np.full(len(sizes), 1 / len(sizes))
    means = np.empty((len(columns), draws))
    for i in range(draws):
        weight = rng.multinomial(len(sizes), share)
        means[:, i] = sums @ weight / (weight @ sizes)
    return means


def metrics(predictions: pd.DataFrame) -> pd.DataFrame:
    """MAE (years), CS@5 (share within 5 years) and bias (years, + is too old), with intervals."""
    error = (predictions["predicted"] - predictions["age"]).to_numpy(float)
    figures = {"MAE": np.abs(error), "CS@5": np.abs(error) <= 5, "bias": error}
    rows = {name: mean_interval(v, predictions["group"]) for name, v in figures.items()}
    return pd.DataFrame(rows).T.astype({"n": int})


def metrics_by(
    predictions: pd.DataFrame, key: str | pd.Series, metric: str = "MAE"
) -> pd.DataFrame:
    """One of `metrics` for each value of a column or a series: a row each, value, low, high, n."""
    parts = predictions.groupby(key, observed=True)
    rows = {name: metrics(part).loc[metric] for name, part in parts}
    return pd.DataFrame(rows).T.astype({"n": int}).rename_axis(getattr(key, "name", key))


def constant_errors(train: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    """Absolute errors (years) on `rows` of predicting the training median, the best constant."""
    return np.abs(rows["age"] - train["age"].median()).to_numpy(float)


def label_pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Every pair of byte-identical files: both names, the two ages and their difference (years)."""
    same = table[table.duplicated("sha256", keep=False)].groupby("sha256", sort=False)
    rows = [
        (a.file, b.file, a.age, b.age, abs(a.age - b.age), a.group)
        for _, part in same
        for a, b in itertools.combinations(part.itertuples(), 2)
    ]
    columns = ["file", "other_file", "age", "other_age", "difference", "group"]
    numbers = dict.fromkeys(["age", "other_age", "difference"], table["age"].dtype)
    return pd.DataFrame(rows, columns=columns).astype(numbers)  # numbers, even where there is none


def label_noise(pairs: pd.DataFrame) -> dict:
    """The MAE that label noise alone would give, in years, with interval and number of pairs.

    Two labels of one picture differ by |e1 - e2|. If both errors are independent and normal with
    one spread, the mean of |e| is the mean difference divided by the square root of two.
    """
    return mean_interval(pairs["difference"] / np.sqrt(2), pairs["group"])


def record(folder: Path, **figures) -> None:
    """Add figures to `results.json` in a folder; each is a dict(value, low, high, n), a nested
    dict of such, or plain facts. NaN becomes null. Other figures in the file stay as they are,
    also where two notebooks record at once, or one is killed while it does."""
    text = json.dumps(figures, default=_plain)
    new = json.loads(text, parse_float=_rounded, parse_constant=lambda nan: None)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    with FileLock(folder / ".results.json.lock"):
        results = json.loads(path.read_text()) if path.is_file() else {}
        text = json.dumps(results | new, indent=1, sort_keys=True) + "\n"
        write_atomically(path, lambda file: file.write_text(text))


def as_figures(table: pd.DataFrame) -> dict:
    """Rows of value, low, high, n as the nested dict that `record` takes."""
    return {str(name): row for name, row in table[["value", "low", "high", "n"]].T.items()}


def _plain(value):
    if isinstance(value, pd.Series):
        return {key: int(v) if key == "n" else v for key, v in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"cannot be written to results.json: {type(value).__name__}")


def _rounded(text: str) -> float:
    """Four decimals, or four digits where that would be fewer: a small p-value is not 0."""
    value = float(text)
    return round(value, 4) if abs(value) >= 0.1 else float(f"{value:.4g}")


def show(figure: dict | pd.Series, digits: int = 2) -> str:
    """A figure as text: `4.90 [4.71, 5.10], n = 2,384`."""
    value, low, high = (f"{figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}], n = {int(figure['n']):,}"
