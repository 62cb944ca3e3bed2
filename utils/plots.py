"""One look for every figure: style sheet, fixed colours, face grids that respect the licence."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from utils.faces import ETHNICITIES, GENDERS
from utils.settings import Settings

# Okabe & Ito's palette, safe for colour-blind readers, in one fixed order.
ETHNICITY_COLOURS = dict(
    zip(ETHNICITIES, ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"), strict=True)
)
# For groups of other names: those that are free, then these (the first is Okabe & Ito's).
MORE_COLOURS = ("#D55E00", "#332288", "#882255", "#44AA99", "#999933", "#000000")
GENDER_COLOURS = dict(zip(GENDERS, ("#0072B2", "#D55E00"), strict=True))
ACCENT, MUTED = "#0072B2", "#8c8c8c"
MAP_COLOURS = LinearSegmentedColormap.from_list("years", ["#2166ac", "#bdbdbd", "#b2182b"])
MOSAIC = 12  # cells across a published face: too few to recognise anyone


def group_colours(groups: pd.Series) -> dict[str, str]:
    """A colour for each category of a column, in their order, whatever your groups are called.

    The five names of UTKFace keep theirs; others take what is free, the same for the same names.
    """
    names = [str(name) for name in groups.astype("category").cat.categories]
    free = [colour for name, colour in ETHNICITY_COLOURS.items() if name not in names]
    spare = cycle((*free, *MORE_COLOURS))
    return {name: ETHNICITY_COLOURS.get(name) or next(spare) for name in names}


def set_style() -> None:
    """The course's matplotlib style; figures stay readable at half width."""
    sns.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    plt.rcParams.update({
        "figure.figsize": (9, 3.6), "figure.dpi": 90, "figure.constrained_layout.use": True,
        "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#4d4d4d",
        "grid.color": "#e6e6e6", "legend.frameon": False,
    })  # fmt: skip


def pixelate(pixels: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] as mosaics of MOSAIC x MOSAIC cells, same shape."""
    size = pixels.shape[1:3][::-1]
    cells = [cv2.resize(p, (MOSAIC, MOSAIC), interpolation=cv2.INTER_AREA) for p in pixels]
    return np.stack([cv2.resize(c, size, interpolation=cv2.INTER_NEAREST) for c in cells])


def show_faces(
    pixels: np.ndarray, titles: Sequence[str], settings: Settings, columns: int = 8
) -> Figure:
    """A grid of faces (uint8 [N, H, W, 3]) with a title each.

    Faces of UTKFace are pixelated while notebooks are published: its licence forbids passing
    them on. In the reader's own run they are shown as they are.
    """
    pixels = np.asarray(pixels)
    if settings.publish and settings.faces != "sample":
        pixels = pixelate(pixels)
    rows = max(1, -(-len(pixels) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(1.15 * columns, 1.4 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, face, title in zip(axes.flat, pixels, titles, strict=False):
        axis.imshow(face, interpolation="nearest")
        axis.set_title(title, fontsize=8, fontweight="normal", loc="center", pad=3)
    return figure


def show_maps(
    pixels: np.ndarray,
    maps: np.ndarray,
    titles: Sequence[str],
    settings: Settings,
    averages: bool = False,
    columns: int = 8,
) -> Figure:
    """Signed maps [N, h, w] in years over faces (uint8 [N, H, W, 3]): red raises the age, blue
    lowers it, one scale for all. Single faces of UTKFace are pixelated while publishing;
    `averages` says that each face is the average of many, so that none needs to be."""
    pixels = np.asarray(pixels)
    way = cv2.INTER_CUBIC
    if settings.publish and settings.faces != "sample" and not averages:
        pixels, way = pixelate(pixels), cv2.INTER_NEAREST  # both in cells, without a face's texture
        maps = np.stack(
            [cv2.resize(m, (MOSAIC, MOSAIC), interpolation=cv2.INTER_AREA) for m in maps]
        )
    columns = min(columns, len(pixels))
    rows, cell = -(-len(pixels) // columns), min(1.9, 10 / columns)
    size = (cell * columns + 0.9, (cell + 0.25) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    height, width = pixels.shape[1:3]
    most = np.quantile(np.abs(maps), 0.995)
    for axis in axes.flat:
        axis.axis("off")
    for axis, face, values, title in zip(axes.flat, pixels, maps, titles, strict=False):
        grey = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)
        axis.imshow(grey, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        large = cv2.resize(values, (width, height), interpolation=way)
        # Full colour, more or less transparent: a pale one would draw lines around the zeros.
        alpha = 0.85 * np.clip(np.abs(large) / most, 0, 1)
        colours = dict(cmap=MAP_COLOURS, vmin=-1, vmax=1, alpha=alpha)
        axis.imshow(np.sign(large), interpolation="nearest", **colours)
        axis.set_title(title, fontsize=8, fontweight="normal", loc="center", pad=3)
    scale = plt.cm.ScalarMappable(plt.Normalize(-most, most), MAP_COLOURS)
    bar = figure.colorbar(scale, ax=axes, fraction=0.03, aspect=12 * rows, pad=0.02)
    bar.set_label("years per place", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def show_answers(chips: np.ndarray, answers: pd.DataFrame, level: float | None) -> Figure:
    """A card for each face (uint8 [N, H, W, 3]): age, interval of this level, warnings.

    `answers` has a row a face: age, low and high in years (NaN where there is none), warnings.
    """
    columns = min(len(chips), 4)
    rows = -(-len(chips) // columns)
    size = (2.6 * columns, 3.3 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, chip, answer in zip(axes.flat, chips, answers.itertuples(), strict=False):
        axis.imshow(chip, interpolation="nearest")
        age = "no answer" if np.isnan(answer.age) else f"looks {answer.age:.0f}"
        axis.set_title(age, loc="center", fontsize=15)
        text = answer.warnings.replace("; ", "\n")
        if level and not np.isnan(answer.low):
            text = f"{answer.low:.0f} to {answer.high:.0f} ({level:.0%} interval)\n{text}"
        axis.text(0.5, -0.04, text, transform=axis.transAxes, ha="center", va="top", fontsize=9)
    figure.text(0.99, 0.005, "apparent age, not proof of age", ha="right", fontsize=7, color=MUTED)
    return figure


def with_intervals(axis: plt.Axes, table: pd.DataFrame, colours: dict | None = None) -> None:
    """Horizontal points with 95 % bars, from rows of value, low, high, n; n beside each name."""
    for place, (name, row) in enumerate(table.iterrows()):
        colour = (colours or {}).get(name, ACCENT)
        bars = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
        axis.errorbar(row["value"], place, xerr=bars, fmt="o", color=colour, capsize=3)
    names = [f"{name}  (n = {int(row['n']):,})" for name, row in table.iterrows()]
    axis.set_yticks(range(len(table)), names)
    axis.set_ylim(len(table) - 0.5, -0.5)


def save(figure: Figure, settings: Settings, name: str) -> None:
    """Write a figure as PNG into the run's figures folder."""
    settings.figures.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.figures / f"{name}.png", dpi=110, metadata={"Software": None})
