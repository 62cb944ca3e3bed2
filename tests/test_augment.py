"""Augmentation: what is drawn, what is kept, and that zero strength changes nothing."""

import pytest
import torch
import torch.nn.functional as F

from utils.augment import OCCLUSION, QUALITY, STANDARD, augment, resize

ALL = STANDARD | OCCLUSION


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pixels() -> torch.Tensor:
    """Sixteen smooth images, uint8 [16, 3, 48, 48], neither black nor white anywhere."""
    coarse = torch.rand(16, 3, 4, 4, generator=generator())
    smooth = F.interpolate(coarse, size=(48, 48), mode="bicubic", antialias=True)
    return (255 * smooth.clamp(0.1, 0.9)).to(torch.uint8)


def test_shape_type_range_and_layout(pixels):
    for images in (augment(pixels, 32, generator(), **ALL), resize(pixels, 32)):
        assert images.shape == (16, 3, 32, 32)
        assert images.dtype == torch.float32
        assert 0 <= images.min() < images.max() <= 1
        assert images.is_contiguous(memory_format=torch.channels_last)


def test_uint8_and_float_pixels_are_the_same(pixels):
    unit = pixels.float() / 255
    views = augment(pixels, 32, generator(), **ALL)
    assert torch.equal(views, augment(unit, 32, generator(), **ALL))
    assert torch.equal(resize(pixels, 32), resize(unit, 32))
    by_rows = pixels.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(by_rows, 32, generator(), **ALL), views)
    assert torch.equal(unit, pixels.float() / 255), "the caller's pixels were changed"


def test_the_generator_decides_and_images_differ(pixels):
    same = pixels[:1].expand(16, -1, -1, -1)
    views = augment(same, 48, generator(), **ALL)
    assert torch.equal(views, augment(same, 48, generator(), **ALL))
    assert not torch.equal(views, augment(same, 48, generator(1), **ALL))
    assert all(not torch.allclose(views[0], views[i]) for i in range(1, 16)), "each its own view"


def test_zero_strength_is_the_identity(pixels):
    views = augment(pixels, 48, generator())
    assert (views - pixels / 255).abs().max() < 1e-5
    assert torch.equal(resize(pixels, 48), pixels / 255)


@pytest.mark.parametrize("size", [36, 24, 12, 8])
def test_zero_strength_resizes_as_evaluation_does(pixels, size):
    views, plain = augment(pixels, size, generator()), resize(pixels, size)
    assert (views - plain).abs().mean() < 0.015


def test_far_smaller_images_are_averaged_not_sampled():
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::4] = 1  # a quarter of the columns
    views = augment(stripes, 8, generator())
    assert (views - 0.25).abs().max() < 0.13, "aliasing: some columns were skipped"


def test_flip_flips(pixels):
    views = augment(pixels, 48, generator(), flip=1)
    assert (views - pixels.flip(3) / 255).abs().max() < 1e-5
    half = augment(pixels[:1].expand(400, -1, -1, -1), 48, generator(), flip=0.5)
    flipped = ((half - pixels[:1].flip(3) / 255).abs().amax((1, 2, 3)) < 1e-5).sum()
    assert 150 < flipped < 250


def test_geometry_moves_as_far_as_asked_and_no_farther():
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
    assert torch.allclose(x.hypot(y), torch.tensor(30.0), atol=0.5), "rotation keeps distances"
    x, y = centre(scale=0.25)
    assert 35 < x.max() < 38 and 23.5 < x.min() < 26 and y.abs().max() < 0.3


def grey_of(images: torch.Tensor) -> torch.Tensor:
    return (images * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)


