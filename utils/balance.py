"""Weights against imbalance, one a row of the face table, counted on the training faces only."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.ndimage import gaussian_filter1d

from utils.evaluation import age_band


def cell_weights(table: pd.DataFrame, power: float = 0.5) -> np.ndarray:
    """Weights that even out the cells of ethnicity and age band, float64 [rows], mean 1 in train.

    A face weighs count ** -power, with the count of its cell in the training part: 1 would give
    every cell the same say, however few its faces; 0 changes nothing.
    """
    cells = table["ethnicity"].astype(str) + " " + age_band(table["age"]).astype(str)
    counts = cells.map(cells[table["split"] == "train"].value_counts()).fillna(1)
    return _scaled(counts.to_numpy(float) ** -power, table)


def lds_weights(table: pd.DataFrame, sigma: float = 2.0, most: float = 5.0) -> np.ndarray:
    """Label distribution smoothing within each ethnicity, float64 [rows], mean 1 in train.

    A face weighs one over the square root of the smoothed count of its age (kernel of `sigma`
    years) among the training faces of its group, at most `most` times the mean (Yang et al.,
    "Delving into Deep Imbalanced Regression", ICML 2021).
    """
    weights = np.ones(len(table))
    ages = table["age"].to_numpy()
    for _, rows in table.groupby("ethnicity", observed=True).indices.items():
        train = rows[(table["split"].iloc[rows] == "train").to_numpy()]
        counts = np.bincount(ages[train], minlength=ages.max() + 1)
        smooth = gaussian_filter1d(counts.astype(float), sigma, mode="constant")
        weights[rows] = 1 / np.sqrt(np.maximum(smooth[ages[rows]], 0.1))
    return _scaled(np.minimum(_scaled(weights, table), most), table)


def _scaled(weights: np.ndarray, table: pd.DataFrame) -> np.ndarray:
    return weights / weights[(table["split"] == "train").to_numpy()].mean()
