"""Random views of faces for training, and the fixed corruptions that measure robustness."""

import math
from collections import namedtuple
from functools import partial

import cv2
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as V

GEOMETRY = dict(flip=0.5, rotate=15.0, scale=0.15, shift=0.05)
LIGHT = dict(brightness=2.0, contrast=1.5, saturation=0.5, cast=0.4, gamma=0.5, shadow=0.8)
QUALITY, OCCLUSION = dict(blur=0.03, resolution=0.8, jpeg=0.93, noise=0.15), dict(erase=0.5)
STANDARD = GEOMETRY | LIGHT | QUALITY
DRAWS = """flip rotate scale shift_x shift_y brightness contrast saturation cast bent gamma shadowed
    shadow_turn shadow_loss fault fault_size blur_axis corrupted erased side left top grey"""
Draws = namedtuple("Draws", DRAWS)  # random numbers in 0-1 for each image
SEVERITIES = {  # 1 to 5, for 128 px crops; published figures rest on them
    "dark": (0.8, 0.6, 0.4, 0.25, 0.15),  # gain
    "bright": (1.15, 1.3, 1.6, 1.9, 2.3),  # gain
    "low contrast": (0.8, 0.6, 0.4, 0.25, 0.15),  # factor about 0.45
    "colour cast": (0.1, 0.2, 0.3, 0.4, 0.5),  # red x (1 + c), blue x (1 - c), sign drawn
    "side shadow": (0.7, 0.5, 0.35, 0.2, 0.1),  # gain at the dark side, side drawn
    "Gaussian blur": (0.5, 1, 2, 3, 4),  # standard deviation, px
    "motion blur": (3, 5, 9, 13, 17),  # length, px, horizontal
    "noise": (0.02, 0.04, 0.08, 0.12, 0.18),  # standard deviation
    "JPEG": (60, 40, 20, 12, 7),  # quality
    "low resolution": (80, 64, 40, 28, 20),  # px, and up again
    "occlusion": (0.2, 0.3, 0.4, 0.5, 0.6),  # side of a grey square, place drawn
}
CORRUPTIONS = [name for name in SEVERITIES if name != "occlusion"]  # of light and quality


