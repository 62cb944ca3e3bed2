"""One look for every figure: style sheet, fixed colours, grids of faces that may be shown."""

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import skimage.data
from matplotlib.colors import LinearSegmentedColormap

from utils.faces import ETHNICITIES
from utils.photo import align
from utils.settings import ROOT, Settings

# Safe for colour-blind readers, in one fixed order: Okabe & Ito's, then some of Tol's.
COLOURS = "#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #D55E00 #332288 #882255 #44AA99 #999933".split()
ACCENT, MUTED = COLOURS[0], "#8c8c8c"
MAP_COLOURS = LinearSegmentedColormap.from_list("years", ["#2166ac", "#bdbdbd", "#b2182b"])
FEWEST = 50  # faces in an average that may be published (licence of UTKFace)
ATTRIBUTION = "Eileen Collins; NASA, Great Images in NASA, public domain; via scikit-image"
# Eyes, nose and mouth corners of the astronaut: x and y in px, as the detector finds them.
LANDMARKS = ((204.8, 101.7), (248.6, 106.0), (225.1, 128.6), (201.6, 140.9), (242.3, 144.9))


def set_style() -> None:
    """The course's matplotlib style; figures stay readable at half width."""
    plt.style.use(ROOT / "utils" / "course.mplstyle")


def group_colours(groups: pd.Series) -> dict[str, str]:
    """A colour for each category, in order: UTKFace's five keep theirs, others get what is left."""
    names = [str(name) for name in groups.astype("category").cat.categories]
    known = {n: c for n, c in zip(ETHNICITIES, COLOURS, strict=False) if n in names}
    spare = iter([c for c in COLOURS if c not in known.values()] * len(names))
    return {name: known.get(name) or next(spare) for name in names}


def astronaut(aligned: bool = False) -> np.ndarray:
    """The photograph that pages may show (ATTRIBUTION): uint8 RGB [512, 512, 3]; or its `aligned`
    face crop [128, 128, 3], cut as the course cuts every photo, without a detector."""
    photo = skimage.data.astronaut()
    return align(photo, np.array(LANDMARKS)) if aligned else photo


def show_faces(pixels: np.ndarray, titles: list[str], settings: Settings | None = None,
               counts: list[int] | None = None, columns: int = 8) -> plt.Figure:  # fmt: skip
    """A grid of faces (uint8 [N, H, W, 3]) with a title each. `settings` are those of the set that
    they come from (None: the astronaut, drawn faces). Where each is an average, `counts` says of
    how many. Raises ValueError where UTKFace's licence forbids to publish what is shown."""
    single = counts is None or min(counts, default=FEWEST) < FEWEST
    if settings and settings.publish and settings.faces != "sample" and single:
        way_out = f"the astronaut, drawn faces, or averages with counts=[...] of {FEWEST} or more"
        raise ValueError(f"single faces of UTKFace may not be published: show {way_out}")
    columns = max(1, min(columns, len(pixels)))
    rows, side = max(1, -(-len(pixels) // columns)), min(2.2, 9 / columns)
    figure = plt.figure(figsize=(side * columns, (side + 0.25) * rows))
    for place, (face, title) in enumerate(zip(pixels, titles, strict=True), 1):
        axis = figure.add_subplot(rows, columns, place)
        axis.imshow(face)
        axis.axis("off")
        axis.set_title(title, fontsize=8, fontweight="normal", loc="center", pad=3)
    return figure


def show_maps(pixels: np.ndarray, maps: np.ndarray, titles: list[str], settings: Settings | None,
              counts: list[int] | None = None) -> plt.Figure:  # fmt: skip
    """Signed maps [N, h, w] in years over faces: red raises the age, blue lowers it, one scale for
    all. Faces, settings, counts and the ValueError are those of `show_faces`."""
    greys = np.stack([cv2.cvtColor(face, cv2.COLOR_RGB2GRAY) for face in pixels])
    figure = show_faces(np.stack([greys] * 3, -1), titles, settings, counts)
    axes, most = figure.axes, np.quantile(np.abs(maps), 0.995)
    for axis, values in zip(axes, maps, strict=True):
        large = cv2.resize(values, greys.shape[:0:-1], interpolation=cv2.INTER_CUBIC)
        # Full colour, more or less transparent: a pale one would draw lines around the zeros.
        alpha = 0.85 * np.clip(np.abs(large) / most, 0, 1)
        axis.imshow(np.sign(large), cmap=MAP_COLOURS, vmin=-1, vmax=1, alpha=alpha)
    scale = plt.cm.ScalarMappable(plt.Normalize(-most, most), MAP_COLOURS)
    figure.colorbar(scale, ax=axes, fraction=0.03, pad=0.02).set_label("years per place", size=9)
    return figure


def with_intervals(axis: plt.Axes, table: pd.DataFrame, colours: dict | None = None) -> None:
    """Horizontal points with 95 % bars, from rows of value, low, high, n; n beside each name."""
    for place, (name, row) in enumerate(table.iterrows()):
        bars = [[row["value"] - row["low"]], [row["high"] - row["value"]]]
        colour = (colours or {}).get(name, ACCENT)
        axis.errorbar(row["value"], place, xerr=bars, fmt="o", color=colour, capsize=3)
    axis.set_yticks(range(len(table)), [f"{k}  (n = {n:,.0f})" for k, n in table["n"].items()])
    axis.set_ylim(len(table) - 0.5, -0.5)


def save(figure: plt.Figure, settings: Settings, name: str) -> None:
    """Write a figure as PNG into the run's figures folder."""
    settings.figures.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.figures / f"{name}.png", dpi=110, metadata={"Software": None})
