"""Colab's set-up; and setup cells and results, written by `python -m utils.publish`."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

from utils.evaluation import show
from utils.settings import CHECKPOINT, ROOT

SETUP = (ROOT / "utils" / "setup_cell.txt").read_text("utf-8").rstrip()
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}, "tags": ["setup", "hide-input"]}
BADGE = (
    "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab."
    "research.google.com/github/OWNER/age-estimation-course/blob/main/notebooks/%s)"
)


def set_up(keep_in_drive: bool) -> None:
    """In Colab: install what it lacks (never torch: its own stays), mount Google Drive if asked to,
    tell whether there is a GPU. Raises RuntimeError where packages cannot be installed."""
    text = (ROOT / "requirements.txt").read_text("utf-8").partition("# Not in Colab")[0]
    there = {package.name.lower() for package in importlib.metadata.distributions()}
    wanted = re.findall(r"^(?!torch)([\w-]+)(.*)$", text, re.M)
    if lacking := [name + bounds for name, bounds in wanted if name not in there]:
        print("Installing", ", ".join(lacking))
        command = [sys.executable, "-m", "pip", "install", "--quiet", *lacking]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip could not install them, run this cell again: {done.stderr}")
    if keep_in_drive:
        from google.colab import drive

        drive.mount(str(ROOT.parent / "drive"))
        os.environ["AGE_DATA"] = str(ROOT.parent / "drive" / "MyDrive" / ROOT.name)
    import torch

    none = "none. Choose Runtime > Change runtime type > GPU, and run from the top again"
    print("GPU:", torch.cuda.get_device_name() if torch.cuda.is_available() else none)


def with_setup(text: str, name: str) -> str:
    """The text of a notebook with its badge and setup cell written anew, all else as it is."""
    cells = (notebook := json.loads(text))["cells"]
    parts = re.match(r"(.*)\s*(?:\[!\[Open in Colab\].*)?\s*((?s:.*))", "".join(cells[0]["source"]))
    cells[0]["source"] = f"{parts[1]}\n\n{BADGE % name}\n\n{parts[2]}".splitlines(keepends=True)
    (setup,) = (cell for cell in cells if "setup" in cell["metadata"].get("tags", []))
    setup["source"] = SETUP.splitlines(keepends=True)
    setup["metadata"] |= FOLDED
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def with_results(text: str, results: dict) -> str:
    """A page with every `<!--=key/key-->...<!--/-->` filled from `results`: a figure with interval
    and n (in per cent where the keys end in %), or a fact. Raises KeyError where there is none."""

    def fill(match: re.Match) -> str:
        found, percent = results, match[3] == "%"
        for key in match[2].split("/"):
            found = found[key]
        if percent:
            found = {key: value * 100 ** (key != "n") for key, value in found.items()}
        return f"{match[1]}{show(found, 2 - percent) if isinstance(found, dict) else found}<!--/-->"

    return re.sub(r"(<!--=(.+?)(%?)-->).*?<!--/-->", fill, text)


def pages() -> dict:
    """What README, model card and notebooks should say, by path."""
    results = json.loads((ROOT / "figures" / "results.json").read_text("utf-8"))
    cells = {p: with_setup(p.read_text("utf-8"), p.name) for p in ROOT.glob("notebooks/*.ipynb")}
    cards = (ROOT / "README.md", CHECKPOINT.with_name("README.md"))
    return cells | {p: with_results(p.read_text("utf-8"), results) for p in cards}


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, "utf-8")
