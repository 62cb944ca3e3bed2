"""Maps: their arithmetic on a network small enough to know the answer."""

import numpy as np
import pytest
import torch
from torch import nn

from utils import explain
from utils.model import AgeRegressor

SIDE = 40


class Corner(nn.Module):
    """The upper left quarter raises the age by 40 x its brightness, the lower right lowers it."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.AvgPool2d(5))
        self.last = nn.Linear(64, 1)

    def forward(self, images):
        return self.last(self.features(images).mean(1).flatten(1))


@pytest.fixture()
def known() -> AgeRegressor:
    model = AgeRegressor(Corner(), SIDE, (0, 0, 0), (1, 1, 1), age_mean=30, age_scale=1)
    weight = torch.zeros(8, 8)
    weight[:4, :4], weight[4:, 4:] = 40 / 16, -40 / 16
    model.backbone.last.weight.data = weight.view(1, 64)
    return model.eval()


@pytest.fixture()
def chips():
    chips = np.random.default_rng(0).integers(20, 235, (40, SIDE, SIDE, 3), np.uint8)
    chips[:, 4:8, 4:8] = 255  # a spot that the blur spreads, not only within its quarter
    return chips


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18", "face_mobilenet"])
def test_stages_go_from_fine_to_coarse(backbone):
    assert list(explain.stages(AgeRegressor(backbone, 64))) == [32, 16, 8, 4, 2]


def test_a_map_holds_the_years_that_the_face_differs_by_from_its_blurred_self(known, chips):
    maps = explain.age_maps(known, chips, np.arange(40))
    assert maps.shape == (40, 8, 8) and maps.dtype == np.float32
    images = torch.from_numpy(chips).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():  # the network is linear, so that the first order is all of it
        moved = (known(images) - known(explain.blurred(images))).numpy()
    assert np.allclose(maps.sum((1, 2)), moved, atol=1e-3) and np.abs(moved).max() > 0.01
    assert not maps[:, :4, 4:].any() and not maps[:, 4:, :4].any()
    assert np.allclose(explain.age_maps(known, chips, [3, 1]), maps[[3, 1]], atol=1e-5)
    even = np.full_like(chips, 99)
    assert np.abs(explain.age_maps(known, even, [0])).max() < 1e-4, "blur does not change it"


@pytest.mark.parametrize(("size", "side", "places"), [(160, 20, 20), (64, 20, 16), (64, 1, 2)])
def test_the_layer_of_the_nearest_side_is_taken(size, side, places):
    model = AgeRegressor("face_mobilenet", size, head="distribution").requires_grad_(False)
    maps = explain.age_maps(model, np.zeros((2, 128, 128, 3), np.uint8), [0, 1], side)
    assert maps.shape == (2, places, places)
