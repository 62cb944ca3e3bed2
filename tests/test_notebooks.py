"""What every notebook keeps to. A rule is a function: notebook and file name -> complaints.

Each rule is itself tested on a good notebook and on bad ones, so that none can be empty.
"""

import base64
import html
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from io import BytesIO
from pathlib import Path

import cv2
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import seaborn as sns

from utils import colab
from utils.plots import set_style, show_faces
from utils.settings import ROOT, get_settings

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MEDIAN_LINES, MAX_LINES = 5, 40  # non-blank lines of a code cell
MAX_BYTES = 1_000_000
LAST_SECTIONS = ["Takeaways", "Limits", "Exercises", "Next"]
FOLDERS = ("home", "root", "tmp", "Users", "work")
ABSOLUTE = re.compile(rf"(?<![\w.~/:-])/(?:{'|'.join(FOLDERS)})\b|\b[A-Z]:\\")
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
BOLD_NUMBER = re.compile(r"\*\*([+\-−±~]?\d[^*]*)\*\*")
TILE = 24  # px: side of the windows that are searched for photographic texture
LITTLE = 24  # levels of 255: neighbouring pixels of a photograph seldom differ by more
MOST = 0.75  # of the neighbours in a window; real faces reach 0.88 or more, mosaics 0.5 or less


# Reading a notebook


def joined(text: str | list[str]) -> str:
    return "".join(text)


def cells(notebook: dict, kind: str) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell: dict) -> str:
    return joined(cell["source"])


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def lines(cell: dict) -> list[str]:
    return [line for line in source(cell).splitlines() if line.strip()]


def markdown(notebook: dict) -> str:
    return "\n".join(source(cell) for cell in cells(notebook, "markdown"))


def output_text(cell: dict) -> str:
    """Everything that a reader can read in a cell's outputs."""
    parts = []
    for output in cell.get("outputs", []):
        parts += [joined(output.get("text", "")), "\n".join(output.get("traceback", []))]
        for kind, data in output.get("data", {}).items():
            if kind == "text/html":
                data = re.sub(r"<style.*?</style>|<[^>]*>", " ", joined(data), flags=re.DOTALL)
                parts.append(html.unescape(data))
            elif kind.startswith("text/"):
                parts.append(joined(data))
    return "\n".join(parts)


def numbers(text: str) -> set[float]:
    return {float(number.replace(",", "")) for number in NUMBER.findall(text)}


# The rules


def follows_the_format(notebook: dict, name: str) -> list[str]:
    version = (notebook.get("nbformat"), notebook.get("nbformat_minor"))
    ids = [cell.get("id") for cell in notebook["cells"]]
    if version != (4, 5) or None in ids or len(set(ids)) < len(ids):
        return [f"format {version} instead of (4, 5), or a cell without an id of its own"]
    try:
        nbformat.validate(deepcopy(notebook))
    except nbformat.ValidationError as error:
        return [str(error).splitlines()[0]]
    return []


def opens_with_a_question_and_a_badge(notebook: dict, name: str) -> list[str]:
    first = notebook["cells"][0]
    text = source(first)
    found = []
    if first["cell_type"] != "markdown" or not re.match(r"# [^\n]*\?\s*(\n|$)", text):
        found.append("the first cell does not open with a title (#) that is a question")
    badge = colab.BADGE % (colab.repository().removeprefix("https://github.com/"), name)
    if badge not in text.split("\n"):
        found.append("the first cell has no Colab badge, or one that opens another notebook")
    return found


def has_the_badge_and_setup_of_all(notebook: dict, name: str) -> list[str]:
    try:
        same = colab.with_badge_and_setup(notebook, name) == notebook
    except ValueError as error:
        return [str(error)]
    return [] if same else ["badge or setup cell differ: run `python -m utils.colab`"]


def sets_up_first(notebook: dict, name: str) -> list[str]:
    code = cells(notebook, "code")
    return [
        f"code cell {place + 1} is not the one tagged {tag!r}, or another one is as well"
        for place, tag in enumerate(("setup", "settings"))
        if [i for i, cell in enumerate(code) if tag in tags(cell)] != [place]
    ]


