"""The switch: which faces a run uses, and what follows from it."""

from dataclasses import replace
from pathlib import Path

import pytest

from utils import settings as module
from utils.settings import ROOT, banner, comparison_settings, get_settings, locate, write_atomically


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, and no variable set but the one that names it."""
    for name in ("AGE_FACES", "UTKFACE_ARCHIVE", "AGE_PUBLISH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AGE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_unset_means_utkface_where_it_is_and_else_the_sample(data, monkeypatch):
    settings = get_settings()
    assert (settings.faces, settings.folder) == ("sample", data / "sample")
    assert settings.cache == data / "cache" / "sample" and settings.runs == data / "runs" / "sample"
    monkeypatch.setenv("UTKFACE_ARCHIVE", "somewhere.tar.gz")
    assert get_settings().faces == "utkface"
    monkeypatch.delenv("UTKFACE_ARCHIVE")
    (data / "UTKFace").mkdir(parents=True)
    assert (get_settings().faces, get_settings().folder) == ("utkface", data / "UTKFace")


def test_the_variable_decides_over_what_is_there_and_an_argument_over_both(monkeypatch):
    monkeypatch.setenv("UTKFACE_ARCHIVE", "somewhere.tar.gz")
    monkeypatch.setenv("AGE_FACES", "sample")
    assert get_settings().faces == "sample"
    monkeypatch.setenv("AGE_FACES", " UTKFace ")
    assert get_settings().faces == "utkface"
    assert get_settings("sample").faces == "sample"
    monkeypatch.setenv("AGE_FACES", "quick")
    with pytest.raises(ValueError, match="'sample' or 'utkface'"):
        get_settings()


def test_the_data_folder_may_start_at_home_or_be_relative(monkeypatch, tmp_path):
    monkeypatch.setenv("AGE_DATA", "~/faces")
    assert get_settings("sample").folder == Path.home().resolve() / "faces" / "sample"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGE_DATA", "here")
    assert get_settings("sample").folder == tmp_path.resolve() / "here" / "sample"
    monkeypatch.delenv("AGE_DATA")
    assert get_settings("sample").folder == ROOT / "data" / "sample"
    assert locate("data/README.md") == ROOT / "data" / "README.md"  # a notebook's folder is its own


def test_only_a_published_run_writes_into_figures(monkeypatch):
    assert get_settings().figures == ROOT / "build" / "figures"
    monkeypatch.setenv("AGE_PUBLISH", "1")
    assert get_settings().publish and get_settings().figures == ROOT / "figures"


def test_a_folder_means_your_own_faces(monkeypatch, tmp_path, data):
    folder, other = tmp_path / "Meine Bilder 顔", tmp_path / "other" / "Meine Bilder 顔"
    folder.mkdir()
    other.mkdir(parents=True)
    monkeypatch.setenv("AGE_FACES", str(folder))
    own = get_settings()
    assert (own.faces, own.folder) == ("own", folder)
    assert own.backbone == get_settings("utkface").backbone and own.pretrained
    assert "your own faces" in banner(own) and "UTKFace's numbers" in banner(get_settings("sample"))
    assert get_settings(str(other)).cache != own.cache, "two folders of one name share a cache"
    monkeypatch.setenv("AGE_PUBLISH", "1")
    with pytest.raises(ValueError, match="not with your own faces"):
        get_settings()


@pytest.mark.parametrize("faces", ["sample", "utkface"])
def test_comparisons_are_cheaper_and_alike_in_all_else(faces):
    own = get_settings(faces)
    small = comparison_settings(own)
    assert small.image_size**2 * small.epochs < own.image_size**2 * own.epochs / 3
    assert replace(small, image_size=own.image_size, epochs=own.epochs) == own


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomically(path, lambda file: file.write_text("first"))

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(OSError, match=r"file\.txt cannot be written.*No space.*AGE_DATA"):
        write_atomically(path, lambda file: file.write_text("second"))
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]
