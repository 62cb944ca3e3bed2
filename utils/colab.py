"""The course in Colab: what the setup cell does there, and the badge and setup cell themselves.

`python -m utils.colab` writes them anew in every notebook and in the README, for the repository's
address in CITATION.cff.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from copy import deepcopy

from utils.settings import ROOT

LOCAL = "# Not in Colab"  # the line of requirements.txt below which nothing is installed there
MOUNT = ROOT.parent / "drive"
KEPT = MOUNT / "MyDrive" / ROOT.name
README, CITATION = ROOT / "README.md", ROOT / "CITATION.cff"

COLAB = "https://colab.research.google.com/"
BADGE = f"[![Open in Colab]({COLAB}assets/colab-badge.svg)]"
BADGE += f"({COLAB}github/%s/blob/main/notebooks/%s)"
SETUP = """\
# Setup, the same in every notebook: finds the course, or fetches it (in Colab, say).
import subprocess
import sys
from pathlib import Path

REPOSITORY = "%s"
KEEP_IN_DRIVE = False  # Colab: True keeps data, runs and weights in your Google Drive
folders = [Path.cwd(), *Path.cwd().parents, Path(Path(REPOSITORY).name).resolve()]
root = next((f for f in folders if (f / "utils" / "settings.py").is_file()), None)
if root is None:
    root = folders[-1]
    subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, root], check=True)
sys.path.insert(0, str(root))
if "google.colab" in sys.modules:
    from utils.colab import set_up

    set_up(KEEP_IN_DRIVE)"""


def set_up(keep_in_drive: bool) -> None:
    """Install what Colab lacks, mount Google Drive if asked to, and tell whether there is a GPU.

    Raises RuntimeError where packages cannot be installed.
    """
    packages = lacking()
    if packages:
        print("Installing", ", ".join(packages))
        command = [sys.executable, "-m", "pip", "install", "--quiet", *packages]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise RuntimeError(f"pip could not install them ({reason}): run this cell again")
    if keep_in_drive:
        from google.colab import drive

        drive.mount(str(MOUNT))
        KEPT.mkdir(parents=True, exist_ok=True)
        os.environ["AGE_DATA"] = str(KEPT)
        print(f"Data, runs and weights are kept in your Google Drive, folder {KEPT.name}")
    import torch

    if torch.cuda.is_available():
        print("GPU:", torch.cuda.get_device_name())
    else:
        print("No GPU: choose Runtime > Change runtime type > GPU, and run from the top again.")


def lacking() -> list[str]:
    """The requirements of the notebooks that are not installed. Never torch: Colab's own stays."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8").partition(LOCAL)[0]
    lines = re.findall(r"^(?!torch)[\w-]+.*$", text, flags=re.MULTILINE)
    return [line for line in lines if not _installed(re.match(r"[\w-]+", line)[0])]


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def repository() -> str:
    """The repository's address: the one place where it stands is CITATION.cff.

    Raises ValueError where it is not there.
    """
    text = CITATION.read_text(encoding="utf-8")
    found = re.search(r"^repository-code: (https://github\.com/[\w.-]+/[\w.-]+)$", text, re.M)
    if found is None:
        raise ValueError(f"{CITATION.name} has no line 'repository-code: https://github.com/...'")
    return found[1]


def with_badge_and_setup(notebook: dict, name: str) -> dict:
    """The notebook with its badge and setup cell written anew; outputs and all else as they are.

    Raises ValueError where its first cell has no title, or no code cell is tagged `setup`.
    """
    notebook, address = deepcopy(notebook), repository()
    first, *cells = notebook["cells"]
    title, *rest = "".join(first["source"]).split("\n")
    setups = [cell for cell in cells if "setup" in cell["metadata"].get("tags", [])]
    if not title.startswith("# ") or len(setups) != 1:
        raise ValueError(f"{name}: a title (# ...) and one code cell tagged 'setup' are expected")
    rest = [line for line in rest if not line.startswith("[![Open in Colab]")]
    rest = "\n".join(rest).lstrip("\n")
    badge = BADGE % (address.removeprefix("https://github.com/"), name)
    for cell, text in ((first, f"{title}\n\n{badge}\n\n{rest}"), (setups[0], SETUP % address)):
        cell["source"] = text if isinstance(cell["source"], str) else text.splitlines(keepends=True)
    return notebook


def with_address(page: str) -> str:
    """A Markdown page with the repository's address in its Colab links and clone commands."""
    address = repository()
    owner = address.removeprefix("https://github.com/")
    page = re.sub(rf"({re.escape(COLAB)}github/)[\w.-]+/[\w.-]+/", rf"\g<1>{owner}/", page)
    return re.sub(r"(git clone )https://github\.com/[\w.-]+/[\w.-]+", rf"\g<1>{address}", page)


def main() -> None:
    """Write badges and setup cells where they differ."""
    for path in [*sorted((ROOT / "notebooks").glob("*.ipynb")), README]:
        old = path.read_text(encoding="utf-8")
        if path == README:
            new = with_address(old)
        else:
            notebook = with_badge_and_setup(json.loads(old), path.name)
            new = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
        if new != old:
            path.write_text(new, encoding="utf-8")
            print(f"{path.relative_to(ROOT)}: badge and setup written for {repository()}")


if __name__ == "__main__":
    main()
