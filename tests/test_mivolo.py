"""The published MiVOLO: its loading and calling code, on a stand-in for its packages."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from utils.mivolo import MODEL, PACKAGES, MivoloMissing, load_mivolo, mivolo_ages


class Processor:
    """Takes BGR images or None, as the published one does."""

    def __call__(self, images):
        arrays = [np.zeros((4, 4, 3), np.uint8) if image is None else image for image in images]
        return {"pixel_values": torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float()}


class Net(torch.nn.Module):
    """The age is the mean of the blue channel, which comes first, when there is no body."""

    def forward(self, faces_input, body_input):
        assert faces_input.shape[0] == body_input.shape[0]
        assert body_input.abs().sum() == 0
        return SimpleNamespace(age_output=faces_input[:, 0].mean((1, 2))[:, None])


@pytest.fixture()
def hub(monkeypatch):
    """Stand-ins for the packages; `hub.error` makes the download fail."""
    state = SimpleNamespace(error=None, asked=[])

    def loader(answer):
        def from_pretrained(name, trust_remote_code):
            state.asked.append((name, trust_remote_code))
            if state.error:
                raise state.error
            return answer

        return SimpleNamespace(from_pretrained=from_pretrained)

    for name in PACKAGES:
        module = ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["transformers"].AutoModelForImageClassification = loader(Net())
    sys.modules["transformers"].AutoImageProcessor = loader(Processor())
    return state


def test_ages_come_in_order_and_in_batches(hub):
    net, processor = load_mivolo()
    assert hub.asked == [(MODEL, True)] * 2
    assert not net.training
    pixels = np.zeros((5, 4, 4, 3), np.uint8)
    pixels[..., 2] = np.arange(10, 60, 10)[:, None, None]  # blue of RGB
    ages = mivolo_ages(net, processor, pixels, np.array([4, 0, 2]), batch_size=2)
    assert ages.tolist() == [50, 10, 30]
    assert mivolo_ages(net, processor, pixels, np.array([], int)).shape == (0,)


def test_without_the_packages_the_message_names_them(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MivoloMissing, match="transformers, timm, mivolo.*WildChlamydia/MiVOLO"):
        load_mivolo()


def test_without_a_network_the_message_says_so(hub):
    hub.error = OSError("We couldn't connect to the hub\nmore")
    with pytest.raises(MivoloMissing, match="We couldn't connect to the hub.*check the network"):
        load_mivolo()
