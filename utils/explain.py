"""Where the network looks: signed Grad-CAM maps, float32 [N, h, w], of the years by which a layer's
features at each place raise (+) or lower (-) the age, to first order, and checks of such maps."""

import copy
from collections.abc import Iterator

import cv2
import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.metrics.road import ROADCombined
from scipy.stats import rankdata
from torch import Tensor, nn
from tqdm.auto import tqdm

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


def age_maps(model: AgeRegressor, pixels: np.ndarray, rows: np.ndarray, layer: nn.Module,
        method=GradCAM, batch_size=64, *, progress=False, corrupt=None) -> np.ndarray:  # fmt: skip
    """Maps [len(rows), h, w] of `pixels[rows]` (uint8 [N, H, W, 3]) at a layer by a `method` of the
    package grad-cam, not rectified and scaled as its own; `corrupt`: see utils.training.predict."""
    parts, maps = np.split(np.asarray(rows), range(batch_size, len(rows), batch_size)), []
    with method(model.eval(), [layer]) as cam:
        for part in tqdm(parts, "maps", disable=not progress):
            chips = torch.from_numpy(pixels[part]).permute(0, 3, 1, 2).to(model.mean.device)
            images = resize(corrupt(chips) if corrupt else chips, model.image_size)
            targets, kept = [lambda age: age] * len(images), cam.activations_and_grads
            cam(images.requires_grad_(), targets)  # so that frozen weights have gradients, too
            seen, slopes = kept.activations[0].numpy(), kept.gradients[0].numpy()
            maps.append(cam.get_cam_image(images, layer, targets, seen, slopes, False))
    return np.concatenate(maps).astype(np.float32)


def faithfulness(model: AgeRegressor, images: Tensor, maps: np.ndarray, signed=True) -> np.ndarray:
    """Half of how much more the ages of images [N, 3, s, s] in 0-1 fall (signed) or move if pixels
    of the highest (strongest) map go than if those of the lowest do: years [N], about 0 for a
    random map. ROAD (Rong et al., ICML 2022): 20 and 50 % are guessed from their neighbours."""
    images, side = images.to(model.mean.device), images.shape[-1]
    order = np.stack([cv2.resize(m, (side, side), interpolation=cv2.INTER_CUBIC) for m in maps])
    order = (order if signed else np.abs(order)).reshape(len(maps), -1)
    ranks = rankdata(order, axis=1).reshape(-1, side, side) / side**2  # 0-1: 1 - map is used, too
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the guess has a little noise
        ages = model(images)
        aims = [(lambda out: out) if signed else (lambda out, a=a: -(out - a).abs()) for a in ages]
        return ROADCombined([80, 50])(images, ranks.astype(np.float32), aims, model)


def randomised(model: AgeRegressor, seed: int = 0) -> Iterator[tuple[str, AgeRegressor]]:
    """(Block, copy of the model) while weights are drawn anew, from the last block to the first. A
    map that stays shows the image, not what the network knows (Adebayo et al., NeurIPS 2018)."""
    model = copy.deepcopy(model)
    blocks = dict(model.backbone.named_children())
    features = blocks.pop("features", nn.Sequential()).named_children()
    blocks = {f"features.{name}": block for name, block in features} | blocks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, block in reversed(blocks.items()):
            if drawn := [layer for layer in block.modules() if hasattr(layer, "reset_parameters")]:
                for layer in drawn:
                    layer.reset_parameters()
                yield name, model


def rank_correlation(maps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Spearman's correlation [N] of the places of two maps of each face; 0 where one is flat."""
    ranks = [rankdata(m.reshape(len(m), -1), axis=1) - (m[0].size + 1) / 2 for m in (maps, others)]
    return torch.cosine_similarity(*map(torch.from_numpy, ranks)).numpy()
