"""Batched augmentation on the device: geometry in one resampling, colour in one matrix, and
camera faults on a share of each batch."""

from __future__ import annotations

import math

import cv2
import numpy as np
import torch
import torch.nn.functional as F

LUMA = (0.299, 0.587, 0.114)  # weights of R, G, B in grey (ITU-R BT.601)
SPOILT = 0.5  # share of images whose light and quality change; the others keep theirs
FAULTS = 4  # of the camera: blur, resolution, jpeg, noise
FAULTY, SHADOWED, BENT = 0.8, 0.5, 0.5  # of the spoilt: with a fault, a shadow, another gamma
ERASED = 0.25  # share of images with an erased square

# Strengths by family; chapter 03 shows what each of them is worth.
GEOMETRY = dict(flip=0.5, rotate=15.0, scale=0.15, shift=0.05)
LIGHT = dict(brightness=2.0, contrast=1.5, saturation=0.5, cast=0.4, gamma=0.5, shadow=0.8)
QUALITY = dict(blur=0.03, resolution=0.8, jpeg=0.93, noise=0.15)
OCCLUSION = dict(erase=0.5)
STANDARD = GEOMETRY | LIGHT | QUALITY


def augment(
    pixels: torch.Tensor,
    image_size: int,
    generator: torch.Generator,
    *,
    flip: float = 0.0,
    rotate: float = 0.0,
    scale: float = 0.0,
    shift: float = 0.0,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    cast: float = 0.0,
    gamma: float = 0.0,
    shadow: float = 0.0,
    blur: float = 0.0,
    resolution: float = 0.0,
    jpeg: float = 0.0,
    noise: float = 0.0,
    erase: float = 0.0,
) -> torch.Tensor:
    """Random view of each face: [B, 3, H, W] uint8 or float 0-1 to float 0-1 [B, 3, size, size].

    Geometry: `flip` is a probability, `rotate` degrees, `shift` a fraction of the side; `scale`,
    `brightness`, `contrast` and `gamma` bound a factor or exponent by 1 / (1 + s) and 1 + s.
    Light: `saturation` bounds a factor by 1 - s and 1 + s, `cast` the gain of red against blue,
    `shadow` the light lost at one side. Quality, at most one fault an image: `blur` bounds the
    standard deviation as a fraction of the side (in one direction or in both), `resolution` the
    share of the side's pixels lost, `jpeg` the loss of quality (0.9: down to 10 of 100), `noise`
    the standard deviation. `erase` bounds the side of a grey square.

    Each image draws its own parameters, from `generator` alone: the same state gives the same
    batch. Light and quality change on the share SPOILT of the images, most of them mildly.
    Strengths of zero only resize.
    """
    pixels = _unit(pixels)
    shrink = min(pixels.shape[2:]) // (2 * image_size)
    if shrink > 1:  # bilinear sampling would skip pixels
        pixels = F.avg_pool2d(pixels, shrink)
    count, device = len(pixels), pixels.device
    draws = torch.rand(count, 23, generator=generator, device=generator.device).to(device)
    signed = (2 * draws - 1).view(count, 23, 1, 1)
    spoilt = draws[:, 17] < SPOILT
    some = signed * spoilt.view(count, 1, 1, 1)
    rare = some * some.abs()  # strong values seldom

    mirror = torch.where(draws[:, :1] < flip, -1.0, 1.0).view(count, 1, 1)
    angle, zoom = math.radians(rotate) * signed[:, 1], (1 + scale) ** signed[:, 2]
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    # Where each output pixel looks in the input; affine_grid does the same, far slower on a CPU.
    across = (torch.arange(image_size, device=device) * 2 + 1) / image_size - 1
    down, across = across.view(-1, 1), across * mirror
    x = cos * across - sin * down + 2 * shift * signed[:, 3]
    y = sin * across + cos * down + 2 * shift * signed[:, 4]
    grid = torch.stack([x, y], 1).permute(0, 2, 3, 1)
    views = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False).flatten(2)

    luma = torch.tensor(LUMA, device=device)
    light = (1 + brightness) ** rare[:, 5]
    spread = light * (1 + contrast) ** rare[:, 6]
    colour = 1 + saturation * some[:, 7]
    matrix = colour * torch.eye(3, device=device) + (1 - colour) * luma
    tint = 1 + cast * rare[:, 8] * torch.tensor([[1.0], [0.0], [-1.0]], device=device)
    mean_grey = (views.mean(2) @ luma).view(-1, 1, 1)  # what contrast turns about
    views = torch.baddbmm((light - spread) * mean_grey * tint, spread * tint * matrix, views)
    views = views.clamp_(0, 1).view(count, 3, image_size, image_size)

    if gamma:
        chosen = spoilt & (draws[:, 9] < BENT)
        views[chosen] = views[chosen] ** (1 + gamma) ** signed[chosen, 10, None]
    if shadow:
        chosen = spoilt & (draws[:, 11] < SHADOWED)
        views[chosen] *= _shadow(draws[chosen, 12], shadow * draws[chosen, 13], image_size)
    fault = (draws[:, 14] * FAULTS / FAULTY).long()
    for number, (strength, spoil) in enumerate(
        ((blur, _blur), (resolution, _shrink), (jpeg, _compress), (noise, _noise))
    ):
        chosen = spoilt & (fault == number)
        if strength and chosen.any():
            views[chosen] = spoil(views[chosen], strength, draws[chosen, 15:17], generator)
    if erase:
        chosen = draws[:, 18] < ERASED
        views[chosen] = _erase(views[chosen], erase, draws[chosen, 19:])
    return views.clamp_(0, 1).contiguous(memory_format=torch.channels_last)


