"""Where the network looks: signed Grad-CAM maps of the age, and the checks that a map must pass.

A map has one number for each place of a layer, float32 [N, h, w] in years: how much the features
there raise (+) or lower (-) the age, to first order. The algorithms are those of the package
grad-cam; its own output keeps only the positive part, scaled to 0-1 for each image.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pandas as pd
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.base_cam import BaseCAM
from pytorch_grad_cam.metrics.road import ROADCombined
from scipy.stats import rankdata
from torch import nn
from tqdm.auto import tqdm

from utils.augment import resize
from utils.model import AgeRegressor

REMOVED = (20, 50)  # per cent of the pixels taken away in the test of faithfulness


def stages(model: AgeRegressor) -> dict[int, nn.Module]:
    """Side of the map in places -> the last layer of that side, from fine to coarse.

    Raises ValueError where the backbone keeps no square maps (vision transformers).
    """
    if model.backbone_name.startswith(("vit", "swin")):
        raise ValueError(f"{model.backbone_name} is a transformer: it keeps no maps of channels")
    found: dict[int, nn.Module] = {}
    backbone = model.backbone
    blocks = list(getattr(backbone, "features", backbone).children())

    def note(module: nn.Module, _: tuple, output: torch.Tensor) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[2] > 1:
            found[output.shape[2]] = module

    handles = [block.register_forward_hook(note) for block in blocks]
    try:
        with torch.inference_mode():
            side = model.image_size
            model.eval()(torch.zeros(1, 3, side, side, device=model.mean.device))
    finally:
        for handle in handles:
            handle.remove()
    return dict(sorted(found.items(), reverse=True))


def age_maps(
    model: AgeRegressor,
    pixels: np.ndarray,
    rows: np.ndarray,
    layer: nn.Module,
    method: type[BaseCAM] = GradCAM,
    batch_size: int = 64,
    progress: bool = False,
    spoil: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> np.ndarray:
    """Maps [len(rows), h, w] of the faces `pixels[rows]` (uint8 [N, H, W, 3]) at one layer.

    For GradCAM the sum over a map is sum_k (mean gradient of the age)_k x (sum of activation)_k
    (Selvaraju et al., ICCV 2017), without the rectification that would hide what lowers the age.
    `method` is any class of the package that weighs activations; `spoil` as in
    utils.training.predict.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()
    rows, maps = np.asarray(rows), []
    with method(model, [layer]) as cam:
        for start in tqdm(range(0, len(rows), batch_size), "maps", disable=not progress):
            chips = np.asarray(pixels[rows[start : start + batch_size]])
            chips = torch.from_numpy(chips).permute(0, 3, 1, 2).to(device)
            images = resize(spoil(chips) if spoil else chips, model.image_size)
            targets = [lambda age: age] * len(images)
            cam(images.requires_grad_(), targets)  # so that frozen weights have gradients, too
            kept = cam.activations_and_grads
            seen, slopes = kept.activations[0].numpy(), kept.gradients[0].numpy()
            maps.append(cam.get_cam_image(images, layer, targets, seen, slopes, False))
    return np.concatenate(maps).astype(np.float32)


def enlarge(maps: np.ndarray, side: int) -> np.ndarray:
    """Maps [N, h, w] at [N, side, side], by cubic interpolation."""
    return np.stack([cv2.resize(m, (side, side), interpolation=cv2.INTER_CUBIC) for m in maps])


