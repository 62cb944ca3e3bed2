"""What may lie in the repository, and whether its documents name only what is there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from utils.settings import ROOT

MAX_BYTES = 30_000_000
# Every other file is text: so no photograph, archive or pickle can come in under another name.
BINARY = ("figures/*.png", "data/utkface_manifest.csv.gz", "data/checkpoints/*.safetensors")
# Pickles run code when they are loaded, and these kinds of image and archive may pass for text.
REFUSED = {
    ".pkl", ".pickle", ".joblib", ".pth", ".pt", ".ckpt", ".npz", ".npy", ".svg", ".jpg", ".jpeg",
    ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz",
    ".7z", ".rar",
}  # fmt: skip
# Put together from pieces, so that this file passes its own test.
HOSTS = [
    "py" + "pi.", "python" + "hosted.org", "ana" + "conda.org", "ana" + "conda.com",
    "npm" + "js.org", "download." + "pytorch.org", "index" + "-url", "INDEX" + "_URL",
]  # fmt: skip
PATHS = [r"\.\./" + "shared", "/" + "work/", "/" + "root/", "/" + r"home/\w", "/" + r"Users/\w"]
FOREIGN = re.compile("|".join([*map(re.escape, HOSTS), *(r"(?<![\w~])" + path for path in PATHS)]))


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Relative paths of the files that are in the repository, or would come in by `git add`."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others"]
    listed = subprocess.run([*command, "--exclude-standard"], cwd=ROOT, capture_output=True)
    assert listed.returncode == 0, listed.stderr.decode()
    paths = [Path(name) for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if (ROOT / path).is_file()]


def misfit(path: Path, data: bytes) -> str:
    """Why a file does not belong into the repository; empty where it does."""
    if len(data) > MAX_BYTES:
        return "too large"
    for pattern in map(Path, BINARY):
        if path.parent == pattern.parent and path.match(pattern.name):
            return ""
    if path.suffix.lower() in REFUSED:
        return "an image, an archive or a pickle"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "not text"
    return "not text" if "\0" in text else ""


def foreign(text: str) -> list[str]:
    """Hosts of package registries, and paths of one machine."""
    return FOREIGN.findall(text)


def test_only_text_figures_and_weights_are_in_the_repository(files):
    found = {str(path): misfit(path, (ROOT / path).read_bytes()) for path in files}
    assert len(found) > 10
    assert {path: reason for path, reason in found.items() if reason} == {}


def test_no_file_names_a_registry_or_a_path_of_one_machine(files):
    texts = {path: (ROOT / path).read_bytes().decode(errors="ignore") for path in files}
    found = {str(path): foreign(text) for path, text in texts.items()}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("figures/face.jpg", b"\xff\xd8\xff"),
        ("figures/deep/face.png", b"\x89PNG\r\n"),
        ("notebooks/figures/face.png", b"\x89PNG\r\n"),
        ("notebooks/face.png", b"\x89PNG\r\n"),
        ("data/sample/face.txt", b"\xff\xd8\xff"),
        ("data/UTKFace.tar.gz", b"\x1f\x8b"),
        ("data/checkpoints/model.pth", b"PK"),
        ("data/checkpoints/model.safetensors", bytes(MAX_BYTES + 1)),
        ("data/text.pkl", b"I1\n."),
        ("data/zeros", bytes(8)),
        ("figures/results.json", b" " * (MAX_BYTES + 1)),
    ],
)
def test_what_does_not_belong_is_caught(path, data):
    assert misfit(Path(path), data)


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("README.md", "é".encode()),
        ("figures/ages.png", b"\x89PNG\r\n"),
        ("data/utkface_manifest.csv.gz", b"\x1f\x8b"),
        ("data/checkpoints/model.safetensors", bytes(8)),
    ],
)
def test_what_belongs_passes(path, data):
    assert misfit(Path(path), data) == ""


def test_foreign_names_are_caught_and_others_pass():
    folders = ["../" + "shared", "/" + "work/x", "/" + "root/x", "/" + "home/me", "/" + "Users/me"]
    for text in (*HOSTS, *folders):
        assert foreign(f"see {text} there"), text
    for text in ("build/work/x", "~/home/x", "pip install torch", "a homework/ folder", "/path/x"):
        assert not foreign(text), text


# The documents

DOCUMENTS = ("README.md", "CONTRIBUTING.md", "data/README.md", "data/checkpoints/README.md")


def page(name: str) -> str:
    """A document as it is seen: without its comments."""
    return re.sub(r"<!--.*?-->", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)


README, PAGES = page("README.md"), "\n".join(map(page, DOCUMENTS))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def code(markdown: str) -> str:
    """The code of a Markdown text, fenced and inline."""
    return "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", markdown, flags=re.MULTILINE | re.DOTALL))


def test_commands_named_anywhere_exist():
    named = set(re.findall(r"-m utils\.(\w+)", PAGES + MAKEFILE))
    assert {"sources", "training"} <= named
    for module in named:
        path = ROOT / "utils" / f"{module}.py"
        assert path.is_file(), f"python -m utils.{module}"
        assert '__name__ == "__main__"' in path.read_text(encoding="utf-8"), path.name


def test_make_targets_named_in_the_documents_exist():
    named = set(re.findall(r"\bmake (\w+)", code(PAGES)))
    targets = set(re.findall(r"^(\w+):", MAKEFILE, flags=re.MULTILINE))
    assert {"course", "test"} <= named
    assert named <= targets
    helped = set(re.findall(r"make (\w+)", MAKEFILE.partition("\nhelp:")[2].partition("\n\n")[0]))
    assert helped == targets - {"help"}


def test_variables_named_in_the_readme_are_read_somewhere():
    named = set(re.findall(r"`((?:AGE|UTKFACE)_\w+)[`=]", README))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "utils").glob("*.py"))
    assert {"AGE_FACES", "AGE_DATA", "UTKFACE_ARCHIVE"} <= named
    assert {name for name in named if f'"{name}"' not in sources} == set()


def test_the_readme_links_every_notebook_and_is_short():
    names = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert set(re.findall(r"\]\(notebooks/([^)]+)\)", README)) == names
    seen = re.sub(r"<details>.*?</details>", "", README, flags=re.DOTALL)
    assert len(seen.split()) < 1500, "a stranger reads it in minutes"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path, text = ROOT / document, page(document)
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", text)
    headings = [
        re.sub(r"[^\w -]", "", h).strip().lower() for h in re.findall(r"^#+ (.*)$", text, re.M)
    ]
    places = {heading.replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= places
    assert {link for link in links if not (path.parent / link).exists()} == set()


def test_requirements_have_a_lower_and_an_upper_bound():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert len(lines) > 5
    bounded = re.compile(r"[\w-]+(\[[\w,-]+\])?>=\d[\d.]*,<\d[\d.]*")
    assert [line for line in lines if not bounded.fullmatch(line)] == []
