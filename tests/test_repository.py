"""What may lie in the repository, and whether its documents name only what is there."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from utils.settings import ROOT

MAX_BYTES = 10_000_000
# Every other file is text: so no photograph, archive or pickle can come in under another name.
BINARY = {
    "figures": r".*\.png|predictions\.csv\.gz", "data": r"utkface_manifest\.csv\.gz",
    "data/checkpoints": r".*\.safetensors",
}  # fmt: skip
# Put together from pieces, so that this file passes its own test.
HOSTS = [
    "py" + "pi.", "python" + "hosted.org", "ana" + "conda.org", "ana" + "conda.com",
    "npm" + "js.org", "download." + "pytorch.org", "index" + "-url", "INDEX" + "_URL",
]  # fmt: skip
PATHS = [r"\.\./" + "shared", "/" + "work/", "/" + "root/", "/" + r"home/\w", "/" + r"Users/\w"]
FOREIGN = re.compile("|".join([*map(re.escape, HOSTS), *(r"(?<![\w~])" + path for path in PATHS)]))

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "data/README.md", "data/checkpoints/README.md")
# As they are seen: without their comments.
PAGES = {
    name: re.sub(r"<!--.*?-->", "", (ROOT / name).read_text("utf-8"), flags=re.DOTALL)
    for name in DOCUMENTS
}
ALL_PAGES, MAKEFILE = "\n".join(PAGES.values()), (ROOT / "Makefile").read_text("utf-8")
MODULES = re.findall(r"^ {6}(\w+) +\S", PAGES["CONTRIBUTING.md"].partition("  tests/")[0], re.M)
SOURCES = {path.stem: path.read_text("utf-8") for path in (ROOT / "utils").glob("[a-z]*.py")}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """The files that are in the repository, or would come in by `git add`."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others"]
    listed = subprocess.run([*command, "--exclude-standard"], cwd=ROOT, capture_output=True)
    assert listed.returncode == 0, listed.stderr.decode()
    names = {name for name in listed.stdout.decode().split("\0") if name}
    return {name: (ROOT / name).read_bytes() for name in names if (ROOT / name).is_file()}


def is_text(data: bytes) -> bool:
    try:
        return "\0" not in data.decode()
    except UnicodeDecodeError:
        return False


def test_only_text_figures_and_weights_of_moderate_size_are_here(files):
    """No photograph and no pickle, which runs code when it is loaded."""
    for name, data in files.items():
        path = Path(name)
        assert len(data) <= MAX_BYTES, f"{name} is too large"
        if not re.fullmatch(BINARY.get(path.parent.as_posix(), "-"), path.name):
            assert is_text(data) and path.suffix not in {".svg", ".ppm", ".pkl"}, name


def test_no_file_names_a_registry_or_a_path_of_one_machine(files):
    texts = {name: data.decode(errors="ignore") for name, data in files.items()}
    found = {name: FOREIGN.findall(text) for name, text in texts.items()}
    assert {name: names for name, names in found.items() if names} == {}


def test_the_map_of_modules_is_complete_and_imports_go_up_in_it():
    assert set(MODULES) == set(SOURCES)
    for module, source in SOURCES.items():
        imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
        named = {str(node.module).removeprefix("utils.") for node in imports}
        named |= {a.name for node in imports if node.module == "utils" for a in node.names}
        above = MODULES[: MODULES.index(module)]
        assert (named & set(MODULES)) <= set(above), f"{module} imports what stands below it"
    assert "import torch" not in SOURCES["evaluation"]


def test_commands_and_make_targets_that_are_named_exist():
    named = set(re.findall(r"-m utils\.(\w+)", ALL_PAGES + MAKEFILE))
    assert {"download", "training", "predict"} <= named <= set(SOURCES)
    assert [name for name in named if '__name__ == "__main__"' not in SOURCES[name]] == []
    code = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", ALL_PAGES, flags=re.M | re.S))
    targets = set(re.findall(r"^(\w+):", MAKEFILE, re.M))
    assert {"course", "test"} <= set(re.findall(r"\bmake ([a-z]+)", code)) <= targets
    helped = set(re.findall(r'"make (\w+)', MAKEFILE.partition("\nhelp:")[2].partition("\n\n")[0]))
    assert helped == targets - {"help"}


def test_variables_named_in_the_readme_are_read_somewhere():
    named = set(re.findall(r"`((?:AGE|UTKFACE)_\w+)[`=]", PAGES["README.md"]))
    assert {"AGE_FACES", "AGE_DATA", "AGE_FACE_WEIGHTS", "UTKFACE_ARCHIVE"} <= named
    texts = [*SOURCES.values(), *(p.read_text("utf-8") for p in ROOT.glob("notebooks/*.ipynb"))]
    code = "".join(texts).replace('\\"', '"')  # as it stands in notebooks
    assert {name for name in named if f'"{name}"' not in code} == set()


def test_the_readme_links_every_notebook_and_is_short():
    names = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(re.findall(r"\]\(notebooks/([^)]+)\)", PAGES["README.md"])) == names
    prose = re.sub(r"^[|\[].*", "", PAGES["README.md"], flags=re.M)  # no tables, no addresses
    assert len(prose.split()) < 1500, "a stranger reads it in minutes"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = PAGES[document]
    headings = [re.sub(r"[^\w -]", "", h).strip() for h in re.findall(r"^#+ (.*)$", text, re.M)]
    places = {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= places
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text)
    assert [link for link in links if not ((ROOT / document).parent / link).exists()] == []


def test_requirements_have_a_lower_and_an_upper_bound_and_a_word_on_why():
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    bounded = re.compile(r"([\w-]+)>=\d[\d.]*,<\d[\d.]*")
    assert [line for line in lines if not bounded.fullmatch(line)] == []
    told = PAGES["CONTRIBUTING.md"].partition("## Packages")[2]
    assert [name for name in map(bounded.match, lines) if name[1] not in told] == []