def edge_maps(pixels: np.ndarray, side: int) -> np.ndarray:
    """What an edge filter finds (Sobel, length of the gradient) in uint8 [N, H, W, 3].

    A baseline that knows nothing of any network (Adebayo et al., NeurIPS 2018).
    """
    maps = []
    for chip in pixels:
        grey = cv2.cvtColor(chip, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
        slopes = [cv2.Sobel(grey, -1, *order) for order in ((1, 0), (0, 1))]
        maps.append(cv2.resize(np.hypot(*slopes), (side, side), interpolation=cv2.INTER_AREA))
    return np.stack(maps)


def share_inside(maps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Share [N] of each map's positive part that lies in its mask (both [N, s, s])."""
    positive = np.maximum(maps, 0)
    return (positive * masks).sum((1, 2)) / np.maximum(positive.sum((1, 2)), 1e-9)


def faithfulness(
    model: AgeRegressor,
    images: torch.Tensor,
    maps: np.ndarray,
    signed: bool = True,
    removed: tuple[int, ...] = REMOVED,
) -> np.ndarray:
    """What taking pixels away does to the age of each image [N, 3, s, s], in years; [N].

    Signed: half of how much more the age falls when the pixels with the highest (raising) map go
    than when those with the lowest (lowering) map go. Unsigned: half of how much more it moves,
    either way, when the pixels with the strongest map go than when the weakest go. Either is 0
    for maps that know nothing of the network, if they have no shape in common.

    ROAD (Rong et al., ICML 2022): pixels are replaced by a blurred guess from their neighbours, a
    part `removed` (per cent) of them, averaged over the parts.
    """
    order = enlarge(maps, images.shape[-1])
    order = order if signed else np.abs(order)
    # Ranks from 0 to 1: the package takes 1 - map for "lowest first".
    ranks = rankdata(order.reshape(len(maps), -1), axis=1) / order[0].size
    with torch.inference_mode():
        ages = model(images)
    targets = [(lambda out: out) if signed else (lambda out, a=a: -(out - a).abs()) for a in ages]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the guess has a little noise
        score = ROADCombined([100 - part for part in removed])
        return score(images, ranks.reshape(order.shape).astype(np.float32), targets, model)


def randomised(model: AgeRegressor, seed: int = 0) -> Iterator[tuple[str, AgeRegressor]]:
    """Copies whose weights are drawn anew from the last layer down to the first, one block after
    another: (name of the block, model). A map that does not change shows the image, not what the
    network knows (Adebayo et al., NeurIPS 2018)."""
    model = copy.deepcopy(model)
    backbone = model.backbone
    blocks = dict(backbone.named_children())
    if "features" in blocks:
        features = blocks.pop("features")
        blocks = {f"features.{name}": b for name, b in features.named_children()} | blocks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, block in reversed(blocks.items()):
            drawn = [m for m in block.modules() if hasattr(m, "reset_parameters")]
            for layer in drawn:
                layer.reset_parameters()
            if drawn:
                yield name, model


def rank_correlation(maps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Spearman's correlation [N] of the places of two maps of each face; 0 where one is flat."""
    ranks = [rankdata(m.reshape(len(m), -1), axis=1) for m in (maps, others)]
    a, b = (r - r.mean(1, keepdims=True) for r in ranks)
    size = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return (a * b).sum(1) / np.maximum(size, 1e-9)


def attention(maps: np.ndarray) -> np.ndarray:
    """Share of each place in a face's map, whatever the sign: [N, h, w], each summing to 1."""
    size = np.abs(maps)
    return size / np.maximum(size.sum((1, 2), keepdims=True), 1e-9)


def attention_distance(
    maps: np.ndarray, people: pd.Series, bands: pd.Series, clusters: pd.Series, draws: int = 1000
) -> tuple[float, np.ndarray]:
    """How far apart groups of people are in where the network looks, at equal age.

    The mean over pairs of groups of the total variation distance (0 to 1) of their average
    `attention`, each band of age counting by its share of all faces. Bands that one group lacks
    are left out. Returns the distance, and the distances of `draws` permutations of the groups
    within bands (faces of a duplicate group move together).
    """
    shares = attention(maps).reshape(len(maps), -1)
    groups, levels = pd.factorize(people, sort=True)[0], pd.factorize(bands, sort=True)[0]
    counts = np.zeros((groups.max() + 1, levels.max() + 1))
    np.add.at(counts, (groups, levels), 1)
    kept = (counts > 0).all(0)[levels]
    shares, groups, levels = shares[kept], groups[kept], levels[kept]
    _, first, place = np.unique(np.asarray(clusters)[kept], return_index=True, return_inverse=True)
    weight = np.bincount(levels) / len(levels)

    def distance(groups: np.ndarray) -> float:
        cell = groups * len(weight) + levels
        size = np.bincount(cell, minlength=len(counts) * len(weight))
        order = np.argsort(cell, kind="stable")
        edges = np.r_[0, np.cumsum(size)[:-1]]
        sums = np.add.reduceat(shares[order], np.minimum(edges, len(order) - 1))
        means = np.where(size[:, None] > 0, sums / np.maximum(size, 1)[:, None], 0)
        means = means.reshape(len(counts), len(weight), -1)
        has = size.reshape(means.shape[:2]) * weight > 0
        part = has * weight
        average = (means * part[..., None]).sum(1) / part.sum(1)[:, None]
        i, j = np.triu_indices(len(average), 1)
        return float(np.abs(average[i] - average[j]).sum(1).mean() / 2)

    rng, chance = np.random.default_rng(0), []
    for _ in range(draws):
        order = np.lexsort((rng.random(len(first)), levels[first]))
        shuffled = np.empty(len(first), int)
        shuffled[np.argsort(levels[first], kind="stable")] = groups[first][order]
        chance.append(distance(shuffled[place]))
    return distance(groups), np.array(chance)