def _shadow(turn: torch.Tensor, loss: torch.Tensor, size: int) -> torch.Tensor:
    """Gains [n, 1, size, size], falling linearly from 1 to 1 - loss along a direction."""
    across = torch.linspace(-1, 1, size, device=turn.device)
    angle = (2 * math.pi * turn).view(-1, 1, 1)
    along = angle.cos() * across + angle.sin() * across.view(-1, 1)
    along = (along / (angle.cos().abs() + angle.sin().abs()) + 1) / 2
    return (1 - loss.view(-1, 1, 1) * along).unsqueeze(1)


def _blur(
    images: torch.Tensor, strength: float, draws: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Gaussian blur along both axes, or along one of them as motion does."""
    size = images.shape[3]
    sigma = 0.1 + strength * size * draws[:, 0]
    along_x = torch.where(draws[:, 1] < 2 / 3, sigma, 0.1)
    along_y = torch.where((draws[:, 1] - 0.5).abs() > 1 / 6, sigma, 0.1)
    reach = min(size - 1, math.ceil(2.5 * (0.1 + strength * size)))
    place = torch.arange(-reach, reach + 1, device=images.device)
    planes = images.reshape(1, -1, *images.shape[2:])
    for sigmas, shape in ((along_x, (1, 2 * reach + 1)), (along_y, (2 * reach + 1, 1))):
        kernel = (-(place**2) / (2 * sigmas.view(-1, 1) ** 2)).softmax(1).repeat_interleave(3, 0)
        pad = [reach * (side > 1) for side in shape for _ in range(2)][::-1]
        padded = F.pad(planes, pad, mode="replicate")
        planes = F.conv2d(padded, kernel.view(-1, 1, *shape), groups=planes.shape[1])
    return planes.view_as(images)


def _shrink(
    images: torch.Tensor, strength: float, draws: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Fewer pixels, then as many as before; one size for all, so that it stays one call."""
    size = images.shape[2:]
    few = [max(1, round(side * (1 - strength * float(draws[0, 0])))) for side in size]
    small = F.interpolate(images, few, mode="bilinear", antialias=True)
    return F.interpolate(small, size, mode="bilinear")


def _compress(
    images: torch.Tensor, strength: float, draws: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    qualities = (100 - 100 * strength * draws[:, 0]).round().clamp(1, 100).int().tolist()
    return compress(images, qualities)


def _noise(
    images: torch.Tensor, strength: float, draws: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    grain = torch.randn(images.shape, generator=generator, device=generator.device)
    return images + strength * draws[:, :1, None, None] * grain.to(images)


def _erase(images: torch.Tensor, strength: float, draws: torch.Tensor) -> torch.Tensor:
    """A grey square, whole inside the image."""
    place = torch.arange(images.shape[3], device=images.device) / images.shape[3]
    side = strength * draws[:, :1]
    left, top = (1 - side) * draws[:, 1:2], (1 - side) * draws[:, 2:3]
    across = (place >= left) & (place < left + side)
    below = (place >= top) & (place < top + side)
    inside = (across.unsqueeze(1) & below.unsqueeze(2)).unsqueeze(1)
    return torch.where(inside, draws[:, 3].view(-1, 1, 1, 1), images)


def compress(images: torch.Tensor, qualities: list[int]) -> torch.Tensor:
    """Images (floats 0-1 [B, 3, H, W]) as JPEG leaves them; the codec works on the CPU."""
    codes = (images * 255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    spoilt = np.empty_like(codes)
    for code, quality, place in zip(codes, qualities, spoilt, strict=True):
        _, data = cv2.imencode(".jpg", code[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        place[:] = cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]
    return torch.from_numpy(spoilt).permute(0, 3, 1, 2).to(images) / 255


def resize(pixels: torch.Tensor, image_size: int) -> torch.Tensor:
    """Antialiased resize for evaluation: [B, 3, H, W] uint8 or float 0-1 to float 0-1."""
    pixels = _unit(pixels)
    if pixels.shape[2:] != (image_size, image_size):
        size = (image_size, image_size)
        pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    return pixels.clamp(0, 1).contiguous(memory_format=torch.channels_last)


def _unit(pixels: torch.Tensor) -> torch.Tensor:
    if pixels.is_floating_point():
        return pixels
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
