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
    for name in ("AGE_BACKBONE_WEIGHTS", "AGE_BACKBONE_MEAN_STD", "AGE_DATA", "AGE_PUBLISH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def one_thread():
    """Small batches gain nothing from more, and lose much on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