def test_light_stays_within_its_strength_and_reaches_it():
    flat = torch.full((2000, 3, 4, 4), 0.3)
    gain = augment(flat, 4, generator(), brightness=1.0)[:, 0, 0, 0] / 0.3
    assert 0.5 <= gain.min() < 0.51 and 1.96 < gain.max() <= 2.0
    assert (gain == 1).float().mean() == pytest.approx(0.5, abs=0.04), "half keep their light"
    assert ((gain - 1).abs() < 0.2).float().mean() > 0.7, "mild changes are the frequent ones"
    for strength in ({"contrast": 0.9}, {"saturation": 0.9}):  # a grey image stays as it is
        assert (augment(flat, 4, generator(), **strength) - 0.3).abs().max() < 1e-5
    tinted = augment(flat, 4, generator(), cast=0.5)[:, :, 0, 0] / 0.3
    assert 1.45 < tinted[:, 0].max() <= 1.5 and 0.5 <= tinted[:, 2].min() < 0.55
    assert torch.allclose(tinted[:, 0] + tinted[:, 2], torch.tensor(2.0), atol=1e-4)
    assert torch.allclose(tinted[:, 1], torch.tensor(1.0))
    power = augment(flat, 4, generator(), gamma=1.0)[:, 0, 0, 0].log() / torch.tensor(0.3).log()
    assert 0.499 < power.min() < 0.52 and 1.9 < power.max() < 2.001
    assert ((power - 1).abs() < 1e-4).float().mean() == pytest.approx(0.75, abs=0.04)


def test_contrast_and_saturation_turn_about_the_grey(pixels):
    one = pixels[:1].expand(200, -1, -1, -1) / 255 * 0.3 + 0.3
    softer = augment(one, 48, generator(), saturation=0.3)
    assert (grey_of(softer) - grey_of(one)).abs().max() < 1e-5, "brightness moved"
    assert (softer.std(1) - one.std(1)).abs().max() > 0.01
    harder = augment(one, 48, generator(), contrast=0.5)
    assert (grey_of(harder).mean((1, 2)) - grey_of(one).mean()).abs().max() < 1e-4
    ratio = harder.flatten(1).std(1) / one[0].std()
    assert 0.66 < ratio.min() < 0.75 and 1.4 < ratio.max() < 1.51


def test_a_shadow_falls_from_one_side():
    flat = torch.full((400, 3, 16, 16), 0.8)
    views = augment(flat, 16, generator(), shadow=0.8)[:, 0]
    shaded = (views - 0.8).abs().amax((1, 2)) > 1e-4
    assert shaded.float().mean() == pytest.approx(0.25, abs=0.07)
    views = views[shaded]
    assert views.amax((1, 2)).min() > 0.79, "one corner or side keeps its light"
    assert 0.15 < views.amin((1, 2)).min() < 0.25
    bend = (views[:, :, 2:] - 2 * views[:, :, 1:-1] + views[:, :, :-2]).abs().max()
    assert bend < 1e-5, "linear across"


@pytest.mark.parametrize("name", QUALITY)
def test_a_camera_fault_spoils_its_share_and_no_other_image(name):
    sharp = (torch.rand(400, 3, 48, 48, generator=generator()) > 0.5).float() * 0.5 + 0.25
    views = augment(sharp, 48, generator(), **{name: QUALITY[name]})
    change = (views - sharp).abs().mean((1, 2, 3))
    assert (change > 1e-4).float().mean() == pytest.approx(0.1, abs=0.05)
    assert (views.mean((1, 2, 3)) - 0.5).abs().max() < 0.06, "a fault keeps the brightness"
    spread = views.std((1, 2, 3))[change > 0.01]
    if name == "noise":
        assert spread.max() > sharp.std()
    else:
        assert spread.min() < 0.7 * sharp.std(), "detail is lost"


def test_blur_follows_the_image_size():
    line = torch.zeros(800, 3, 96, 96)
    line[..., 48] = 1
    place = torch.arange(96.0)

    def widest(size):
        views = augment(line, size, generator(), blur=0.04)[:, 0].mean(1)
        mean = (views @ place[:size]) / views.sum(1)
        return ((views * (place[:size] - mean[:, None]) ** 2).sum(1) / views.sum(1)).sqrt().max()

    assert widest(96) == pytest.approx(0.04 * 96, rel=0.1)
    assert widest(48) == pytest.approx(0.04 * 48, rel=0.1)


def test_an_erased_square_is_whole_and_grey():
    flat = torch.full((800, 3, 40, 40), 0.123)
    views = augment(flat, 40, generator(), erase=0.5)
    erased = (views - 0.123).abs().amax(1) > 1e-3
    areas = erased.sum((1, 2))
    assert (areas > 0).float().mean() == pytest.approx(0.25, abs=0.05)
    assert 15**2 < areas.max() <= 21**2
    for view, mask in zip(views[areas > 0], erased[areas > 0], strict=True):
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns and abs(rows - columns) <= 1
        assert view[:, mask].std() < 1e-5
