"""Corruptions: each does what its severity says, and all do it the same way every time."""

import pytest
import torch

from utils.corruptions import CORRUPTIONS, SEVERITIES, corrupt

WORSE = [(name, level) for name in SEVERITIES for level in range(1, 5)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def chips() -> torch.Tensor:
    """Eight images with coarse and fine detail, uint8 [8, 3, 128, 128]."""
    coarse = torch.rand(8, 3, 8, 8, generator=generator())
    smooth = torch.nn.functional.interpolate(coarse, (128, 128), mode="bicubic").clamp(0, 1)
    fine = torch.rand(8, 3, 128, 128, generator=generator(1))
    return (255 * (0.2 + 0.4 * smooth + 0.2 * fine)).to(torch.uint8)


def test_ten_of_light_and_quality_and_occlusion_apart():
    assert len(CORRUPTIONS) == 10 and set(SEVERITIES) - set(CORRUPTIONS) == {"occlusion"}
    assert all(len(amounts) == 5 for amounts in SEVERITIES.values())


@pytest.mark.parametrize(("name", "level"), WORSE)
def test_each_severity_is_worse_than_the_one_before(chips, name, level):
    clean = chips / 255
    milder, stronger = (corrupt(chips, name, level + i, generator()) for i in (0, 1))
    for images in (milder, stronger):
        assert images.shape == chips.shape and 0 <= images.min() and images.max() <= 1
    assert 0 < (milder - clean).abs().mean() < (stronger - clean).abs().mean()


@pytest.mark.parametrize("name", SEVERITIES)
def test_the_generator_decides_and_the_chips_stay(chips, name):
    before = chips.clone()
    first = corrupt(chips, name, 3, generator())
    assert torch.equal(first, corrupt(chips, name, 3, generator()))
    assert torch.equal(chips, before)
    assert torch.equal(first, corrupt(chips / 255, name, 3, generator()))
    drawn = name in ("colour cast", "side shadow", "noise", "occlusion")
    assert torch.equal(first, corrupt(chips, name, 3, generator(1))) != drawn


def test_amounts_are_those_named(chips):
    flat = torch.full((64, 3, 128, 128), 0.4)
    assert corrupt(flat, "dark", 4, generator()).unique().item() == pytest.approx(0.1)
    assert corrupt(flat, "bright", 5, generator()).unique().item() == pytest.approx(0.92)
    assert corrupt(flat, "low contrast", 3, generator()).unique().item() == pytest.approx(0.43)
    cast = corrupt(flat, "colour cast", 5, generator())[:, :, 0, 0]
    assert {round(float(red), 3) for red in cast[:, 0]} == {0.2, 0.6}
    assert torch.allclose(cast[:, 0] + cast[:, 2], torch.tensor(0.8))
    shadow = corrupt(flat, "side shadow", 4, generator())[:, 0, 0]
    sides = {(round(float(row[0]), 3), round(float(row[-1]), 3)) for row in shadow}
    assert sides == {(0.4, 0.08), (0.08, 0.4)}
    grain = corrupt(flat, "noise", 2, generator()) - 0.4
    assert grain.std().item() == pytest.approx(0.04, rel=0.02)
    hidden = (corrupt(flat, "occlusion", 5, generator())[:, 0] == 0.5).float().mean((1, 2))
    assert hidden.min() > 0.33 and hidden.max() < 0.38
    dot = torch.zeros(1, 3, 128, 128)
    dot[..., 64, 64] = 1
    streak = corrupt(dot, "motion blur", 3, generator())[0, 0]
    assert (streak > 0).sum() == 9 and (streak[64] > 0).sum() == 9
    spot = corrupt(dot, "Gaussian blur", 3, generator())[0, 0]
    spread = (spot.sum(0) @ (torch.arange(128.0) - 64) ** 2 / spot.sum()).sqrt()
    assert spread.item() == pytest.approx(2, rel=0.05)
    few = corrupt(chips, "low resolution", 5, generator())
    assert torch.linalg.matrix_rank(few[0, 0], atol=1e-3) <= 20


@pytest.mark.parametrize(("name", "severity"), [("fog", 1), ("dark", 0), ("dark", 6)])
def test_unknown_names_and_severities_are_refused(chips, name, severity):
    with pytest.raises(ValueError, match="severities 1-5"):
        corrupt(chips, name, severity, generator())
