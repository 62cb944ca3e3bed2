"""The switch: which faces a run uses, and what its settings print."""

from dataclasses import replace
from pathlib import Path

import pytest

from utils.settings import ROOT, banner, comparison_settings, get_settings, locate


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder, and no variable set but the one that names it."""
    for name in ("AGE_FACES", "UTKFACE_ARCHIVE", "AGE_PUBLISH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AGE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_unset_and_nothing_there_means_the_sample(data):
    settings = get_settings()
    assert settings.faces == "sample"
    assert settings.folder == data / "sample"
    assert settings.cache == data / "cache" / "sample"
    assert settings.runs == data / "runs" / "sample"


def test_unset_with_the_folder_means_utkface(data):
    (data / "UTKFace").mkdir(parents=True)
    settings = get_settings()
    assert (settings.faces, settings.folder) == ("utkface", data / "UTKFace")


def test_unset_with_an_archive_means_utkface(monkeypatch):
    monkeypatch.setenv("UTKFACE_ARCHIVE", "somewhere.tar.gz")
    assert get_settings().faces == "utkface"


@pytest.mark.parametrize("archive", ["", "somewhere.tar.gz"])
@pytest.mark.parametrize(
    ("value", "faces"), [("sample", "sample"), (" UTKFace ", "utkface"), ("utkface", "utkface")]
)
def test_the_variable_decides_over_what_is_there(monkeypatch, data, value, faces, archive):
    monkeypatch.setenv("UTKFACE_ARCHIVE", archive)
    monkeypatch.setenv("AGE_FACES", value)
    assert get_settings().faces == faces


def test_an_argument_decides_over_the_variable(monkeypatch):
    monkeypatch.setenv("AGE_FACES", "utkface")
    assert get_settings("sample").faces == "sample"


@pytest.mark.parametrize("value", ["quick", "UTK", "sample,utkface"])
def test_a_wrong_value_is_refused_with_the_right_ones(monkeypatch, value):
    monkeypatch.setenv("AGE_FACES", value)
    with pytest.raises(ValueError, match="'sample' or 'utkface'"):
        get_settings()


def test_without_age_data_everything_lies_in_the_project(monkeypatch):
    monkeypatch.delenv("AGE_DATA")
    settings = get_settings("sample")
    assert settings.folder == ROOT / "data" / "sample"
    assert "data/sample" in str(settings)


def test_the_data_folder_may_start_at_home_or_be_relative(monkeypatch, tmp_path):
    monkeypatch.setenv("AGE_DATA", "~/faces")
    assert get_settings("sample").folder == Path.home().resolve() / "faces" / "sample"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGE_DATA", "here")
    assert get_settings("sample").folder == tmp_path.resolve() / "here" / "sample"


def test_only_a_published_run_writes_into_figures(monkeypatch):
    assert get_settings().figures == ROOT / "build" / "figures"
    monkeypatch.setenv("AGE_PUBLISH", "0")
    assert not get_settings().publish
    monkeypatch.setenv("AGE_PUBLISH", "1")
    assert get_settings().publish
    assert get_settings().figures == ROOT / "figures"


def test_a_path_may_be_relative_to_the_project(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a notebook's working folder is its own
    assert locate("data/README.md") == ROOT / "data" / "README.md"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").touch()
    assert locate("data/README.md").resolve() == tmp_path / "data" / "README.md"


def test_a_folder_means_your_own_faces(monkeypatch, tmp_path, data):
    folder = tmp_path / "Meine Bilder 顔"
    folder.mkdir()
    monkeypatch.setenv("AGE_FACES", str(folder))
    own = get_settings()
    assert (own.faces, own.folder) == ("own", folder)
    assert own.backbone == get_settings("utkface").backbone and own.pretrained
    assert "your own faces" in banner(own)
    (tmp_path / "other" / folder.name).mkdir(parents=True)
    other = get_settings(str(tmp_path / "other" / folder.name))
    assert other.cache != own.cache and other.cache.parent == own.cache.parent == data / "cache"
    assert other.runs != own.runs
    monkeypatch.setenv("AGE_PUBLISH", "1")
    with pytest.raises(ValueError, match="not with your own faces"):
        get_settings()


@pytest.mark.parametrize("faces", ["sample", "utkface"])
def test_printed_settings_show_all_fields_and_no_absolute_path(faces, data):
    settings = get_settings(faces)
    text = str(settings)
    for secret in (str(ROOT), str(data), str(data.parent), str(Path.home())):
        assert secret not in text
    shown = dict(line.split(maxsplit=1) for line in text.splitlines())
    assert list(shown) == list(vars(settings))
    assert shown["faces"] == faces
    assert shown["image_size"] == str(settings.image_size)
    assert shown["cache"] == f".../{faces}"


def test_the_banner_warns_readers_of_the_sample_only():
    warning = "numbers quoted in the text are UTKFace's"
    assert warning in banner(get_settings("sample"))
    assert warning not in banner(get_settings("utkface"))


@pytest.mark.parametrize("faces", ["sample", "utkface"])
def test_comparisons_are_cheaper_and_alike_in_all_else(faces):
    own = get_settings(faces)
    small = comparison_settings(own)
    cost = [s.image_size**2 * s.epochs for s in (small, own)]
    assert cost[0] < cost[1] / 5
    assert replace(small, image_size=own.image_size, epochs=own.epochs) == own