def augment(pixels: Tensor, image_size: int, generator: Generator, *, flip: float = 0,
            rotate: float = 0, scale: float = 0, shift: float = 0, brightness: float = 0,
            contrast: float = 0, saturation: float = 0, cast: float = 0, gamma: float = 0,
            shadow: float = 0, blur: float = 0, resolution: float = 0, jpeg: float = 0,
            noise: float = 0, erase: float = 0) -> Tensor:  # fmt: skip
    """Random view of each face: [B, 3, H, W] uint8 or float 0-1 to float 0-1 [B, 3, size, size].
    `flip` is a probability, `rotate` degrees; `shift`, `blur` (standard deviation), `resolution`
    (loss) and `erase` (square) are fractions of the side; `shadow` and `jpeg` of light and quality
    lost; `noise` is a standard deviation. `scale`, `brightness`, `contrast`, `gamma` draw factors
    or exponents from 1 / (1 + s) to 1 + s, `saturation` and `cast` from 1 - s to 1 + s."""
    pixels = pixels if pixels.is_floating_point() else pixels.contiguous() / 255
    if (shrink := min(pixels.shape[2:]) // (2 * image_size)) > 1:
        pixels = F.avg_pool2d(pixels, shrink)  # bilinear sampling would skip pixels
    shape, device = (len(pixels), len(Draws._fields), 1, 1), pixels.device
    numbers = torch.rand(shape, generator=generator, device=generator.device).to(device)
    draws, signed = Draws(*numbers.unbind(1)), 2 * numbers - 1
    corrupted = draws.corrupted < 0.5  # the others keep their light and quality
    rare = signed * signed.abs() * corrupted.unsqueeze(1)  # large values seldom
    signed, rare = Draws(*signed.unbind(1)), Draws(*rare.unbind(1))
    angle, zoom = math.radians(rotate) * signed.rotate, (1 + scale) ** signed.scale
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    across = (torch.arange(image_size, device=device) * 2 + 1) / image_size - 1
    down, across = across.view(-1, 1), across * torch.where(draws.flip < flip, -1.0, 1.0)
    x = cos * across - sin * down + 2 * shift * signed.shift_x
    y = sin * across + cos * down + 2 * shift * signed.shift_y
    grid = torch.stack([x, y], 3)  # like affine_grid, which is far slower on a CPU
    views = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False).flatten(2)
    luma = torch.tensor((0.299, 0.587, 0.114), device=device)  # of R, G, B (ITU-R BT.601)
    gain, spread = (1 + brightness) ** rare.brightness, (1 + contrast) ** rare.contrast
    colour = 1 + saturation * signed.saturation * corrupted
    mix = colour * torch.eye(3, device=device) + (1 - colour) * luma
    tint = 1 + cast * rare.cast * torch.tensor([[1.0], [0.0], [-1.0]], device=device)
    grey = (views.mean(2) @ luma).view(-1, 1, 1)  # what contrast turns about
    views = torch.baddbmm((gain - gain * spread) * grey * tint, gain * spread * tint * mix, views)
    views = views.clamp_(0, 1).unflatten(2, (image_size, image_size))
    if gamma:
        bent = (corrupted & (draws.bent < 0.5)).flatten()  # half of them
        views[bent] = views[bent] ** (1 + gamma) ** signed.gamma[bent].unsqueeze(1)
    if shadow:  # on half of them: a gain that falls linearly from 1 to 1 - loss along a direction
        dim = (corrupted & (draws.shadowed < 0.5)).flatten()
        angle = 2 * math.pi * draws.shadow_turn[dim]
        place = torch.linspace(-1, 1, image_size, device=device)
        along = angle.cos() * place + angle.sin() * place.view(-1, 1)
        along = (along / (angle.cos().abs() + angle.sin().abs()) + 1) / 2
        views[dim] *= (1 - shadow * draws.shadow_loss[dim] * along).unsqueeze(1)
    fault = torch.where(corrupted, draws.fault * 4 / 0.8, 4).flatten().long()  # 4: none (20 %)
    blurred, coarse, packed, noisy = (fault == number for number in range(4))
    size, axis = draws.fault_size.flatten(), draws.blur_axis.flatten()
    if blur and blurred.any():
        views[blurred] = _blur(views[blurred], blur * image_size, size[blurred], axis[blurred])
    if resolution and coarse.any():  # one for all of them, so that it stays one call
        side = max(1, round(image_size * (1 - resolution * float(size[coarse][0]))))
        small = V.resize(views[coarse], [side])
        views[coarse] = V.resize(small, [image_size], antialias=False)
    if jpeg:
        views[packed] = compress(views[packed], (100 - 100 * jpeg * size[packed]).tolist())
    if noise:
        grain = torch.randn(views[noisy].shape, generator=generator, device=generator.device)
        views[noisy] += noise * size[noisy].view(-1, 1, 1, 1) * grain.to(device)
    if erase:
        side = erase * draws.side * (draws.erased < 0.25)  # none in the other images
        views = _cover(views, side, draws.left, draws.top, draws.grey.unsqueeze(1))
    return views.clamp_(0, 1).contiguous(memory_format=torch.channels_last)


def _blur(images: Tensor, most: float, share: Tensor, axis: Tensor) -> Tensor:
    """Gaussian blur by a share of `most` px, along both axes or along one of them, as by motion."""
    reach = min(images.shape[3] - 1, math.ceil(2.5 * (0.1 + most)))
    place = torch.arange(-reach, reach + 1, device=images.device)
    planes = F.pad(images, [reach] * 4, mode="replicate").flatten(0, 1).unsqueeze(0)
    for chosen, shape in ((axis < 2 / 3, (1, -1)), ((axis - 0.5).abs() > 1 / 6, (-1, 1))):
        sigma = torch.where(chosen, 0.1 + most * share, 0.1).view(-1, 1)
        kernel = (-(place**2) / (2 * sigma**2)).softmax(1).repeat_interleave(3, 0)
        planes = F.conv2d(planes, kernel.view(len(kernel), 1, *shape), groups=len(kernel))
    return planes.view_as(images)


