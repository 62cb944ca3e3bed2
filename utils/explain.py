"""Where the network looks: signed Grad-CAM maps, float32 [N, h, w], of the years by which a layer's
features at each place raise (+) or lower (-) the age, to first order."""

import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from torch import nn
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
