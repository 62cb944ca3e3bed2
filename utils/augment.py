"""Batched augmentation on the device: geometry in one resampling, colour in one matrix."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

LUMA = (0.299, 0.587, 0.114)  # weights of R, G, B in grey (ITU-R BT.601)


def augment(
    pixels: torch.Tensor,
    image_size: int,
    generator: torch.Generator,
    *,
    flip: float = 0.5,
    rotate: float = 10.0,
    scale: float = 0.1,
    shift: float = 0.04,
    brightness: float = 0.2,
    contrast: float = 0.2,
    saturation: float = 0.2,
) -> torch.Tensor:
    """Random view of each face: [B, 3, H, W] uint8 or float 0-1 to float 0-1 [B, 3, size, size].

    `flip` is a probability, `rotate` degrees, `scale` and `shift` fractions of the side; the
    colour strengths bound factors 1 - s to 1 + s. Each image draws its own parameters, from
    `generator` alone: the same state gives the same batch, whatever the device. Strengths of zero
    only resize.
    """
    pixels = _unit(pixels)
    shrink = min(pixels.shape[2:]) // (2 * image_size)
    if shrink > 1:  # bilinear sampling would skip pixels
        pixels = F.avg_pool2d(pixels, shrink)
    count = len(pixels)
    draws = torch.rand(count, 8, generator=generator, device=generator.device).to(pixels.device)
    signed = (2 * draws - 1).view(count, 8, 1, 1)
    mirror = torch.where(draws[:, :1] < flip, -1.0, 1.0).view(count, 1, 1)
    angle, zoom = math.radians(rotate) * signed[:, 1], (1 + scale) ** signed[:, 2]
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    # Where each output pixel looks in the input; affine_grid does the same, far slower on a CPU.
    across = (torch.arange(image_size, device=pixels.device) * 2 + 1) / image_size - 1
    down, across = across.view(-1, 1), across * mirror
    x = cos * across - sin * down + 2 * shift * signed[:, 3]
    y = sin * across + cos * down + 2 * shift * signed[:, 4]
    grid = torch.stack([x, y], 1).permute(0, 2, 3, 1)
    views = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False).flatten(2)

    luma = torch.tensor(LUMA, device=pixels.device)
    light = 1 + brightness * signed[:, 5]
    spread = light * (1 + contrast * signed[:, 6])
    colour = 1 + saturation * signed[:, 7]
    matrix = colour * torch.eye(3, device=pixels.device) + (1 - colour) * luma
    mean_grey = (views.mean(2) @ luma).view(-1, 1, 1)  # what contrast turns about
    views = torch.baddbmm((light - spread) * mean_grey, spread * matrix, views)
    views = views.clamp_(0, 1).view(count, 3, image_size, image_size)
    return views.contiguous(memory_format=torch.channels_last)


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