def _cover(images: Tensor, side: Tensor | float, left: Tensor, top: Tensor, grey) -> Tensor:
    """A grey square in each image: `side` of its side; `left` and `top`, 0 to 1, place it."""
    place = torch.arange(images.shape[3], device=images.device) / images.shape[3]
    left, top, down = (1 - side) * left, (1 - side) * top, place.view(-1, 1)
    inside = (place >= left) & (place < left + side) & (down >= top) & (down < top + side)
    return torch.where(inside.unsqueeze(1), grey, images)


def compress(images: Tensor, qualities: list[float]) -> Tensor:
    """Images (floats 0-1 [B, 3, H, W]) as JPEG of `qualities` (1-100) leaves them; on the CPU."""
    codes = (images * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    for code, quality in zip(codes, qualities, strict=True):
        _, data = cv2.imencode(".jpg", code[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, round(quality)])
        code[:] = cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]
    return torch.from_numpy(codes).permute(0, 3, 1, 2).to(images) / 255


def corrupt(pixels: Tensor, name: str, severity: int, generator: Generator) -> Tensor:
    """`name` of SEVERITIES on [B, 3, S, S] uint8 or 0-1, to float 0-1; ValueError for others."""
    if name not in SEVERITIES or severity not in range(1, 6):
        raise ValueError(f"{name!r} at {severity}: names are {list(SEVERITIES)}, severities 1-5")
    crops = pixels if pixels.is_floating_point() else pixels.contiguous() / 255
    amount, side = SEVERITIES[name][severity - 1], crops.shape[3]
    top, left = torch.rand(len(crops), 2, 1, 1, generator=generator).to(crops.device).unbind(1)
    turned = (top < 0.5).unsqueeze(1)  # half of the crops: to the other side
    slope = torch.linspace(1, amount, side, device=crops.device)
    tint = torch.tensor([1, 0, -1], device=crops.device).view(3, 1, 1) * amount
    pad = [int(amount // 2)] * 2 + [0, 0]
    changes = {
        "dark": lambda: crops * amount,
        "bright": lambda: crops * amount,
        "low contrast": lambda: 0.45 + amount * (crops - 0.45),
        "colour cast": lambda: crops * (1 + torch.where(turned, -tint, tint)),
        "side shadow": lambda: crops * torch.where(turned, slope.flip(0), slope),
        "Gaussian blur": lambda: V.gaussian_blur(crops, 2 * math.ceil(3 * amount) + 1, amount),
        "motion blur": lambda: F.avg_pool2d(F.pad(crops, pad, mode="replicate"), (1, amount), 1),
        "noise": lambda: crops + amount * torch.randn(crops.shape, generator=generator).to(crops),
        "JPEG": lambda: compress(crops, [amount] * len(crops)),
        "low resolution": lambda: V.resize(V.resize(crops, [amount]), [side], antialias=False),
        "occlusion": lambda: _cover(crops, amount, left, top, 0.5),
    }
    return changes[name]().clamp(0, 1)


def corruption(name: str, severity: int, seed: int = 0) -> partial[Tensor]:
    """`corrupt` with a generator of its own, as `utils.training.predict` takes it."""
    return partial(corrupt, name=name, severity=severity, generator=Generator().manual_seed(seed))


def resize(pixels: Tensor, image_size: int) -> Tensor:
    """Antialiased resize for evaluation: [B, 3, H, W] uint8 or float 0-1 to float 0-1."""
    pixels = pixels if pixels.is_floating_point() else pixels.contiguous() / 255
    pixels = F.interpolate(pixels, image_size, mode="bilinear", antialias=True)
    return pixels.clamp(0, 1).contiguous(memory_format=torch.channels_last)
