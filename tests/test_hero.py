"""The picture of the README: no average of fewer than fifty faces; bands hold what they say."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from utils.hero import AGES, FEWEST, average_faces, draw


@pytest.fixture
def faces() -> tuple[pd.DataFrame, np.ndarray]:
    """Fifty training faces of each age, grey by age, and test faces that must not be used."""
    ages = np.repeat(AGES, FEWEST)
    table = pd.DataFrame(
        {"age": np.tile(ages, 2), "split": np.repeat(["train", "test"], len(ages))}
    )
    shade = np.where(table["split"] == "train", table["age"], 255)
    return table, np.broadcast_to(shade[:, None, None, None], (len(table), 8, 8, 3)).astype(
        np.uint8
    )


def test_averages_are_of_training_faces_near_each_age(faces):
    averages = average_faces(*faces)
    assert list(averages) == list(AGES)
    for age, (face, count) in averages.items():
        assert count == FEWEST >= 50 and face.shape == (8, 8, 3)
        assert face == pytest.approx(age / 255)


def test_an_average_of_too_few_faces_is_refused(faces):
    table, pixels = faces
    rows = table.index != np.flatnonzero(table["age"] == 90)[0]
    with pytest.raises(ValueError, match="49 faces of about 90 years: 50 are needed"):
        average_faces(table[rows].reset_index(drop=True), pixels[rows])


def test_the_bands_hold_the_answers_they_say(faces):
    rng = np.random.default_rng(0)
    age = rng.integers(0, 80, 4000)
    predictions = pd.DataFrame({"age": age, "predicted": age + rng.uniform(-10, 10, 4000)})
    few = pd.DataFrame({"age": [97] * 5, "predicted": 50.0})
    figure = draw(average_faces(*faces), pd.concat([predictions, few]))
    images, answers = figure.axes
    assert len(images.images) == len(AGES)
    wide, half = (band.get_paths()[0].vertices for band in answers.collections)
    at = np.isclose(wide[:, 0], 42.5)
    assert np.ptp(wide[at, 1]) == pytest.approx(18, abs=2.5)
    assert np.ptp(half[np.isclose(half[:, 0], 42.5), 1]) == pytest.approx(10, abs=2.5)
    assert wide[:, 0].max() < 80, "five faces make no band"
    plt.close(figure)
