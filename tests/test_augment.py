"""Random views: what is drawn and what is kept. Corruptions: each does what its severity says."""

import pytest
import torch
import torch.nn.functional as F

from utils import augment as module
from utils.augment import SEVERITIES, augment, corrupt, resize

ALL = module.STANDARD | module.OCCLUSION


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, size: int) -> torch.Tensor:
    """Coarse and fine detail, neither black nor white anywhere: uint8 [count, 3, size, size]."""
    coarse = torch.rand(count, 3, 4, 4, generator=generator())
    smooth = F.interpolate(coarse, (size, size), mode="bicubic", antialias=True).clamp(0.1, 0.9)
    fine = torch.rand(count, 3, size, size, generator=generator(1))
    return (255 * (0.8 * smooth + 0.2 * fine)).to(torch.uint8)


def test_the_same_state_gives_the_same_batch_for_bytes_and_floats_in_any_layout():
    pixels = images(16, 48)
    views = augment(pixels, 32, generator(), **ALL)
    assert views.shape == (16, 3, 32, 32) and views.dtype == torch.float32
    assert 0 <= views.min() < views.max() <= 1
    assert views.is_contiguous(memory_format=torch.channels_last)
    by_rows = pixels.contiguous(memory_format=torch.channels_last)
    for same in (pixels, pixels / 255, by_rows):
        assert torch.equal(augment(same, 32, generator(), **ALL), views)
        assert torch.equal(resize(same, 32), resize(pixels, 32))
    assert torch.equal(pixels, images(16, 48)), "the caller's pixels were changed"
    assert not torch.equal(augment(pixels, 32, generator(1), **ALL), views)
    assert views.mean().item() == pytest.approx(0.46428, abs=1e-4), "not the published views"
    assert views[3].std().item() == pytest.approx(0.29172, abs=1e-4)
    views = augment(pixels[:1].expand(16, -1, -1, -1), 48, generator(), **ALL)
    assert all(not torch.allclose(views[0], views[i]) for i in range(1, 16)), "each its own view"


def test_zero_strength_only_resizes():
    pixels = images(16, 48)
    assert (augment(pixels, 48, generator()) - pixels / 255).abs().max() < 1e-5
    assert torch.equal(resize(pixels, 48), pixels / 255)
    for size in (36, 24, 12, 8):
        assert (augment(pixels, size, generator()) - resize(pixels, size)).abs().mean() < 0.02
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::4] = 1  # a quarter of the columns
    assert (augment(stripes, 8, generator()) - 0.25).abs().max() < 0.13, "columns were skipped"
    with pytest.raises(TypeError, match="blurr"):
        augment(pixels, 48, generator(), blurr=1)


def test_geometry_moves_as_far_as_asked_and_no_farther():
    pixels = images(1, 48)
    half = augment(pixels.expand(400, -1, -1, -1), 48, generator(), flip=0.5)
    flipped = ((half - pixels.flip(3) / 255).abs().amax((1, 2, 3)) < 1e-5).sum()
    assert 150 < flipped < 250
    dot = torch.zeros(200, 3, 101, 101)
    dot[:, :, 49:52, 79:82] = 1  # 30 px right of the centre
    place = torch.arange(101.0) - 50

    def centre(**strength):
        mass = augment(dot, 101, generator(), **strength)[:, 0]
        total = mass.sum((1, 2))
        return (mass.sum(1) * place).sum(1) / total, (mass.sum(2) * place).sum(1) / total

    x, y = centre(shift=0.1)
    assert 8 < (x - 30).abs().max() < 10.2 and 8 < y.abs().max() < 10.2
    x, y = centre(rotate=20)
    angle = torch.rad2deg(torch.atan2(y, x))
    assert 18 < angle.max() < 20.5 and -20.5 < angle.min() < -18
    x, y = centre(scale=0.25)
    assert 35 < x.max() < 38 and 23.5 < x.min() < 26 and y.abs().max() < 0.3


