"""Where the network looks: signed Grad-CAM maps of the age, and the checks that a map must pass.

A map has one number for each place of a layer, float32 [N, h, w] in years: how much the features
there raise (+) or lower (-) the age, to first order. The package grad-cam computes it, but returns
the positive part only, scaled to 0-1 for each image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pandas as pd
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.metrics.road import ROADCombined
from scipy.stats import rankdata
from torch import nn
from tqdm.auto import tqdm

from utils.augment import resize
from utils.model import AgeRegressor


def stages(model: AgeRegressor) -> dict[int, nn.Module]:
    """Side of the map in places -> the last layer of that side, from fine to coarse. Raises
    ValueError for a vision transformer, which keeps no maps of channels."""
    if model.backbone_name.startswith(("vit", "swin")):
        raise ValueError(f"{model.backbone_name} is a transformer: it keeps no maps of channels")
    found = {}

    def note(module: nn.Module, _: tuple, output: torch.Tensor) -> None:
        if output.ndim == 4 and output.shape[2] > 1:
            found[output.shape[2]] = module

    blocks = getattr(model.backbone, "features", model.backbone).children()
    handles = [block.register_forward_hook(note) for block in blocks]
    with torch.inference_mode():
        model.eval()(torch.zeros(1, 3, *2 * [model.image_size], device=model.mean.device))
    for handle in handles:
        handle.remove()
    return dict(sorted(found.items(), reverse=True))


def age_maps(
    model: AgeRegressor, pixels: np.ndarray, rows: np.ndarray, layer: nn.Module,
    method: type = GradCAM, batch_size: int = 64, *, progress: bool = False,
    corrupt: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> np.ndarray:  # fmt: skip
    """Maps [len(rows), h, w] of the faces `pixels[rows]` (uint8 [N, H, W, 3]) at one layer.

    For GradCAM the sum over a map is sum_k (mean gradient of the age)_k x (sum of activation)_k
    (Selvaraju et al., ICCV 2017), not rectified, which would hide what lowers the age. `method`:
    a class of the package that weighs activations; `corrupt` as in utils.training.predict."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts, maps = np.split(np.asarray(rows), range(batch_size, len(rows), batch_size)), []
    with method(model.to(device).eval(), [layer]) as cam:
        for part in tqdm(parts, "maps", disable=not progress):
            chips = torch.from_numpy(np.asarray(pixels[part])).permute(0, 3, 1, 2).to(device)
            images = resize(corrupt(chips) if corrupt else chips, model.image_size)
            targets = [lambda age: age] * len(images)
            cam(images.requires_grad_(), targets)  # so that frozen weights have gradients, too
            kept = cam.activations_and_grads
            seen, slopes = kept.activations[0].numpy(), kept.gradients[0].numpy()
            maps.append(cam.get_cam_image(images, layer, targets, seen, slopes, False))
    return np.concatenate(maps).astype(np.float32)


def faithfulness(
    model: AgeRegressor, images: torch.Tensor, maps: np.ndarray, signed: bool = True
) -> np.ndarray:
    """What taking pixels away does to the age of each image [N, 3, s, s] in 0-1: years [N].

    Signed: half of how much more the age falls when the pixels with the highest (raising) map go
    than when those with the lowest go. Unsigned: half of how much more it moves, either way, when
    those with the strongest map go than when the weakest go. Either is 0 for maps that know nothing
    of the network, if they have no shape in common. ROAD (Rong et al., ICML 2022): pixels are
    replaced by a blurred guess from their neighbours; a mean over 20 and 50 % of them."""
    images, size = images.to(model.mean.device), images.shape[-2:]
    order = np.stack([cv2.resize(m, size[::-1], interpolation=cv2.INTER_CUBIC) for m in maps])
    order = (order if signed else np.abs(order)).reshape(len(maps), -1)
    # Ranks from 0 to 1: the package takes 1 - map for "lowest first".
    ranks = (rankdata(order, axis=1) / order.shape[1]).astype(np.float32).reshape(-1, *size)
    with torch.inference_mode():
        ages = model(images)
    targets = [(lambda out: out) if signed else (lambda out, a=a: -(out - a).abs()) for a in ages]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the guess has a little noise
        return ROADCombined([80, 50])(images, ranks, targets, model)


def randomised(model: AgeRegressor, seed: int = 0) -> Iterator[tuple[str, AgeRegressor]]:
    """A copy whose weights are drawn anew block after block, from the last layer down to the first:
    (name of the block, model). A map that does not change shows the image, not what the network
    knows (Adebayo et al., NeurIPS 2018)."""
    model = copy.deepcopy(model)
    blocks = dict(model.backbone.named_children())
    features = blocks.pop("features", nn.Sequential()).named_children()
    blocks = {f"features.{name}": block for name, block in features} | blocks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, block in reversed(blocks.items()):
            drawn = [layer for layer in block.modules() if hasattr(layer, "reset_parameters")]
            for layer in drawn:
                layer.reset_parameters()
            if drawn:
                yield name, model


def rank_correlation(maps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Spearman's correlation [N] of the places of two maps of each face; 0 where one is flat."""
    ranks = [pd.DataFrame(rankdata(m.reshape(len(m), -1), axis=1)) for m in (maps, others)]
    return ranks[0].corrwith(ranks[1], axis=1).fillna(0).to_numpy()
