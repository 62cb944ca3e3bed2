"""Writes badges and setup cells into the notebooks, and results into README and model card.

python .ci/publish.py
"""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import results

from utils.evaluation import record, show
from utils.settings import CHECKPOINT, ROOT

# The repository's address stands in CITATION.cff alone; a fork changes it there and runs this.
ADDRESS = re.search(r"^repository-code: (\S+)", (ROOT / "CITATION.cff").read_text("utf-8"), re.M)[1]
PLACES = r"(?<=git clone )https://github\.com/[\w.-]+/[\w.-]+|(?<=REPOSITORY = \")[^\"]+"
SETUP = Path(__file__).with_name("setup_cell.txt").read_text("utf-8").rstrip()
SETUP = re.sub(PLACES, ADDRESS, SETUP)
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": ["setup", "hide-input"]}
HINT = """*No Colab badges yet: write your repository's address into CITATION.cff and run \
`.venv/bin/python .ci/publish.py`, which puts badges and address in every place.*"""

HUB_HEAD = """---
license: other
license_name: utkface-non-commercial-research
license_link: https://susanqq.github.io/UTKFace/
language: en
pipeline_tag: image-classification
base_model: HSE-asavchenko/HSE_FaceRec_tf
tags: [age-estimation, face, image-regression, pytorch, safetensors, onnx, conformal-prediction]
datasets: [py97/UTKFace-Cropped]
metrics: [mae]
model-index:
  - name: age_utkface
    results:
      - task: {type: image-classification, name: Age estimation in years}
        dataset: {type: py97/UTKFace-Cropped, name: "UTKFace, leak-free 10 %", split: test}
        metrics:
"""
HUB_VALUE = """          - {{type: {kind}, value: {value}, name: "{name}: {text}"}}
"""


def badge(address: str, name: str) -> str:
    """The link to a notebook in Colab, or nothing while the address is the placeholder."""
    if "/OWNER/" in address:
        return ""
    place = address.replace("https://github.com", "https://colab.research.google.com/github")
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![Open in Colab]({image})]({place}/blob/main/notebooks/{name})"


def with_badge(text: str, under_title: str) -> str:
    """A page whose badge, or hint, under the title is this one."""
    title, _, rest = text.partition("\n\n")
    rest = re.sub(r"\A(\[!\[Open in Colab\]|\*No Colab badges yet).*\n\n", "", rest)
    return "\n\n".join(part for part in (title, under_title, rest) if part)


def with_setup(text: str, name: str) -> str:
    """The text of a notebook with its badge and setup cell written anew, all else as it is."""
    cells = (notebook := json.loads(text))["cells"]
    head = with_badge("".join(cells[0]["source"]), badge(ADDRESS, name))
    cells[0]["source"] = head.splitlines(keepends=True)
    (setup,) = (cell for cell in cells if "setup" in cell["metadata"].get("tags", []))
    setup["source"] = SETUP.splitlines(keepends=True)
    setup["metadata"] |= FOLDED
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def in_percent(figure: dict) -> dict:
    """A share with its interval as per cent; n stays."""
    return {key: value * 100 ** (key != "n") for key, value in figure.items()}


def with_results(text: str, results: dict) -> str:
    """A page with every `<!--=key/key-->...<!--/-->` filled from `results`: a figure with interval
    and n (in per cent where the keys end in %), or a fact. Raises KeyError where there is none."""

    def fill(match: re.Match) -> str:
        found, percent = results, match[3] == "%"
        for key in match[2].split("/"):
            found = found[key]
        if percent:
            found = in_percent(found)
        found = f"{found:.2f}" if isinstance(found, float) else found
        return f"{match[1]}{show(found, 2 - percent) if isinstance(found, dict) else found}<!--/-->"

    return re.sub(r"(<!--=(.+?)(%?)-->).*?<!--/-->", fill, text)


def hub_head(results: dict) -> str:
    """The YAML head by which model hubs read a model card: licence, data, measured values."""
    names = {
        "mae": ("test_mae", "MAE (years)"), "bias": ("test_bias", "bias (years)"),
        "cs5": ("test_cs5", "answers within 5 years (%)"),
        "coverage": ("interval_coverage_90", "labels inside the 90 % interval (%)"),
    }  # fmt: skip
    values = []
    for kind, (key, name) in names.items():
        figure = in_percent(results[key]) if name.endswith("(%)") else results[key]
        values.append(HUB_VALUE.format(kind=kind, value=round(figure["value"], 2), name=name,
                                       text=show(figure)))  # fmt: skip
    return HUB_HEAD + "".join(values) + "---\n\n"


def pages() -> dict:
    """What README, model card and notebooks should say, by path."""
    results = json.loads((ROOT / "figures" / "results.json").read_text("utf-8"))
    cells = {p: with_setup(p.read_text("utf-8"), p.name) for p in ROOT.glob("notebooks/*.ipynb")}
    cards = (ROOT / "README.md", CHECKPOINT.with_name("README.md"))
    texts = {p: re.sub(PLACES, ADDRESS, p.read_text("utf-8")) for p in cards}
    start = badge(ADDRESS, "00_start_here.ipynb") or HINT
    texts[ROOT / "README.md"] = with_badge(texts[ROOT / "README.md"], start)
    texts = {p: with_results(text, results) for p, text in texts.items()}
    card = re.sub(r"\A---\n.*?\n---\n\n", "", texts[cards[1]], count=1, flags=re.S)
    return cells | texts | {cards[1]: hub_head(results) + card}


if __name__ == "__main__":
    record(ROOT / "figures", **results.results())
    for page, text in pages().items():
        page.write_text(text, "utf-8")