def keeps_cells_short(notebook: dict, name: str) -> list[str]:
    sizes = [len(lines(cell)) for cell in cells(notebook, "code")]
    found = []
    if statistics.median(sizes) > MEDIAN_LINES:
        found.append(f"the median code cell has {statistics.median(sizes)} lines")
    if max(sizes) > MAX_LINES:
        found.append(f"the longest code cell has {max(sizes)} lines")
    return found


def ends_no_cell_with_a_semicolon(notebook: dict, name: str) -> list[str]:
    last = [lines(cell)[-1] for cell in cells(notebook, "code") if lines(cell)]
    return [f"ends with ';': {line}" for line in last if line.rstrip().endswith(";")]


def names_no_absolute_path(notebook: dict, name: str) -> list[str]:
    texts = [source(cell) + "\n" + output_text(cell) for cell in notebook["cells"]]
    found = (line for text in texts for line in text.splitlines() if ABSOLUTE.search(line))
    return [f"absolute path: {line}" for line in found]


def is_small(notebook: dict, name: str) -> list[str]:
    size = len(json.dumps(notebook, ensure_ascii=False, indent=1).encode())
    return [f"{size:,} bytes"] if size >= MAX_BYTES else []


def was_run_in_one_go(notebook: dict, name: str) -> list[str]:
    counts = [cell["execution_count"] for cell in cells(notebook, "code")]
    return [] if counts == list(range(1, len(counts) + 1)) else [f"execution counts are {counts}"]


def has_clean_outputs(notebook: dict, name: str) -> list[str]:
    found = ["widget state is stored"] if "widgets" in notebook["metadata"] else []
    for cell in cells(notebook, "code"):
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                found.append(f"an error: {output['ename']}")
            if output.get("name") == "stderr":
                found.append(f"warnings: {joined(output['text'])[:80]}")
            if any("widget" in kind for kind in output.get("data", {})):
                found.append("a widget, which shows nothing on a rendered page")
    return found


def can_check_what_it_tags(notebook: dict, name: str) -> list[str]:
    """nbval passes a tagged cell silently where it has no output or no count to compare with."""
    return [
        f"tagged nbval-check-output, but there is nothing to check: {source(cell)[:60]}"
        for cell in cells(notebook, "code")
        if "nbval-check-output" in tags(cell)
        and (not cell["outputs"] or cell["execution_count"] is None)
    ]


def prints_the_numbers_it_tells(notebook: dict, name: str) -> list[str]:
    """Each number in bold, without its unit, is a whole number in some text output."""
    printed = numbers("\n".join(output_text(cell) for cell in cells(notebook, "code")))
    bold = BOLD_NUMBER.findall(markdown(notebook))
    return [f"**{text}** stands in no output" for text in bold if not numbers(text) <= printed]


def ends_with_the_usual_sections(notebook: dict, name: str) -> list[str]:
    headings = re.findall(r"^## +(.+?) *$", markdown(notebook), flags=re.MULTILINE)
    last = headings[-len(LAST_SECTIONS) :]
    return [] if last == LAST_SECTIONS else [f"the last sections are {last}"]


def has_three_exercises(notebook: dict, name: str) -> list[str]:
    section = re.search(r"^## +Exercises(.*?)(?=^## |\Z)", markdown(notebook), flags=re.M | re.S)
    found = re.findall(r"^(\d+)\. ", section[1], flags=re.MULTILINE) if section else []
    return [] if found == ["1", "2", "3"] else [f"exercises are numbered {found}"]


def imports_by_name_what_is_there(notebook: dict, name: str) -> list[str]:
    found = []
    for line in (line for cell in cells(notebook, "code") for line in lines(cell)):
        if re.match(r"\s*from\s+\S+\s+import\s+\*", line):
            found.append(line)
        module = re.match(r"\s*(?:from|import)\s+utils(?:\.|\s+import\s+)(\w+)", line)
        if module and not (ROOT / "utils" / f"{module[1]}.py").is_file():
            found.append(f"no such module: {line}")
    return found


