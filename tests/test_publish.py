"""The setup cell as Colab runs it, and pages that say what results.json says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from utils.settings import ROOT

sys.path.insert(0, str(ROOT / ".ci"))
import publish

ADDRESS = re.search(r"repository-code: (\S+)", (ROOT / "CITATION.cff").read_text("utf-8"))[1]
STAND_INS = {  # for Colab's own packages; pip notes what it is asked for, or fails
    "google/colab/__init__.py": "",
    "google/colab/drive.py": "def mount(place): print('mounted')",
    "sitecustomize.py": """import importlib.metadata as m
there = m.distributions
m.distributions = lambda **options: (
    d for d in there(**options) if d.name not in ("grad-cam", "fairlearn", "torch"))
""",
    "pip/__init__.py": "",
    "pip/__main__.py": """import os, sys
if "PIP_FAILS" in os.environ:
    sys.exit("ERROR: no network")
print(*sys.argv[1:], file=open(os.environ["PIP_LOG"], "a"))
""",
}


@pytest.mark.skipif(not shutil.which("git"), reason="needs git, as the setup cell does")
@pytest.mark.parametrize("fails", [False, True])
def test_the_setup_cell_in_colab(tmp_path, fails):
    """Git leads the repository's address to a copy of this working tree."""
    origin, content = tmp_path / "origin", tmp_path / "content"
    hidden = shutil.ignore_patterns(".*", "build", "data", "figures", "__pycache__")
    shutil.copytree(ROOT, origin, ignore=hidden)
    git = ["git", "-C", origin, "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "copy"]):
        subprocess.run([*git, *command], check=True)
    for name, text in {**STAND_INS, "../content/empty.txt": ""}.items():
        (path := tmp_path / "stand-ins" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AGE_", "UTKFACE_"))}
    environment |= {"PYTHONPATH": str(tmp_path / "stand-ins"), "CUDA_VISIBLE_DEVICES": "",
                    "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{origin.as_uri()}.insteadOf",
                    "GIT_CONFIG_VALUE_0": ADDRESS, "PIP_LOG": f"{tmp_path}/pip.log"}  # fmt: skip
    environment |= {"PIP_FAILS": "1"} if fails else {}
    cell = publish.SETUP.replace("KEEP_IN_DRIVE = False", "KEEP_IN_DRIVE = True")
    cell = f"import google.colab, os\n{cell}\nprint(os.environ['AGE_DATA'])"
    done = subprocess.run([sys.executable, "-c", cell], cwd=content, env=environment, text=True,
                          capture_output=True)  # fmt: skip
    if fails:
        assert "ERROR: no network" in done.stderr and "CalledProcessError" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    asked = re.findall(r"[a-z][\w-]+", (tmp_path / "pip.log").read_text())
    assert asked == ["install", "quiet", "grad-cam", "fairlearn"]
    assert "mounted" in done.stdout and "GPU: none. Choose Runtime" in done.stdout
    kept = content / "drive" / "MyDrive" / Path(ADDRESS).name
    assert done.stdout.splitlines()[-1] == str(kept)
    assert (content / kept.name / "utils" / "settings.py").is_file()


def test_pages_say_what_publish_writes():
    """Results in README and model card, badge and setup cell in notebooks."""
    texts = publish.pages()
    assert len(texts) > 9
    assert {p.name for p, text in texts.items() if text != p.read_text("utf-8")} == set()


def test_a_result_is_filled_in_and_a_missing_one_is_an_error():
    page = "| MAE | <!--=a/b-->old<!--/--> | in <!--=c%-->?<!--/-->, by <!--=d-->x<!--/-->"
    figure = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 1234}
    assert publish.with_results(page, {"a": {"b": figure}, "c": figure, "d": "net"}) == (
        "| MAE | <!--=a/b-->0.50 [0.25, 0.75], n = 1,234<!--/--> | in "
        "<!--=c%-->50.0 [25.0, 75.0], n = 1,234<!--/-->, by <!--=d-->net<!--/-->"
    )
    with pytest.raises(KeyError, match="a"):
        publish.with_results(page, {})


def test_the_address_is_the_same_everywhere():
    """A fork changes CITATION.cff; `python .ci/publish.py` brings it to all other places."""
    assert ADDRESS in publish.SETUP
    assert f"git clone {ADDRESS}" in publish.pages()[ROOT / "README.md"]


def test_badges_appear_with_an_address_and_are_hidden_without():
    assert publish.badge("https://github.com/OWNER/course", "1.ipynb") == ""
    link = publish.badge("https://github.com/me/course", "1.ipynb")
    assert link.endswith("research.google.com/github/me/course/blob/main/notebooks/1.ipynb)")
    for before in ("# T\n\nText\n\nmore", f"# T\n\n{link}\n\nText\n\nmore"):
        assert publish.with_badge(before, "") == "# T\n\nText\n\nmore"
        assert publish.with_badge(before, link) == f"# T\n\n{link}\n\nText\n\nmore"
    hinted = publish.with_badge("# T\n\nText", publish.HINT)
    assert publish.with_badge(hinted, link) == f"# T\n\n{link}\n\nText"