def test_light_stays_within_its_strength_and_reaches_it():
    flat = torch.full((2000, 3, 4, 4), 0.3)
    gain = augment(flat, 4, generator(), brightness=1)[:, 0, 0, 0] / 0.3
    assert 0.5 <= gain.min() < 0.51 and 1.96 < gain.max() <= 2.0
    assert (gain == 1).float().mean() == pytest.approx(0.5, abs=0.04), "half keep their light"
    assert ((gain - 1).abs() < 0.2).float().mean() > 0.7, "mild changes are the frequent ones"
    for strength in ({"contrast": 0.9}, {"saturation": 0.9}):  # a grey image stays as it is
        assert (augment(flat, 4, generator(), **strength) - 0.3).abs().max() < 1e-5
    red, green, blue = (augment(flat, 4, generator(), cast=0.5)[:, :, 0, 0] / 0.3).unbind(1)
    assert 1.45 < red.max() <= 1.5 and 0.5 <= blue.min() < 0.55
    assert torch.allclose(red + blue, 2 * green) and torch.allclose(green, torch.tensor(1.0))
    power = augment(flat, 4, generator(), gamma=1)[:, 0, 0, 0].log() / torch.tensor(0.3).log()
    assert 0.499 < power.min() < 0.52 and 1.9 < power.max() < 2.001
    shaded = augment(flat[..., :1, :1].expand(-1, -1, 16, 16), 16, generator(), shadow=0.8)[:, 0]
    shaded = shaded[(shaded - 0.3).abs().amax((1, 2)) > 1e-4] / 0.3
    assert 0.2 < len(shaded) / 2000 < 0.3 and shaded.amax((1, 2)).min() > 0.98
    assert 0.2 <= shaded.amin((1, 2)).min() < 0.25, "one side keeps its light, the other loses it"


@pytest.mark.parametrize("name", SEVERITIES)
def test_each_severity_is_worse_than_the_one_before_and_the_generator_decides(name):
    chips = images(8, 128)
    worse = [corrupt(chips, name, severity, generator()) for severity in range(1, 6)]
    assert all(w.shape == chips.shape and 0 <= w.min() and w.max() <= 1 for w in worse)
    change = torch.stack([(w - chips / 255).abs().mean() for w in worse])
    assert change[0] > 0 and (change.diff() > 0).all()
    assert torch.equal(corrupt(chips / 255, name, 3, generator()), worse[2])
    drawn = name in ("colour cast", "side shadow", "noise", "occlusion")
    assert torch.equal(corrupt(chips, name, 3, generator(1)), worse[2]) != drawn
    mine = module.corruption(name, 3)
    assert torch.equal(mine(chips), worse[2]) and torch.equal(mine(chips), worse[2]) != drawn


def test_amounts_are_those_named():
    flat = torch.full((64, 3, 128, 128), 0.4)
    assert set(SEVERITIES) - set(module.CORRUPTIONS) == {"occlusion"}
    for name, severity, value in (("dark", 4, 0.1), ("bright", 5, 0.92), ("low contrast", 3, 0.43)):
        assert corrupt(flat, name, severity, generator()).unique().item() == pytest.approx(value)
    cast = corrupt(flat, "colour cast", 5, generator())[:, :, 0, 0]
    assert {round(float(red), 3) for red in cast[:, 0]} == {0.2, 0.6}
    assert torch.allclose(cast[:, 0] + cast[:, 2], torch.tensor(0.8))
    shadow = corrupt(flat, "side shadow", 4, generator())[:, 0, 0][:, [0, -1]]
    assert {tuple(row) for row in shadow.mul(100).round().tolist()} == {(40, 8), (8, 40)}
    grain = corrupt(flat, "noise", 2, generator()) - 0.4
    assert grain.std().item() == pytest.approx(0.04, rel=0.02)
    hidden = (corrupt(flat, "occlusion", 5, generator())[:, 0] == 0.5).float().mean((1, 2))
    assert hidden.min() > 0.33 and hidden.max() < 0.38
    dot = torch.zeros(1, 3, 128, 128)
    dot[..., 64, 64] = 1
    streak = corrupt(dot, "motion blur", 3, generator())[0, 0]
    assert (streak > 0).sum() == (streak[64] > 0).sum() == 9
    spot = corrupt(dot, "Gaussian blur", 3, generator())[0, 0]
    spread = (spot.sum(0) @ (torch.arange(128.0) - 64) ** 2 / spot.sum()).sqrt()
    assert spread.item() == pytest.approx(2, rel=0.05)
    for name, severity in (("fog", 1), ("dark", 0), ("dark", 6)):
        with pytest.raises(ValueError, match="severities 1-5"):
            corrupt(flat, name, severity, generator())
