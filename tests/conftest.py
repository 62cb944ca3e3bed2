"""For every test: where `utils` lies, how many threads, and what a failed notebook cell stops."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


class StopNotebook:
    """Skip the rest of a notebook after a failed cell: it could only fail for the same reason."""

    def __init__(self):
        self.failed = set()

    def pytest_runtest_setup(self, item):
        if item.parent in self.failed:
            pytest.skip("an earlier cell failed")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        if report.failed and type(item).__name__ == "IPyNbCell":
            self.failed.add(item.parent)
        return report


def pytest_configure(config):
    # As a plugin of its own: a conftest's hooks do not see the items of other folders.
    config.pluginmanager.register(StopNotebook())
    if hasattr(config, "workerinput"):
        # The workers of xdist share the cores, and so do the kernels that they start: with more
        # threads than cores, PyTorch slows down tenfold and more.
        os.environ["OMP_NUM_THREADS"] = "1"
        import torch

        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_outer_settings(monkeypatch):
    """The reader's own weights and switches decide no test."""
    for name in ("AGE_FACE_WEIGHTS", "AGE_BACKBONE_WEIGHTS", "AGE_DATA", "AGE_PUBLISH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def one_thread():
    """Small batches gain nothing from more, and lose much on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def own_faces(tmp_path_factory) -> Path:
    """Your own faces, as a reader may have them: 156 drawn ones in two albums, with names and
    groups of their own, and a labels.csv that a spreadsheet wrote. To be read only."""
    from utils.faces import parse_name
    from utils.synthetic import draw_sample

    home = tmp_path_factory.mktemp("own faces")
    draw_sample(home / "drawn", 160, seed=3)
    folder, lines = home / "Porträts 顔", ["File;Age;Gender;Ethnicity;Person"]
    for i, path in enumerate(sorted((home / "drawn").iterdir())):
        if path.name.count("_") < 3 or path.stat().st_size < 500:
            continue  # the defects of the sample
        labels, name = parse_name(path.name), f"album {i % 2}/Bild {i}.JPG"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        path.rename(folder / name)
        group = "Süd" if labels["ethnicity"] == "White" else "NA"
        lines.append(f"{name};{labels['age']};{labels['gender'][0]};{group};p{i // 2}")
    (folder / "labels.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    return folder
