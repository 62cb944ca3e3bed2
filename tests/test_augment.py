"""Augmentation: what is drawn, what is kept, and that zero strength changes nothing."""

import pytest
import torch
import torch.nn.functional as F

from utils.augment import augment, resize

STILL = dict(flip=0, rotate=0, scale=0, shift=0, brightness=0, contrast=0, saturation=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pixels() -> torch.Tensor:
    """Sixteen smooth images, uint8 [16, 3, 48, 48], neither black nor white anywhere."""
    coarse = torch.rand(16, 3, 4, 4, generator=generator())
    smooth = F.interpolate(coarse, size=(48, 48), mode="bicubic", antialias=True)
    return (255 * smooth.clamp(0.1, 0.9)).to(torch.uint8)


def test_shape_type_range_and_layout(pixels):
    for images in (augment(pixels, 32, generator()), resize(pixels, 32)):
        assert images.shape == (16, 3, 32, 32)
        assert images.dtype == torch.float32
        assert 0 <= images.min() < images.max() <= 1
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_uint8_and_float_pixels_are_the_same(pixels):
    unit = pixels.float() / 255
    assert torch.equal(augment(pixels, 32, generator()), augment(unit, 32, generator()))
    assert torch.equal(resize(pixels, 32), resize(unit, 32))
    by_rows = pixels.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(by_rows, 32, generator()), augment(pixels, 32, generator()))
    assert torch.equal(unit, pixels.float() / 255), "the caller's pixels were changed"


def test_the_generator_decides_and_images_differ(pixels):
    same = pixels[:1].expand(16, -1, -1, -1)
    views = augment(same, 48, generator())
    assert torch.equal(views, augment(same, 48, generator()))
    assert not torch.equal(views, augment(same, 48, generator(1)))
    assert all(not torch.allclose(views[0], views[i]) for i in range(1, 16))


def test_zero_strength_is_the_identity(pixels):
    views = augment(pixels, 48, generator(), **STILL)
    assert (views - pixels / 255).abs().max() < 1e-5
    assert torch.equal(resize(pixels, 48), pixels / 255)


@pytest.mark.parametrize("size", [36, 24, 12, 8])
def test_zero_strength_resizes_as_evaluation_does(pixels, size):
    views, plain = augment(pixels, size, generator(), **STILL), resize(pixels, size)
    assert (views - plain).abs().mean() < 0.015


def test_far_smaller_images_are_averaged_not_sampled():
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::4] = 1  # a quarter of the columns
    views = augment(stripes, 8, generator(), **STILL)
    assert (views - 0.25).abs().max() < 0.13, "aliasing: some columns were skipped"


def test_flip_flips(pixels):
    views = augment(pixels, 48, generator(), **STILL | {"flip": 1})
    assert (views - pixels.flip(3) / 255).abs().max() < 1e-5
    half = augment(pixels[:1].expand(400, -1, -1, -1), 48, generator(), **STILL | {"flip": 0.5})
    flipped = ((half - pixels[:1].flip(3) / 255).abs().amax((1, 2, 3)) < 1e-5).sum()
    assert 150 < flipped < 250


def test_geometry_moves_as_far_as_asked_and_no_farther():
    dot = torch.zeros(200, 3, 101, 101)
    dot[:, :, 49:52, 79:82] = 1  # 30 px right of the centre
    place = torch.arange(101.0) - 50

    def centre(**strength):
        mass = augment(dot, 101, generator(), **STILL | strength)[:, 0]
        total = mass.sum((1, 2))
        return (mass.sum(1) * place).sum(1) / total, (mass.sum(2) * place).sum(1) / total

    x, y = centre(shift=0.1)
    assert 8 < (x - 30).abs().max() < 10.2 and 8 < y.abs().max() < 10.2
    x, y = centre(rotate=20)
    angle = torch.rad2deg(torch.atan2(y, x))
    assert 18 < angle.max() < 20.5 and -20.5 < angle.min() < -18
    assert torch.allclose(x.hypot(y), torch.tensor(30.0), atol=0.5), "rotation keeps distances"
    x, y = centre(scale=0.25)
    assert 35 < x.max() < 38 and 23.5 < x.min() < 26 and y.abs().max() < 0.3


def test_colour_strengths(pixels):
    mean = pixels.float().mean() / 255
    assert (augment(pixels, 48, generator()).mean() - mean).abs() < 0.05

    flat = torch.full((300, 3, 8, 8), 0.4)
    light = augment(flat, 8, generator(), **STILL | {"brightness": 0.3})[:, 0, 0, 0] / 0.4
    assert 0.7 <= light.min() < 0.75 and 1.25 < light.max() <= 1.3
    for strength in ({"contrast": 0.9}, {"saturation": 0.9}):  # a grey image stays as it is
        assert (augment(flat, 8, generator(), **STILL | strength) - 0.4).abs().max() < 1e-5

    one = pixels[:1].expand(100, -1, -1, -1) / 255
    grey = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    softer = augment(one * 0.5 + 0.2, 48, generator(), **STILL | {"saturation": 0.3})
    assert ((softer - one * 0.5 - 0.2) * grey).sum(1).abs().max() < 1e-5, "brightness moved"
    assert (softer.std(1) - softer[:1].std(1)).abs().max() > 0.01
    harder = augment(one * 0.5 + 0.2, 48, generator(), **STILL | {"contrast": 0.3})
    assert ((harder * grey).sum(1).mean((1, 2)) - (one[:1] * 0.5 + 0.2).mul(grey).sum(1).mean()
            ).abs().max() < 1e-4  # fmt: skip
    ratio = harder.flatten(1).std(1) / (one[0] * 0.5 + 0.2).std()
    assert ratio.min() < 0.8 and ratio.max() > 1.2