def shows_no_face(notebook: dict, name: str) -> list[str]:
    """The licence of UTKFace: averages over at least 50 faces, and drawn ones, may be shown."""
    found = ["an image is attached" for cell in notebook["cells"] if cell.get("attachments")]
    for cell in notebook["cells"]:
        if "data:image" in source(cell) or "data:image" in json.dumps(cell.get("outputs", [])):
            found.append("an image is hidden in text")
        for output in cell.get("outputs", []):
            for kind, data in output.get("data", {}).items():
                if kind == "image/png" and not {"group-average", "drawn-faces"} & set(tags(cell)):
                    if photo_share(read_png(base64.b64decode(joined(data)))):
                        found.append(f"{PHOTO}: the output of {source(cell)[:60]!r}")
                elif kind != "image/png" and not re.match(r"text/|application/.*json", kind):
                    found.append(f"an output of type {kind}: images are PNG")
    return found


RULES = [
    follows_the_format,
    opens_with_a_question_and_a_badge,
    has_the_badge_and_setup_of_all,
    sets_up_first,
    keeps_cells_short,
    ends_no_cell_with_a_semicolon,
    names_no_absolute_path,
    is_small,
    was_run_in_one_go,
    has_clean_outputs,
    can_check_what_it_tags,
    prints_the_numbers_it_tells,
    ends_with_the_usual_sections,
    has_three_exercises,
    imports_by_name_what_is_there,
    shows_no_face,
]


# Photographs

PHOTO = (
    "texture like a photograph's (a face? show it with show_faces; an average over 50 faces or "
    "more? tag the cell group-average, name the file average_...; drawn ones? tag it drawn-faces; "
    "a plot? draw fewer translucent points, or a histogram)"
)


def read_png(data: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def photo_share(image: np.ndarray) -> float:
    """Share of the windows of TILE x TILE px that look like a photograph (uint8 [H, W, 3]).

    In a photograph most neighbours differ a little, both across and down. In plots, text,
    heatmaps and mosaics most are equal. A photograph that was enlarged pixel by pixel shows the
    same when only every second (third, ...) pixel is looked at.
    """
    shares = [0.0]
    for step in (1, 2, 3, 4, 6):
        pixels = image[::step, ::step].astype(np.int16)
        if min(pixels.shape[:2]) <= TILE:
            break
        windows = []
        for axis in (0, 1):
            change = np.abs(np.diff(pixels, axis=axis)).max(axis=2)[: len(pixels) - 1]
            little = (change >= 1) & (change <= LITTLE)
            little = little[:, : pixels.shape[1] - 1].astype(np.float32)
            windows.append(cv2.blur(little, (TILE, TILE), borderType=cv2.BORDER_CONSTANT))
        shares.append(float((np.minimum(*windows) > MOST).mean()))
    return max(shares)


# The notebooks


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path: Path, rule: Callable):
    complaints = rule(json.loads(path.read_text(encoding="utf-8")), path.name)
    assert not complaints, "\n".join(complaints)


def test_figures_show_no_face():
    paths = [p for p in (ROOT / "figures").rglob("*.png") if not p.name.startswith("average_")]
    shares = {path.name: photo_share(read_png(path.read_bytes())) for path in paths}
    assert not {name for name, share in shares.items() if share}, PHOTO


# The rules are tested


def png(figure: plt.Figure, dpi: int = 90) -> bytes:
    data = BytesIO()
    figure.savefig(data, dpi=dpi, format="png")
    plt.close(figure)
    return data.getvalue()


