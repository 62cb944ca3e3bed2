"""Maps: their arithmetic on networks small enough to know the answer, and the tests of maps."""

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from pytorch_grad_cam import GradCAM, HiResCAM
from torch import nn

from utils import explain
from utils.model import AgeRegressor

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 32


class Corner(nn.Module):
    """Age 30, plus 40 times the brightness of the upper left quarter, minus that of the lower
    right one: so what raises and what lowers the age is known."""

    def __init__(self):
        super().__init__()
        weight = torch.zeros(2, 1, SIDE // 4, SIDE // 4)
        weight[0, 0, :4, :4], weight[1, 0, 4:, 4:] = 1 / 16, 1 / 16
        self.features = nn.Sequential(nn.AvgPool2d(4))
        self.weight = nn.Parameter(weight)

    def forward(self, images):
        grey = self.features(images).mean(1, keepdim=True)
        quarters = nn.functional.conv2d(grey, self.weight).flatten(1)
        return 40 * (quarters[:, :1] - quarters[:, 1:])


@pytest.fixture()
def known() -> AgeRegressor:
    model = AgeRegressor("resnet18", SIDE, (0, 0, 0), (1, 1, 1), age_mean=30, age_scale=1)
    model.backbone = Corner()
    return model.eval()


@pytest.fixture()
def chips() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(20, 235, (12, SIDE, SIDE, 3), np.uint8)


def test_stages_go_from_fine_to_coarse():
    stages = explain.stages(AgeRegressor("mobilenet_v2", 64))
    assert list(stages) == [32, 16, 8, 4, 2]
    assert list(explain.stages(AgeRegressor("resnet18", 64))) == [32, 16, 8, 4, 2]
    with pytest.raises(ValueError, match="is a transformer"):
        explain.stages(AgeRegressor("vit_b_16", 32))


def test_a_map_holds_years_with_their_sign(known, chips):
    layer = known.backbone.features[0]
    maps = explain.age_maps(known, chips, np.arange(12), layer, HiResCAM, batch_size=5)
    assert maps.shape == (12, 8, 8) and maps.dtype == np.float32
    images = torch.from_numpy(chips).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        assert np.allclose(maps.sum((1, 2)), known(images) - 30, atol=1e-3), "linear: exact"
    assert (maps[:, :4, :4] > 0).all() and (maps[:, 4:, 4:] < 0).all()
    assert np.abs(maps[:, :4, 4:]).max() == 0


def test_grad_cam_averages_the_gradient_first(known, chips):
    maps = explain.age_maps(known, chips, [3, 1], known.backbone.features[0], GradCAM)
    assert np.abs(maps).max() < 1e-5, "here it averages to nothing: + and - in one channel"
    model = AgeRegressor("mobilenet_v2", 64, head="distribution")
    layer = list(explain.stages(model).values())[-1]
    last = [explain.age_maps(model, chips, [0, 1], layer, m) for m in (GradCAM, HiResCAM)]
    assert np.allclose(*last, atol=1e-4), "before global pooling both are the same"


def test_faithfulness_tells_true_maps_from_others(known, chips):
    images = torch.from_numpy(chips).permute(0, 3, 1, 2) / 255
    images = images * torch.linspace(0.2, 1, SIDE)  # so that taking pixels away changes something
    chips = (255 * images).byte().permute(0, 2, 3, 1).numpy()
    true = explain.age_maps(known, chips, np.arange(12), known.backbone.features[0], HiResCAM)
    score = {
        "true": explain.faithfulness(known, images, true).mean(),
        "reversed": explain.faithfulness(known, images, -true).mean(),
    }
    assert score["true"] == pytest.approx(-score["reversed"], abs=0.2)
    strong = explain.faithfulness(known, images, true, signed=False)
    assert strong.shape == (12,)


def test_random_weights_go_from_the_last_block_to_the_first(chips):
    model = AgeRegressor("mobilenet_v2", 32)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    for name, copy in explain.randomised(model):
        state = copy.state_dict()
        changed = {k.split(".")[2] for k in state if not torch.equal(state[k], start[k])
                   and ".features." in f".{k}" and "weight" in k}  # fmt: skip
        seen.append((name, len(changed)))
    assert seen[0] == ("classifier", 0)
    assert seen[-1][0] == "features.0" and seen[-1][1] == 19
    assert [count for _, count in seen] == sorted(count for _, count in seen)
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())


def test_correlation_shares_and_attention():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(5, 4, 4))
    assert explain.rank_correlation(maps, 3 * maps + 1) == pytest.approx(np.ones(5))
    assert explain.rank_correlation(maps, -maps) == pytest.approx(-np.ones(5))
    assert explain.rank_correlation(maps, np.zeros_like(maps)) == pytest.approx(np.zeros(5))
    assert explain.attention(maps).sum((1, 2)) == pytest.approx(np.ones(5))
    masks = maps > 0
    assert explain.share_inside(maps, masks) == pytest.approx(np.ones(5))
    assert explain.share_inside(maps, ~masks) == pytest.approx(np.zeros(5))


def test_edges_are_found_where_they_are():
    chip = np.zeros((1, 32, 32, 3), np.uint8)
    cv2.rectangle(chip[0], (8, 0), (31, 31), (255, 255, 255), -1)
    edges = explain.edge_maps(chip, 16)[0]
    assert edges.shape == (16, 16) and set(edges.argmax(1)) <= {3, 4}


def groups_of_maps(shift, seed):
    rng = np.random.default_rng(seed)
    people = pd.Series(rng.choice(["A", "B", "C"], 300))
    bands = pd.Series(rng.choice(["young", "old"], 300))
    maps = rng.gamma(1, size=(300, 4, 4))
    maps[bands == "old", 0] *= 3  # age moves the maps; that alone is no difference of groups
    maps[people == "B", :, 0] *= shift
    return maps, people, bands, pd.Series(np.arange(300))


def test_a_planted_difference_of_groups_is_found_and_none_invented():
    distance, chance = explain.attention_distance(*groups_of_maps(2, 0), draws=99)
    assert distance > chance.max()
    alarms = 0
    for seed in range(40):
        distance, chance = explain.attention_distance(*groups_of_maps(1, seed), draws=39)
        alarms += (1 + (chance >= distance).sum()) / 40 <= 0.05
    assert alarms <= 6


def test_groups_of_other_ages_do_not_pass_for_other_attention():
    maps, people, bands, clusters = groups_of_maps(1, 1)
    older = np.random.default_rng(2).random(300) < np.where(bands == "old", 0.8, 0.2)
    people = pd.Series(np.where(older, "A", "B"))
    distance, chance = explain.attention_distance(maps, people, bands, clusters, draws=99)
    assert (chance >= distance).mean() > 0.05
