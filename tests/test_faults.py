"""What can go wrong, seen from outside: notebooks in any order, and the README's list of faults.

Single faults are tested beside the code that answers them, in the tests marked `fault`.
"""

import os
import re
import subprocess
import sys

import pytest
from conftest import count

from utils.report import README, reliability, with_block
from utils.settings import ROOT

# All notebooks in one process, each in a namespace of its own, with networks small enough.
RUN = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
import matplotlib
matplotlib.use("Agg")
from IPython.core.interactiveshell import InteractiveShell
sys.path.insert(0, str(Path.cwd().parent))
from matplotlib import pyplot as plt
from utils import settings
get, compare = settings.get_settings, settings.comparison_settings
small = dict(backbone="resnet18", pretrained=False, image_size=32, epochs=1, batch_size=32)
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


@pytest.mark.fault(
    "notebooks run in any order", "each rebuilds what it needs; here in reverse, from nothing"
)
def test_notebooks_in_reverse_order_from_nothing(own_faces, tmp_path):
    """On a folder of one's own, so that this route is walked to its end as well."""
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"), reverse=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AGE_", "UTKFACE_"))}
    environment |= {"AGE_FACES": str(own_faces), "AGE_DATA": str(tmp_path / "Daten 数据")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *map(str, paths)],
        cwd=ROOT / "notebooks", capture_output=True, encoding="utf-8", timeout=3000,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1",
                           "IPYTHONDIR": str(tmp_path / "ipython")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.findall(r"^ran (\w+)$", done.stdout, re.M) == [path.stem for path in paths]


def test_the_readme_lists_all_faults_and_counts_their_tests(request):
    """The numbers come from a test run; here they are compared with what was collected."""
    files = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    items = request.session.items
    options = request.config.option
    if options.markexpr or options.keyword or not files <= {item.path.name for item in items}:
        pytest.skip("only a part of the tests was collected")
    faults = {}
    for mark in (mark for item in items for mark in item.iter_markers("fault")):
        count(faults, mark.args, "passed")
    page = README.read_text("utf-8")
    assert with_block(page, reliability(faults), kind="faults") == page, "run `make faults`"


def test_every_fault_tells_its_outcome_once(request):
    told = {}
    for path in (ROOT / "tests").glob("test_*.py"):
        for what, outcome in re.findall(
            r'^@pytest\.mark\.fault\(\s*"([^"]+)"(?:,\s*"([^"]+)")?,?\s*\)',
            path.read_text("utf-8"), re.M,
        ):  # fmt: skip
            told.setdefault(what, []).extend(filter(None, [outcome]))
    assert len(told) > 20
    assert {what for what, outcomes in told.items() if len(outcomes) != 1} == set()


def test_a_failed_or_skipped_fault_is_not_reported():
    good = {"a": {"outcome": "b", "passed": 2}}
    assert "1 faults, provoked by 2 tests" in reliability(good)
    for outcome in ("failed", "skipped"):
        with pytest.raises(ValueError, match="not written.*: c"):
            reliability(good | {"c": {"outcome": "d", "passed": 1, outcome: 1}})
