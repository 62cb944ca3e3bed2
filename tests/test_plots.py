"""Figures: the licence is kept, colours are fixed, intervals are drawn."""

from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from utils import plots
from utils.settings import get_settings

FACES = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
MAPS = np.linspace(-1, 1, 9, dtype=np.float32).reshape(1, 3, 3).repeat(3, 0)
UTKFACE, SAMPLE = get_settings("utkface"), get_settings("sample")
TITLES = ["1 year", "2 years", "3 years"]


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def test_single_faces_of_utkface_are_not_published():
    publish = replace(UTKFACE, publish=True)
    for counts in (None, [50, 49, 400]):
        with pytest.raises(ValueError, match="may not be published: show the astronaut, drawn"):
            plots.show_faces(FACES, TITLES, publish, counts)
        with pytest.raises(ValueError, match="may not be published"):
            plots.show_maps(FACES, MAPS, TITLES, publish, counts)
    for settings, counts in (
        (publish, [50, 60, 400]),  # averages
        (UTKFACE, None),  # the reader's own run
        (replace(SAMPLE, publish=True), None),
        (None, None),  # the astronaut, drawn faces
    ):
        figure = plots.show_faces(FACES, TITLES, settings, counts, columns=2)
        assert np.array_equal([axis.images[0].get_array() for axis in figure.axes], FACES)
        assert [axis.get_title() for axis in figure.axes] == TITLES
        assert len(plots.show_maps(FACES, MAPS, TITLES, settings, counts).axes) == 4
    assert plots.show_faces(FACES[:0], [], publish, []).axes == []


def test_a_map_is_signed_and_zero_is_the_middle_of_its_colours():
    face, heat = plots.show_maps(FACES, MAPS, TITLES, None).axes[0].images
    assert np.ptp(face.get_array(), axis=2).max() == 0, "the face is grey"
    assert heat.get_clim() == (-1, 1)
    assert heat.get_array()[0, 0] == -1 and heat.get_array()[-1, -1] == 1


def test_the_astronaut_and_her_face_crop():
    photo, crop = plots.astronaut(), plots.astronaut(aligned=True)
    assert photo.shape == (512, 512, 3) and photo.dtype == np.uint8
    assert crop.shape == (128, 128, 3) and crop.dtype == np.uint8
    assert crop[33:43].mean() < crop[48:60].mean(), "eyes are darker than cheeks"
    assert "NASA" in plots.ATTRIBUTION and "public domain" in plots.ATTRIBUTION


def test_intervals_are_drawn_from_low_to_high_with_n():
    table = pd.DataFrame(
        {"value": [5.0, 3.0], "low": [4.0, 2.5], "high": [7.0, 3.5], "n": [1234, 20]},
        index=["White", "Asian"],
    )
    _, axis = plt.subplots()
    plots.with_intervals(axis, table, {"White": "red"})
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["White  (n = 1,234)", "Asian  (n = 20)"]
    bars = [container[2][0].get_segments()[0] for container in axis.containers]
    assert np.allclose(bars, [[[4, 0], [7, 0]], [[2.5, 1], [3.5, 1]]])
    assert [container[0].get_color() for container in axis.containers] == ["red", plots.ACCENT]
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "the first row stands on top"
