"""Maps: their arithmetic on networks small enough to know the answer, and the tests of maps."""

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM, HiResCAM
from pytorch_grad_cam.utils.image import scale_cam_image
from torch import nn

from utils import explain
from utils.model import AgeRegressor

SIDE = 32


class Corner(nn.Module):
    """The upper left quarter raises the age by 40 x its brightness, the lower right lowers it."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.AvgPool2d(4))
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
    chips = np.random.default_rng(0).integers(20, 235, (12, SIDE, SIDE, 3), np.uint8)
    return (chips * np.linspace(0.2, 1, SIDE)[:, None]).astype(np.uint8)


def as_images(chips: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(chips).permute(0, 3, 1, 2) / 255


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18", "face_mobilenet"])
def test_stages_go_from_fine_to_coarse(backbone):
    assert list(explain.stages(AgeRegressor(backbone, 64))) == [32, 16, 8, 4, 2]


def test_a_map_holds_years_with_their_sign(known, chips):
    layer = known.backbone.features[0]
    maps = explain.age_maps(known, chips, np.arange(12), layer, HiResCAM, batch_size=5)
    assert maps.shape == (12, 8, 8) and maps.dtype == np.float32
    with torch.inference_mode():
        assert np.allclose(maps.sum((1, 2)), known(as_images(chips)) - 30, atol=1e-3)
    assert (maps[:, :4, :4] > 0).all() and (maps[:, 4:, 4:] < 0).all() and not maps[:, :4, 4:].any()
    flat = explain.age_maps(known, chips, [3, 1], layer, GradCAM)
    assert np.abs(flat).max() < 1e-5, "+ and - in one channel: their mean is nothing"
    dark = explain.age_maps(known, chips, [3, 1], layer, HiResCAM, corrupt=lambda c: 0 * c)
    assert np.abs(dark).max() == 0


def test_the_positive_part_is_what_the_package_returns(chips):
    torch.manual_seed(0)
    model = AgeRegressor("resnet18", SIDE, head="distribution").eval()
    layer = explain.stages(model)[4]
    maps = explain.age_maps(model, chips, np.arange(4), layer)
    with GradCAM(model, [layer]) as cam:
        theirs = cam(as_images(chips[:4]).requires_grad_(), [lambda age: age] * 4)
    ours = scale_cam_image(np.maximum(maps, 0), (SIDE, SIDE))  # once a layer, once over layers
    assert np.allclose(scale_cam_image(ours), theirs, atol=1e-4)
    assert (maps < -0.01 * maps.max()).any(), "which it would hide"
