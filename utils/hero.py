"""The picture at the top of the README: average faces by age, above the network's answers.

`python -m utils.hero` draws average_faces_by_age.png into figures/ while AGE_PUBLISH=1, else into
build/figures/.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from utils.settings import ROOT, get_settings

AGES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90)  # years: the middle of each average
SPAN = 2  # years to either side
FEWEST_ANSWERS = 20  # faces: below this, five years of labelled ages are left out
FEWEST = 50  # faces in an average: fewer might show somebody (licence of UTKFace)


def average_faces(table: pd.DataFrame, pixels: np.ndarray) -> dict[int, tuple[np.ndarray, int]]:
    """For each of AGES the mean of all training faces within SPAN years, and their number.

    Pixels are uint8 [N, H, W, 3], the means float in 0-1. Raises ValueError where one has fewer
    than FEWEST faces.
    """
    averages = {}
    for age in AGES:
        near = (table["age"] - age).abs() <= (0 if age < SPAN else SPAN)
        rows = np.flatnonzero(near & (table["split"] == "train"))
        if len(rows) < FEWEST:
            raise ValueError(f"{len(rows)} faces of about {age} years: {FEWEST} are needed")
        averages[age] = pixels[rows].mean(0, dtype=np.float64) / 255, len(rows)
    return averages


def draw(averages: dict[int, tuple[np.ndarray, int]], predictions: pd.DataFrame):
    """The figure, from averages and the table of test predictions (age, predicted; years)."""
    import matplotlib.pyplot as plt

    from utils.plots import ACCENT, set_style

    set_style()
    figure, axes = plt.subplots(2, 1, figsize=(11, 5.4), height_ratios=[1, 3])
    faces, answers = axes
    for place, (age, (face, count)) in enumerate(averages.items()):
        faces.imshow(face, extent=(place + 0.03, place + 0.97, 0, 0.94))
        text = f"$\\bf{{{age}}}$  ({count:,})"
        faces.text(place + 0.5, -0.05, text, ha="center", va="top", fontsize=8.5)
    faces.set(xlim=(0, len(averages)), ylim=(-0.3, 0.94))
    faces.set_title("The average face at each age, in years, and the number of faces in it")
    faces.axis("off")
    bins = pd.cut(predictions["age"], np.arange(0, 101, 5), right=False)
    grouped = predictions.groupby(bins, observed=True)["predicted"]
    few = grouped.size() < FEWEST_ANSWERS
    middle = np.array([interval.mid for interval in grouped.size()[~few].index])
    for low, high, alpha, label in (
        (0.05, 0.95, 0.15, "90 % of the answers"),
        (0.25, 0.75, 0.3, "half of them"),
    ):
        ends = [grouped.quantile(share)[~few] for share in (low, high)]
        answers.fill_between(middle, *ends, color=ACCENT, alpha=alpha, linewidth=0, label=label)
    median = grouped.median()[~few]
    answers.plot(middle, median, color=ACCENT, linewidth=2.5, label="the median answer")
    answers.plot([0, 100], [0, 100], color="black", linewidth=1, linestyle="--", label="no error")
    answers.set(
        xlabel="labelled age (years)", ylabel="answer (years)", xlim=(0, 100), ylim=(0, 100)
    )
    answers.set_title(f"What the network answers for {len(predictions):,} faces it has never seen")
    answers.legend(loc="upper left")
    return figure


def main() -> None:
    """Draw the picture from UTKFace and the published predictions."""
    from utils.plots import save
    from utils.sources import load_faces

    settings = get_settings("utkface")
    faces = load_faces(settings)
    predictions = pd.read_csv(ROOT / "figures" / "predictions_test.csv")
    save(draw(average_faces(faces.table, faces.pixels), predictions), settings,
         "average_faces_by_age")  # fmt: skip
    print(f"average_faces_by_age.png drawn in {settings.figures.name}/")


if __name__ == "__main__":
    main()