def photo(seed: int = 0) -> np.ndarray:
    """Something like a photographed face, uint8 [128, 128, 3]: smooth, with a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    light = 200 - 60 * (x - 0.4) ** 2 - 50 * y**2
    for eye in (-0.35, 0.35):
        light -= 110 * np.exp(-(((x - eye) / 0.12) ** 2) - ((y + 0.2) / 0.07) ** 2)
    light -= 70 * np.exp(-((x / 0.3) ** 2) - ((y - 0.5) / 0.07) ** 2)
    face = light[..., None] * [1.0, 0.8, 0.7] + rng.normal(0, 2, (128, 128, 3))
    return np.clip(face, 0, 255).astype(np.uint8)


def grid(publish: bool, photos: int = 16, **options) -> plt.Figure:
    settings = replace(get_settings("utkface"), publish=publish)
    faces = np.stack([photo(seed) for seed in range(photos)])
    return show_faces(faces, [f"{age} years" for age in range(photos)], settings, **options)


def code(text: str, *tags: str, outputs: list[dict] | None = None) -> dict:
    return {
        "cell_type": "code", "id": "", "execution_count": 0, "source": text,
        "metadata": {"tags": list(tags)}, "outputs": outputs or [],
    }  # fmt: skip


def printed(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": text}


def displayed(kind: str, data: str) -> dict:
    return {"output_type": "display_data", "metadata": {}, "data": {kind: data}}


@cache
def drawn(publish: bool) -> dict:
    """The output of a cell that shows faces, as mosaics or as they are."""
    return displayed("image/png", base64.b64encode(png(grid(publish))).decode())


def text(*paragraphs: str) -> dict:
    return {"cell_type": "markdown", "id": "", "metadata": {}, "source": "\n\n".join(paragraphs)}


BADGE = colab.BADGE % (colab.repository().removeprefix("https://github.com/"), "01_good.ipynb")


@pytest.fixture
def good() -> dict:
    html_table = "<style>#T_1 {width: 77px}</style><table><tr><td>4.90</td></tr></table>"
    notebook = {
        "nbformat": 4, "nbformat_minor": 5,
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        "cells": [
            text("# 1. How old is a face?", BADGE, "Takes **You** minutes; see https://a.org/tmp/x."),
            code(colab.SETUP % colab.repository(), "setup"),
            code("from utils.settings import get_settings", "settings"),
            code("print(f'{n:,} faces')", "nbval-check-output",
                 outputs=[printed("23,705 faces, 54.0 % of data/tmp\n"),
                          displayed("text/html", html_table)]),
            text("**23,705** faces, **54** %, **4.9 years**, 9999 of them in no output"),
            code("a = 1; b = 2\nplt.show()", outputs=[drawn(publish=True)]),
            code("average", "group-average", outputs=[drawn(publish=False)]),
            text("## Takeaways", "1. One."), text("## Limits", "- None."),
            text("## Exercises", "1. One", "2. Two,\n   in 2 lines", "3. Three"),
            text("## Next", "1. Nothing."),
        ],
    }  # fmt: skip
    for i, cell in enumerate(notebook["cells"]):
        cell["id"] = f"cell-{i}"
    for i, cell in enumerate(cells(notebook, "code")):
        cell["execution_count"] = i + 1
    return notebook


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_good_notebook_follows_the_rule(good, rule):
    assert rule(good, "01_good.ipynb") == []


def put(place: int, **changes) -> Callable:
    """A change to one cell."""
    return lambda notebook: notebook["cells"][place].update(changes)


def also(place: int, *outputs: dict) -> Callable:
    """More outputs for one cell."""
    return lambda notebook: notebook["cells"][place]["outputs"].extend(outputs)


def drop(place: int) -> Callable:
    return lambda notebook: notebook["cells"].pop(place)


BAD = [
    (follows_the_format, lambda notebook: notebook.update(nbformat_minor=4)),
    (follows_the_format, lambda notebook: notebook["cells"][2].pop("id")),
    (follows_the_format, put(2, id="cell-3")),
    (follows_the_format, put(3, outputs=[{"output_type": "stream"}])),
    (opens_with_a_question_and_a_badge, put(0, source="# 1. Faces\n\n" + BADGE)),
    (opens_with_a_question_and_a_badge, put(0, source="## How old?\n\n" + BADGE)),
    (opens_with_a_question_and_a_badge, put(0, source="# How old is a face?")),
    (opens_with_a_question_and_a_badge,
     put(0, source="# How old?\n\n" + BADGE.replace("01_good", "02_other"))),
    (opens_with_a_question_and_a_badge, drop(0)),
    (has_the_badge_and_setup_of_all,
     put(1, source=colab.SETUP % "https://github.com/some-one/course")),
    (has_the_badge_and_setup_of_all, put(1, source=colab.SETUP % colab.repository() + "\nx = 1")),
    (has_the_badge_and_setup_of_all,
     put(0, source="# How old?\n\n" + BADGE.replace("main", "dev"))),
    (has_the_badge_and_setup_of_all, put(1, metadata={})),
    (sets_up_first, put(1, metadata={})),
    (sets_up_first, put(3, metadata={"tags": ["settings"]})),
    (sets_up_first, lambda notebook: notebook["cells"].insert(1, code("import os"))),
    (sets_up_first, drop(2)),
    (keeps_cells_short, put(5, source="x = 1\n" * 41)),
    (keeps_cells_short,
     lambda notebook: [cell.update(source="x = 1\n" * 6) for cell in notebook["cells"]]),
    (ends_no_cell_with_a_semicolon, put(5, source="plt.plot(x);\n\n")),
    *((names_no_absolute_path, put(5, source=f"open('/{folder}/faces')")) for folder in FOLDERS),
    (names_no_absolute_path, put(4, source="Look into `C:\\faces`.")),
    (names_no_absolute_path, also(3, printed("saved to /tmp/faces"))),
    (names_no_absolute_path, also(3, displayed("text/plain", "PosixPath('/tmp/x')"))),
    (names_no_absolute_path, also(3, displayed("text/html", "<td>/tmp/x</td>"))),
    (is_small, also(3, printed("x" * MAX_BYTES))),
    (was_run_in_one_go, put(3, execution_count=None)),
    (was_run_in_one_go, put(3, execution_count=9)),
    (has_clean_outputs, also(3, printed("UserWarning: old", name="stderr"))),
    (has_clean_outputs,
     also(3, {"output_type": "error", "ename": "E", "evalue": "", "traceback": []})),
    (has_clean_outputs, also(3, displayed("application/vnd.jupyter.widget-view+json", "{}"))),
    (has_clean_outputs, lambda notebook: notebook["metadata"].update(widgets={})),
    (can_check_what_it_tags, put(3, outputs=[])),
    (can_check_what_it_tags, put(3, execution_count=None)),
    (prints_the_numbers_it_tells, put(4, source="**23,706** faces")),
    (prints_the_numbers_it_tells, put(4, source="**705** faces")),
    (prints_the_numbers_it_tells, put(4, source="between **4.9 and 5.1 years**")),
    (prints_the_numbers_it_tells, put(4, source="**−77** px of hidden style")),
    (ends_with_the_usual_sections, drop(8)),
    (ends_with_the_usual_sections, put(10, source="### Next")),
    (ends_with_the_usual_sections, put(10, source="## Next\n\n## More")),
    (has_three_exercises, put(9, source="## Exercises\n\n1. One\n2. Two")),
    (has_three_exercises, put(9, source="## Exercises\n\n1. A\n2. B\n3. C\n4. D")),
    (has_three_exercises, drop(9)),
    (imports_by_name_what_is_there, put(5, source="from utils.plots import *")),
    (imports_by_name_what_is_there, put(5, source="if x:\n    from utils.nothing import save")),
    (imports_by_name_what_is_there, put(5, source="from utils import nothing")),
    (imports_by_name_what_is_there, put(5, source="import utils.nothing as n")),
    (shows_no_face, also(3, drawn(publish=False))),
    (shows_no_face, put(6, metadata={})),
    (shows_no_face, also(6, displayed("image/jpeg", "/9j/"))),
    (shows_no_face, also(3, displayed("image/svg+xml", "<svg/>"))),
    (shows_no_face, also(3, displayed("text/html", "<img src='data:image/png;base64,iVBO'>"))),
    (shows_no_face, put(4, source="![face](data:image/png;base64,iVBO)")),
    (shows_no_face, put(4, attachments={"face.png": {"image/png": "iVBO"}})),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "spoil"), BAD, ids=lambda value: getattr(value, "__name__", ""))
def test_a_bad_notebook_is_caught(good, rule, spoil):
    spoil(good)
    assert rule(good, "01_good.ipynb") != []


def test_every_rule_has_a_bad_notebook():
    assert {rule for rule, _ in BAD} == set(RULES)


# The search for photographs is tested


@pytest.mark.parametrize("dpi", [90, 100, 110])
def test_one_face_in_a_grid_of_mosaics_is_caught(dpi):
    figure = grid(publish=True, photos=32)
    assert photo_share(read_png(png(figure, dpi))) == 0
    figure = grid(publish=True, photos=32)
    figure.axes[13].images[0].set_data(photo(13))
    assert photo_share(read_png(png(figure, dpi))) > 0


@pytest.mark.parametrize("inches", [0.6, 1, 2, 4, 6, 8])
@pytest.mark.parametrize("grey", [False, True])
def test_a_face_of_any_size_is_caught(inches, grey):
    face = photo()
    if grey:
        face[:] = face[..., 1:2]
    figure, axis = plt.subplots(figsize=(inches, inches))
    axis.imshow(face, interpolation="nearest")
    axis.axis("off")
    assert photo_share(read_png(png(figure))) > 0


@pytest.mark.parametrize("columns", [4, 8, 16])
@pytest.mark.parametrize("dpi", [90, 110])
def test_mosaics_of_any_grid_pass(columns, dpi):
    assert photo_share(read_png(png(grid(publish=True, columns=columns), dpi))) == 0


def heatmap(axis, rng):
    sns.heatmap(rng.integers(0, 2000, (8, 20)), annot=True, fmt=",d", cmap="Blues", ax=axis)


def fine_heatmap(axis, rng):
    sns.heatmap(rng.random((80, 117)), cmap="viridis", ax=axis)


def bars(axis, rng):
    axis.bar(range(117), rng.integers(0, 2000, 117))


def histogram(axis, rng):
    sns.histplot(x=rng.normal(size=3000), kde=True, ax=axis)


def scatter(axis, rng):
    axis.scatter(rng.normal(size=2000), rng.normal(size=2000), s=10, alpha=0.4)


def coloured_scatter(axis, rng):
    x, y = rng.normal(size=(2, 2000))
    sns.scatterplot(x=x, y=y, hue=rng.integers(0, 5, 2000), palette="colorblind", s=12, ax=axis)


def count_grid(axis, rng):
    axis.hist2d(*rng.normal(size=(2, 5000)), bins=60)


def bands(axis, rng):
    x = np.linspace(0, 10, 200)
    for shift in range(4):
        axis.plot(x, np.sin(x + shift))
        axis.fill_between(x, np.sin(x + shift) - 0.3, np.sin(x + shift) + 0.3, alpha=0.2)


def colour_bar(axis, rng):
    axis.figure.colorbar(axis.imshow(rng.random((5, 5)), aspect="auto"))


def words(axis, rng):
    for row in range(30):
        axis.text(0, row / 30, "23,705 faces of UTKFace, MAE 4.90 [4.71, 5.10] " * 3, fontsize=7)


@pytest.mark.parametrize(
    "draw",
    [heatmap, fine_heatmap, bars, histogram, scatter, coloured_scatter, count_grid, bands,
     colour_bar, words],
)  # fmt: skip
def test_plots_pass(draw):
    set_style()
    figure, axis = plt.subplots()
    draw(axis, np.random.default_rng(0))
    assert photo_share(read_png(png(figure))) == 0


# conftest.py is tested


def test_a_failed_cell_stops_its_notebook_and_no_other(tmp_path):
    """In the layout of the project, and with workers, as `make test` runs it."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    for name, first in (("bad", "1 / 0"), ("good", "1 / 1")):
        kernel = {"name": "python3", "display_name": "Python 3"}
        notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
        for text in ("x = 0", first, "y = 0", "z = 0"):
            notebook["cells"].append(nbformat.v4.new_code_cell(text))
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    command = [sys.executable, "-m", "pytest", "tests", "notebooks", "--nbval-lax", "-rs", "-v"]
    command += ["--numprocesses=1", "--dist=loadscope", "-p", "no:cacheprovider"]
    command += [f"--rootdir={tmp_path}", "--nbval-cell-timeout=60"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300
    )
    outcomes = re.findall(r"(PASSED|FAILED|SKIPPED) notebooks.(\w+)\W+ipynb::Cell (\d)", run.stdout)
    assert sorted(outcomes, key=lambda o: o[1:]) == [
        ("PASSED", "bad", "0"), ("FAILED", "bad", "1"), ("SKIPPED", "bad", "2"),
        ("SKIPPED", "bad", "3"), *(("PASSED", "good", str(i)) for i in range(4)),
    ], run.stdout + run.stderr  # fmt: skip
    assert run.stdout.count("an earlier cell failed") >= 1
