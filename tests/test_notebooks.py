"""What every committed notebook keeps to: its form, its numbers, and the faces that it shows.

That notebooks run is tested by nbval; badges and setup cells in test_publish.py.
"""

import base64
import html
import json
import os
import re
import subprocess
import sys

import cv2
import nbformat
import numpy as np
import pytest

from utils.settings import ROOT

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_BYTES = 3_000_000
ABSOLUTE = re.compile(r"(?<![\w.~/:-])/(?:home|root|tmp|Users|work|content)\b|\b[A-Z]:\\")
NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?!\w)")
BOLD_NUMBER = re.compile(r"\*\*(?!\d\. \D)([+\-−±~]?\d[^*]*)\*\*")  # "**1. Title.**" is none
# Who may be seen, by the source or the tag of the cell that draws, or by the name of the figure.
SHOWN = {"astronaut", "drawn-faces", "averages"}
FIGURES = ("astronaut_", "drawn_", "average_")


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request) -> dict:
    """With cells and outputs whose texts are strings, not lists of lines."""
    notebook = json.loads(request.param.read_text("utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
        for output in cell.get("outputs", []):
            output["text"] = "".join(output.get("text", ""))
            output["data"] = {
                kind: "".join(data) if isinstance(data, list) else data
                for kind, data in output.get("data", {}).items()
            }
    return notebook | {"bytes": request.param.stat().st_size, "path": request.param}


def cells(notebook: dict, kind: str) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def output_text(cell: dict) -> str:
    """Everything that a reader can read in a cell's outputs."""
    parts = []
    for output in cell.get("outputs", []):
        data = output["data"]
        table = re.sub(r"<style.*?</style>|<[^>]*>", " ", data.get("text/html", ""), flags=re.S)
        parts += [output["text"], html.unescape(table), data.get("text/plain", "")]
    return "\n".join(parts)


def numbers(text: str) -> set[float]:
    return {float(number.replace(",", "")) for number in NUMBER.findall(text)}


def test_form(notebook):
    nbformat.validate(json.loads(notebook["path"].read_text("utf-8")))
    ids = [cell.get("id") for cell in notebook["cells"]]
    assert None not in ids and len(set(ids)) == len(ids), "a cell without an id of its own"
    assert re.match(r"# [^\n]*\?\s*\n", notebook["cells"][0]["source"]), "the title is a question"
    code = cells(notebook, "code")
    assert "setup" in tags(code[0]) and "settings" in tags(code[1])
    assert notebook["bytes"] < MAX_BYTES
    for cell in notebook["cells"]:
        assert not ABSOLUTE.search(cell["source"] + "\n" + output_text(cell)), "an absolute path"


def test_outputs_are_those_of_one_clean_run(notebook):
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert "widgets" not in notebook["metadata"]
    for cell in code:
        for output in cell["outputs"]:
            assert output["output_type"] != "error", output
            assert output.get("name") != "stderr", output["text"]
            assert not any("widget" in kind for kind in output["data"]), "shows nothing on a page"
        if "nbval-check-output" in tags(cell):
            assert cell["outputs"], f"nothing to check (nbval would pass): {cell['source'][:60]}"


def test_each_bold_number_stands_in_an_output(notebook):
    printed = numbers("\n".join(map(output_text, cells(notebook, "code"))))
    bold = BOLD_NUMBER.findall("\n".join(c["source"] for c in cells(notebook, "markdown")))
    assert [text for text in bold if not numbers(text) <= printed] == []


def test_no_photograph_is_shown_but_the_astronaut(notebook):
    """Drawn faces and averages over 50 faces or more may be shown as well; nobody of UTKFace."""
    for cell in notebook["cells"]:
        texts = cell["source"] + json.dumps([o["data"] for o in cell.get("outputs", [])])
        assert not cell.get("attachments") and "data:image" not in texts, "an image hidden in text"
        may = SHOWN & set(tags(cell)) or "astronaut(" in cell["source"]
        for output in cell.get("outputs", []):
            for kind, data in output["data"].items():
                assert re.match(r"image/png|text/|application/.*json", kind), kind
                if kind == "image/png" and not may:
                    share = photo_share(base64.b64decode(data))
                    assert not share, f"tag the cell with one of {SHOWN}: {cell['source'][:80]!r}"


def test_figures_show_no_photograph_but_the_astronaut():
    paths = [p for p in (ROOT / "figures").rglob("*.png") if not p.name.startswith(FIGURES)]
    assert {p.name for p in paths if photo_share(p.read_bytes())} == set()


def photo_share(png: bytes) -> float:
    """Share of the windows of 24 x 24 px of a PNG that look like a photograph.

    In a photograph most neighbours differ a little, both across and down: 88 % or more in a
    face's windows. In plots, text and heatmaps most are equal. A photograph that was enlarged
    shows the same when only every second (third, ...) pixel is looked at.
    """
    image, shares = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR), [0.0]
    for step in (1, 2, 3, 4, 6):
        pixels = image[::step, ::step].astype(np.int16)
        if min(pixels.shape[:2]) <= 24:
            break
        windows = []
        for axis in (0, 1):
            change = np.abs(np.diff(pixels, axis=axis)).max(axis=2)[: len(pixels) - 1]
            little = ((change >= 1) & (change <= 24))[:, : pixels.shape[1] - 1]
            little = cv2.blur(little.astype(np.float32), (24, 24), borderType=cv2.BORDER_CONSTANT)
            windows.append(little)
        shares.append(float((np.minimum(*windows) > 0.75).mean()))
    return max(shares)


# All notebooks in one process, each in a namespace of its own, with small networks and few
# resamples: what is proved here is that every cell runs.
RUN = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import matplotlib
matplotlib.use("Agg")
from IPython.core.interactiveshell import InteractiveShell
sys.path.insert(0, str(Path.cwd().parent))
from matplotlib import pyplot as plt
from utils import evaluation, settings
drawn = evaluation._resamples
evaluation._resamples = lambda groups, draws: drawn(groups, min(draws, 100))
get, compare = settings.get_settings, settings.comparison_settings
small = dict(backbone="small", pretrained=False, image_size=32, epochs=1, batch_size=32)
settings.get_settings = lambda faces=None: replace(
    get(faces), figures=Path(os.environ["AGE_DATA"]) / "figures", **small)
settings.comparison_settings = lambda given: replace(compare(given), image_size=32, epochs=1)
shell = InteractiveShell.instance(colors="nocolor")
for path in sys.argv[1:]:
    shell.reset()
    for cell in json.loads(Path(path).read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code" and not shell.run_cell("".join(cell["source"])).success:
            sys.exit(f"{path} failed")
        plt.close("all")
    print("ran", Path(path).stem, flush=True)
"""


def test_notebooks_run_in_any_order_on_your_own_faces(own_faces, tmp_path):
    """In reverse, from nothing: each rebuilds what it needs."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AGE_", "UTKFACE_"))}
    environment |= {"AGE_FACES": str(own_faces), "AGE_DATA": str(tmp_path / "Daten 数据"),
                    "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1",
                    "IPYTHONDIR": str(tmp_path / "ipython")}  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, reversed(PATHS))], cwd=ROOT / "notebooks",
        capture_output=True, encoding="utf-8", timeout=3000, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.findall(r"^ran (\w+)$", done.stdout, re.M) == [p.stem for p in reversed(PATHS)]
