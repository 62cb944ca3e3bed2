"""Colab played through: a fresh folder, stand-ins for its own packages, a clone, the notebooks.

The address of the repository leads to a copy of this working tree (git's `insteadOf`), `pip` only
notes what it is asked for, and `google.colab.drive` makes a folder.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from utils import colab
from utils.settings import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LACKING = {"lightning", "grad-cam", "fairlearn"}

# Python runs this at its start. The packages count as lacking until pip was asked for them.
SITE = f"""
import importlib.metadata, os, sys
version = importlib.metadata.version
def asked():
    return open(os.environ["PIP_LOG"]).read() if os.path.exists(os.environ["PIP_LOG"]) else ""
def installed(name):
    if name in {sorted(LACKING)} and name not in asked():
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = installed
"""
PIP = """
import json, os, sys
if os.environ.get("PIP_FAILS"):
    sys.exit("WARNING: retrying\\nERROR: no network")
with open(os.environ["PIP_LOG"], "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
"""
DRIVE = """
import os
def mount(place):
    os.makedirs(place + "/MyDrive")
    print("mounted")
"""
# Runs the first cells of a notebook as Colab does, all if none is given, up to the first error.
RUN = """
import json, sys
import google.colab
import matplotlib
matplotlib.use("Agg")
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance(colors="nocolor")
cells = [cell for cell in json.load(open(sys.argv[1]))["cells"] if cell["cell_type"] == "code"]
for cell in cells[: int(sys.argv[2]) or None]:
    source = "".join(cell["source"])
    if "KEEP" in sys.argv:
        source = source.replace("KEEP_IN_DRIVE = False", "KEEP_IN_DRIVE = True")
    result = shell.run_cell(source)
    if not result.success:
        sys.exit(1)
"""


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """A git repository of the working tree as it is, without its history."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout: nothing to clone")
    copy = tmp_path_factory.mktemp("origin") / "course"
    git = ["git", "-c", "safe.directory=*", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    listed = subprocess.run(
        [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "copy"]):
        subprocess.run([*git, *command], cwd=copy, check=True)
    return copy


@pytest.fixture
def content(tmp_path, origin) -> Path:
    """Colab's working folder, empty, and beside it the stand-ins."""
    stand_ins = tmp_path / "stand-ins"
    files = {
        "sitecustomize.py": SITE, "pip/__init__.py": "", "pip/__main__.py": PIP,
        "google/colab/__init__.py": "", "google/colab/drive.py": DRIVE,
    }  # fmt: skip
    for name, text in files.items():
        (stand_ins / name).parent.mkdir(parents=True, exist_ok=True)
        (stand_ins / name).write_text(text)
    (tmp_path / "content").mkdir()
    return tmp_path / "content"


def run(content: Path, origin: Path, notebook: Path, cells: int = 0, *words: str, **variables):
    """Run a notebook's code in the folder; what was printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AGE_", "UTKFACE_"))}
    environment |= {
        "PYTHONPATH": str(content.parent / "stand-ins"),
        "PIP_LOG": str(content.parent / "pip.log"),
        "GIT_CONFIG_COUNT": "2",
        "GIT_CONFIG_KEY_0": f"url.{origin.as_uri()}.insteadOf",
        "GIT_CONFIG_VALUE_0": colab.repository(),
        "GIT_CONFIG_KEY_1": "safe.directory",
        "GIT_CONFIG_VALUE_1": "*",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "IPYTHONDIR": str(content.parent / "ipython"),
    }
    command = [sys.executable, "-c", RUN, str(notebook), str(cells), *words]
    return subprocess.run(
        command, cwd=content, env=environment | variables, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


def asked(content: Path) -> list[str]:
    """The packages that pip was asked for, without their bounds."""
    log = content.parent / "pip.log"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [name_of(word) for line in lines for word in line if not word.startswith("-")][1:]


def name_of(requirement: str) -> str:
    return requirement.partition(">")[0].partition("<")[0]


@pytest.mark.fault(
    "no GPU", "everything runs on the CPU; Colab's setup cell says how to switch the GPU on"
)
def test_a_notebook_starts_in_colab(content, origin, own_faces):
    """Clone, packages, no GPU, and the settings cell; a second run clones and installs nothing.

    Any notebook will do: these two cells are the same in all (test_notebooks.py).
    """
    for again in (False, True):
        done = run(content, origin, NOTEBOOKS[-1], 2, AGE_FACES=str(own_faces))
        assert done.returncode == 0, done.stdout + done.stderr
        assert "No GPU: choose Runtime > Change runtime type > GPU" in done.stdout
        assert ("Installing" in done.stdout) is not again
        assert "faces          own" in done.stdout
    assert set(asked(content)) == LACKING and len(asked(content)) == len(LACKING)
    course = Path(colab.repository()).name
    assert [entry.name for entry in content.iterdir()] == [course], "something was mounted"


@pytest.mark.fault("paths with spaces and letters beyond ASCII")
def test_a_whole_notebook_runs_in_colab_with_its_data_in_drive(content, origin, own_faces):
    done = run(content, origin, NOTEBOOKS[0], 0, "KEEP", AGE_FACES=str(own_faces))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mounted" in done.stdout and "kept in your Google Drive" in done.stdout
    kept = content / "drive" / "MyDrive" / Path(colab.repository()).name
    assert list(kept.glob("cache/*/*/pixels.u8"))
    assert not (content / kept.name / "data" / "cache").exists()


@pytest.mark.fault("no network")
def test_packages_that_cannot_be_installed_are_told(content, origin):
    done = run(content, origin, NOTEBOOKS[0], 1, PIP_FAILS="1")
    assert done.returncode == 1
    assert "pip could not install them (ERROR: no network): run this cell again" in done.stdout


def test_torch_and_what_is_for_the_editor_is_never_installed(monkeypatch):
    monkeypatch.setattr(colab, "_installed", lambda package: False)
    names = {name_of(line) for line in colab.lacking()}
    assert names >= LACKING | {"pandas", "safetensors"}
    assert not names & {"torch", "torchvision", "jupyterlab", "nbval", "pytest", "ruff"}


# Badges and setup cells


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A copy of what `python -m utils.colab` reads and writes, with the address of a fork."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    for name in ("README.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path)
        monkeypatch.setattr(colab, name.partition(".")[0], tmp_path / name)
    monkeypatch.setattr(colab, "ROOT", tmp_path)
    text = colab.CITATION.read_text().replace(colab.repository(), "https://github.com/me/my.fork")
    colab.CITATION.write_text(text)
    return tmp_path


def test_one_command_gives_a_fork_its_address_and_leaves_the_rest(project, capsys):
    colab.main()
    assert len(capsys.readouterr().out.splitlines()) == len(NOTEBOOKS) + 1
    for path in NOTEBOOKS:
        old = json.loads(path.read_text("utf-8"))
        text = (project / "notebooks" / path.name).read_text("utf-8")
        new = json.loads(text)
        link = f"{colab.COLAB}github/me/my.fork/blob/main/notebooks/{path.name}"
        assert text.count(link) == 1 and text.count("https://github.com/me/my.fork") == 1
        for before, after in zip(old["cells"], new["cells"], strict=True):
            assert before | {"source": after["source"]} == after, "more than a source changed"
        changed = [
            a["source"] != b["source"] for a, b in zip(old["cells"], new["cells"], strict=True)
        ]
        assert changed == [i < 2 for i in range(len(changed))]
    readme = colab.README.read_text("utf-8")
    assert "github/me/my.fork/" in readme and "OWNER" not in readme
    before = {path: path.read_bytes() for path in project.rglob("*.*") if path.is_file()}
    colab.main()
    assert capsys.readouterr().out == ""
    assert {path: path.read_bytes() for path in before} == before


def test_readme_has_the_address_of_the_citation():
    page = (ROOT / "README.md").read_text("utf-8")
    assert colab.with_address(page) == page and colab.COLAB + "github/" in page


def test_a_notebook_without_title_or_setup_is_named(project):
    path = project / "notebooks" / NOTEBOOKS[0].name
    notebook = json.loads(path.read_text("utf-8"))
    notebook["cells"][1]["metadata"] = {}
    path.write_text(json.dumps(notebook))
    with pytest.raises(ValueError, match=f"{path.name}: a title .* tagged 'setup'"):
        colab.main()


def test_a_citation_without_the_address_is_named(project):
    colab.CITATION.write_text("title: x\n")
    with pytest.raises(ValueError, match="CITATION.cff has no line 'repository-code"):
        colab.main()
