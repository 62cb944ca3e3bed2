"""Figures: the licence is kept, colours are fixed, intervals are drawn."""

import ast
from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from utils.faces import ETHNICITIES, GENDERS
from utils.plots import (
    ETHNICITY_COLOURS,
    GENDER_COLOURS,
    MOSAIC,
    group_colours,
    pixelate,
    save,
    set_style,
    show_faces,
    show_maps,
    with_intervals,
)
from utils.settings import ROOT, get_settings

FACES = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def shown(figure) -> list[np.ndarray]:
    return [image.get_array() for axis in figure.axes for image in axis.images]


@pytest.mark.parametrize("shape", [(128, 128), (200, 200), (64, 96)])
def test_a_mosaic_has_few_cells_and_the_same_shape(shape):
    faces = np.random.default_rng(1).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    mosaics = pixelate(faces)
    assert mosaics.shape == faces.shape and mosaics.dtype == np.uint8
    for mosaic in mosaics:
        for axis in (0, 1):
            borders = np.diff(mosaic.astype(int), axis=axis).any(axis=(1 - axis, 2))
            assert borders.sum() == MOSAIC - 1
        assert len(np.unique(mosaic.reshape(-1, 3), axis=0)) <= MOSAIC**2


def test_a_mosaic_has_twelve_cells_and_keeps_the_mean():
    assert MOSAIC <= 12
    assert pixelate(FACES).mean(axis=(1, 2)) == pytest.approx(FACES.mean(axis=(1, 2)), abs=2)


@pytest.mark.parametrize(
    ("faces", "publish", "pixelated"),
    [
        ("utkface", True, True),
        ("utkface", False, False),
        ("sample", True, False),
        ("sample", False, False),
    ],
)
def test_only_utkface_while_publishing_is_pixelated(faces, publish, pixelated):
    settings = replace(get_settings(faces), publish=publish)
    images = shown(show_faces(FACES, ["a", "b", "c"], settings))
    assert np.array_equal(images, pixelate(FACES) if pixelated else FACES)


def test_a_grid_shows_all_faces_with_their_titles():
    figure = show_faces(FACES, ["1 year", "2 years", "3 years"], get_settings("sample"), columns=2)
    assert len(figure.axes) == 4 and len(shown(figure)) == 3
    assert [axis.get_title() for axis in figure.axes] == ["1 year", "2 years", "3 years", ""]


def test_colours_are_fixed_and_different():
    assert list(ETHNICITY_COLOURS) == list(ETHNICITIES)
    assert list(GENDER_COLOURS) == list(GENDERS)
    assert len(set(ETHNICITY_COLOURS.values())) == len(ETHNICITIES)
    assert ETHNICITY_COLOURS["White"] == "#0072B2" and ETHNICITY_COLOURS["Others"] == "#56B4E9"


def test_other_groups_get_colours_of_their_own():
    known = group_colours(pd.Series(["White", "Others"]))
    assert known == {name: ETHNICITY_COLOURS[name] for name in ("Others", "White")}
    groups = pd.Series(pd.Categorical(["White", "B", "A"], ["White", "A", "B"]))
    colours = group_colours(groups)
    assert list(colours) == ["White", "A", "B"] and len(set(colours.values())) == 3
    assert colours["White"] == ETHNICITY_COLOURS["White"]
    assert group_colours(groups[::-1]) == colours, "the order of the rows decides nothing"
    many = group_colours(pd.Series([f"group {i:02d}" for i in range(11)]))
    assert len(set(many.values())) == 11
    assert len(group_colours(pd.Series([f"group {i:02d}" for i in range(30)]))) == 30


def test_an_empty_grid_is_drawn():
    assert shown(show_faces(FACES[:0], [], get_settings("sample"))) == []


def test_intervals_are_drawn_from_low_to_high_with_n():
    table = pd.DataFrame(
        {"value": [5.0, 3.0], "low": [4.0, 2.5], "high": [7.0, 3.5], "n": [1234, 20]},
        index=["White", "Asian"],
    )
    _, axis = plt.subplots()
    with_intervals(axis, table, ETHNICITY_COLOURS)
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == ["White  (n = 1,234)", "Asian  (n = 20)"]
    bars = [container[2][0].get_segments()[0] for container in axis.containers]
    assert np.allclose(bars, [[[4, 0], [7, 0]], [[2.5, 1], [3.5, 1]]])
    colours = [container[0].get_color() for container in axis.containers]
    assert colours == [ETHNICITY_COLOURS["White"], ETHNICITY_COLOURS["Asian"]]
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "the first row stands on top"


def test_save_writes_the_same_png_each_time(tmp_path):
    set_style()
    settings = replace(get_settings("sample"), figures=tmp_path / "new" / "figures")
    texts = []
    for _ in range(2):
        figure, axis = plt.subplots()
        axis.plot([1, 2, 3])
        save(figure, settings, "line")
        texts.append((settings.figures / "line.png").read_bytes())
    assert texts[0].startswith(b"\x89PNG") and texts[0] == texts[1]


def drawing_imports(source: str) -> set[str]:
    """Modules that a source imports when it is imported itself, and that bring pyplot with them."""
    names = set()
    todo = list(ast.parse(source).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += ast.iter_child_nodes(node)
    drawing = ("matplotlib", "seaborn", "utils.plots")
    return {name for name in names if f"{name}.".startswith(tuple(f"{d}." for d in drawing))}


def test_only_plots_imports_pyplot_at_import_time():
    assert drawing_imports("try:\n    import matplotlib.pyplot as plt\nfinally:\n    pass")
    assert drawing_imports("from utils.plots import save")
    assert drawing_imports("from utils import plots")
    assert not drawing_imports("def draw():\n    import matplotlib.pyplot as plt")
    found = {path.stem: drawing_imports(path.read_text()) for path in (ROOT / "utils").glob("*.py")}
    assert found.pop("plots")
    assert {module: names for module, names in found.items() if names} == {}


@pytest.mark.parametrize(("averages", "pixelated"), [(False, True), (True, False)])
def test_faces_under_maps_are_pixelated_unless_they_are_averages(averages, pixelated):
    settings = replace(get_settings("utkface"), publish=True)
    maps = np.linspace(-1, 1, 9, dtype=np.float32).reshape(1, 3, 3).repeat(len(FACES), 0)
    titles = [str(i) for i in range(len(FACES))]
    figure = show_maps(FACES, maps, titles, settings, averages)
    shown = [axis.images for axis in figure.axes if len(axis.images) == 2]
    assert len(shown) == len(FACES)
    greys = [cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in (pixelate(FACES) if pixelated else FACES)]
    for (face, heat), grey in zip(shown, greys, strict=True):
        assert np.array_equal(face.get_array(), grey)
        assert heat.get_clim() == (-1, 1), "zero is the middle of the colours"
        assert heat.get_array()[0, 0] < 0 < heat.get_array()[-1, -1]
