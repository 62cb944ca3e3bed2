"""The published MiVOLO model on this course's faces, where its packages and the network allow."""

from __future__ import annotations

import importlib.util

import cv2
import numpy as np
import torch
from tqdm.auto import tqdm

MODEL = "iitolstykh/mivolo_v2"  # on the Hugging Face hub
PACKAGES = ("transformers", "timm", "mivolo")  # what the model's own code imports
LICENCE = (
    "MiVOLO (Kuprashevich & Tolstykh, 2023) comes under a licence of its own, which restricts its "
    "use: read license/en_us.pdf in the repository WildChlamydia/MiVOLO. Its model runs code from "
    "the hub on your machine."
)


class MivoloMissing(RuntimeError):
    """MiVOLO cannot be run here; the message says why, and what would help."""


def load_mivolo(model: str = MODEL) -> tuple[torch.nn.Module, object]:
    """The model and its image processor, downloaded on first use (some 120 MB).

    Raises MivoloMissing without its packages, and where the hub cannot be reached.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MivoloMissing(
            f"MiVOLO needs the package(s) {', '.join(missing)}, which the course does not: install "
            "transformers and timm with pip, and mivolo from the repository WildChlamydia/MiVOLO"
        )
    auto = importlib.import_module("transformers")
    try:
        net = auto.AutoModelForImageClassification.from_pretrained(model, trust_remote_code=True)
        processor = auto.AutoImageProcessor.from_pretrained(model, trust_remote_code=True)
    except (OSError, ValueError, ImportError) as error:
        raise MivoloMissing(
            f"MiVOLO could not be loaded ({str(error).splitlines()[0]}): check the network, or "
            "give the path of a downloaded copy of the model"
        ) from error
    return net.eval(), processor


def mivolo_ages(
    net: torch.nn.Module,
    processor: object,
    pixels: np.ndarray,
    rows: np.ndarray,
    batch_size: int = 32,
    progress: bool = False,
) -> np.ndarray:
    """Ages in years, float32 [len(rows)], of `pixels[rows]` (uint8 RGB [N, H, W, 3]), from the face
    alone: UTKFace has no bodies, and the model's second input takes "none" for an answer."""
    ages = []
    for start in tqdm(range(0, len(rows), batch_size), "MiVOLO", disable=not progress):
        part = rows[start : start + batch_size]
        crops = [cv2.cvtColor(np.asarray(pixels[row]), cv2.COLOR_RGB2BGR) for row in part]
        face = processor(images=crops)["pixel_values"]
        nobody = processor(images=[None] * len(part))["pixel_values"]
        with torch.inference_mode():
            answer = net(faces_input=face, body_input=nobody)
        ages.append(answer.age_output.flatten().float().cpu().numpy())
    return np.concatenate(ages) if ages else np.empty(0, np.float32)
