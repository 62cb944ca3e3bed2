"""Fixed corruptions of light and quality, by which robustness is measured; not for training."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from utils.augment import compress

# Severities 1 to 5; do not change them, or published figures cannot be compared.
SEVERITIES = {
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


def corrupt(
    pixels: torch.Tensor, name: str, severity: int, generator: torch.Generator
) -> torch.Tensor:
    """One corruption of SEVERITIES at `severity` 1-5 on the chips [B, 3, H, W] (uint8 or 0-1).

    Lengths in pixels are those of a 128 px chip. Returns floats clipped to 0-1, same shape; the
    random parts come from `generator`. Raises ValueError for an unknown name or severity.
    """
    if name not in SEVERITIES or severity not in range(1, 6):
        raise ValueError(f"{name!r} at {severity}: names are {list(SEVERITIES)}, severities 1-5")
    amount = SEVERITIES[name][severity - 1]
    images = pixels if pixels.is_floating_point() else pixels / 255
    count, height, width = len(images), *images.shape[2:]
    draws = torch.rand(count, 2, 1, 1, generator=generator).to(images.device)
    sign = torch.where(draws[:, :1] < 0.5, -1.0, 1.0)
    if name in ("dark", "bright"):
        images = images * amount
    elif name == "low contrast":
        images = 0.45 + amount * (images - 0.45)
    elif name == "colour cast":
        tint = torch.tensor([amount, 0.0, -amount], device=images.device).view(1, 3, 1, 1)
        images = images * (1 + sign * tint)
    elif name == "side shadow":
        gain = torch.linspace(1, amount, width, device=images.device).view(1, 1, 1, -1)
        images = images * torch.where(sign > 0, gain, gain.flip(3))
    elif name == "Gaussian blur":
        images = gaussian_blur(images, 2 * int(np.ceil(3 * amount)) + 1, amount)
    elif name == "motion blur":
        half = amount // 2
        padded = F.pad(images, (half, half, 0, 0), mode="replicate")
        images = F.avg_pool2d(padded, (1, amount), stride=1)
    elif name == "noise":
        grain = torch.randn(images.shape, generator=generator)
        images = images + amount * grain.to(images)
    elif name == "JPEG":
        images = compress(images, [amount] * count)
    elif name == "low resolution":
        small = F.interpolate(images, (amount, amount), mode="bilinear", antialias=True)
        images = F.interpolate(small, (height, width), mode="bilinear")
    else:
        down, across = (torch.arange(side, device=images.device) for side in (height, width))
        top, left = ((side * (1 - amount) * draws[:, i]).unsqueeze(1)
                     for i, side in enumerate((height, width)))  # fmt: skip
        inside = (down.view(-1, 1) >= top) & (down.view(-1, 1) < top + amount * height)
        inside = inside & (across >= left) & (across < left + amount * width)
        images = torch.where(inside, 0.5, images)
    return images.clamp(0, 1)


def spoiler(name: str, severity: int, seed: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """`corrupt` with a generator of its own, as `utils.training.predict` takes it."""
    generator = torch.Generator().manual_seed(seed)
    return lambda chips: corrupt(chips, name, severity, generator)
