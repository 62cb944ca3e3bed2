"""Intervals for single ages, whose promise ("90 % of the ages lie within") holds on new faces.

Works on the prediction table: age, predicted and spread, all in years.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from utils.evaluation import AGE_BANDS, SMALL


def conformal(predictions: pd.DataFrame, level: float = 0.9) -> dict:
    """How many spreads an interval must reach to hold `level` of the ages, by predicted age.

    Split-conformal prediction (Angelopoulos & Bates, 2021, sec. 2): the factor of a band is the
    ceil((n + 1) level)-th smallest of its n errors, each divided by the face's spread. Learn it on
    faces that the network was not trained on. A band of fewer than SMALL faces takes the factor
    of all faces. Returns plain values for JSON: level, edges (years), factors.

    Raises ValueError where `level` is not between 0 and 1, or a spread is missing.
    """
    if not 0 < level < 1:
        raise ValueError(f"level {level} is not between 0 and 1")
    if not (predictions["spread"] > 0).all():
        raise ValueError("a face has no spread: the model's head must be a distribution")
    scores = ((predictions["predicted"] - predictions["age"]).abs() / predictions["spread"]).array
    edges = list(AGE_BANDS.values())
    bands = _band(predictions["predicted"], edges)
    whole, factors = _quantile(scores, level), []
    for band in range(len(edges)):
        own = scores[bands == band]
        factors.append(_quantile(own, level) if len(own) >= SMALL else whole)
    return {"level": level, "edges": edges, "factors": [round(float(f), 4) for f in factors]}


def interval(
    predicted: np.ndarray, spread: np.ndarray, table: dict
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest age (years, never below 0) of each face, by a table of `conformal`."""
    predicted, spread = np.asarray(predicted, float), np.asarray(spread, float)
    reach = np.asarray(table["factors"])[_band(predicted, table["edges"])] * spread
    return np.maximum(predicted - reach, 0), predicted + reach


def _band(predicted: np.ndarray, edges: list[float]) -> np.ndarray:
    return np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, len(edges) - 1)


def _quantile(scores: np.ndarray, level: float) -> float:
    place = int(np.ceil((len(scores) + 1) * level))
    return np.inf if place > len(scores) else np.sort(scores)[place - 1]
