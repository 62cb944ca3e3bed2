"""Where the network looks: maps of the years by which each place of a face raises (+) or lowers (-)
its age, compared with the same face strongly blurred, to first order (chapter 7 chose them)."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.augment import resize
from utils.model import AgeRegressor


def stages(model: AgeRegressor) -> dict[int, nn.Module]:
    """Side of the map in places -> the last block of that side, from fine to coarse."""
    found, size = {}, (1, 3, model.image_size, model.image_size)
    with torch.inference_mode():
        maps = model.eval().normalised(torch.zeros(size, device=model.mean.device))
        for block in getattr(model.backbone, "features", model.backbone).children():
            if (maps := block(maps)).shape[2] == 1:
                break
            found[maps.shape[2]] = block
    return found


def blurred(images: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, S, S] in 0-1 as if they had 10 x 10 pixels, smoothly enlarged."""
    small = F.adaptive_avg_pool2d(images, 10)
    return F.interpolate(small, images.shape[-1], mode="bicubic").clamp(0, 1)


def age_maps(model: AgeRegressor, pixels: np.ndarray, rows: np.ndarray, side=20) -> np.ndarray:
    """Difference maps in years, float32 [len(rows), s, s], of `pixels[rows]` (uint8 [N, H, W, 3]):
    sum of gradient x (features - those of the blurred face) at the layer with s nearest `side`."""
    layers, kept, maps = stages(model), [], []
    layer = layers[min(layers, key=lambda places: abs(places - side))]
    handle = layer.register_forward_hook(lambda *given: kept.append(given[2]))
    for part in np.split(np.asarray(rows), range(32, len(rows), 32)):
        chips = torch.from_numpy(np.asarray(pixels[part])).permute(0, 3, 1, 2)
        images = resize(chips.to(model.mean.device), model.image_size).requires_grad_()
        with torch.no_grad():
            model(blurred(images))
        ages, (base, features) = model(images), kept
        (slope,) = torch.autograd.grad(ages.sum(), features)
        maps.append((slope * (features - base)).sum(1).detach().cpu().numpy())
        kept.clear()
    handle.remove()
    return np.concatenate(maps)
