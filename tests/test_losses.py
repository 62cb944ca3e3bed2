"""Each head learns by its own loss: smallest at the label, and what autograd makes of it."""

import pytest
import torch

from utils.losses import LOSSES
from utils.model import HEADS, AgeRegressor


def test_every_head_has_a_loss():
    assert set(LOSSES) == set(HEADS)


@pytest.mark.parametrize("head", HEADS)
def test_a_few_steps_on_the_last_layer_lead_to_the_labels(head):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AgeRegressor("resnet18", 64, age_mean=40, age_scale=20, head=head)
    ages = torch.tensor([5.0, 25.0, 45.0, 65.0])
    features = torch.eye(4, 512)
    layer = model.backbone.get_submodule(model.last_layer)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, 400)
    first = None
    for _ in range(400):
        losses = LOSSES[head](model, layer(features), ages)
        assert losses.shape == (4,)
        first = losses.mean().item() if first is None else first
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()
        schedule.step()
    assert losses.mean().item() < first / 2
    with torch.inference_mode():
        assert (model.ages(layer(features)) - ages).abs().max() < 4


def test_age_groups_end_at_seventy():
    model = AgeRegressor("resnet18", 64, head="groups")
    outputs = torch.full((3, 8), -30.0)
    outputs[0, 0] = outputs[1, 6] = outputs[2, 7] = 30.0
    assert LOSSES["groups"](model, outputs, torch.tensor([9.0, 69.0, 116.0])).max() < 1e-6
    assert LOSSES["groups"](model, outputs, torch.tensor([10.0, 70.0, 69.0])).min() > 10
