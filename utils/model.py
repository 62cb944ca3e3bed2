"""The age model: a torchvision backbone that puts out years, and its safetensors file."""

from __future__ import annotations

import http.client
import importlib.metadata
import json
import os
import re
import sys
import urllib.error
import warnings
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn
from torchvision.models import ResNet, get_model, get_model_weights, list_models
from torchvision.transforms.v2.functional import center_crop

from utils.settings import Settings, locate

FORMAT, VERSION = "face age regressor", 1
HEADS = ("regression", "distribution", "groups", "ordinal")
OLDEST = 120  # years: last class of the distribution
GROUP_CENTRES = (5.0, 15.0, 25.0, 35.0, 45.0, 55.0, 65.0, 80.0)  # years: 0-9, 10-19, ..., 70+
FACE_PART = 2 / 3  # of the chip's side: the tight view of a backbone with views
CROP = "UTKFace chip: eyes at x 0.29 and 0.69, y 0.29; mouth corners at x 0.32 and 0.65, y 0.68"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OFFLINE = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
# DenseNet files from before 2017 name "norm.1" what the module calls "norm1".
OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.[a-z_]+)$")


class AgeRegressor(nn.Module):
    """Faces to ages in years with any classification backbone of torchvision.

    `head` names how the output becomes an age:
    - "regression": one number, age = age_mean + age_scale * backbone(normalised image);
    - "distribution": a probability for each year from 0 to OLDEST, and the age is its mean
      (Gao et al., DLDL-v2, IJCAI 2018);
    - "groups": a probability for each age group, and the age is the mean of GROUP_CENTRES;
    - "ordinal": the probability to be older than each year, and the age is their sum (Cao et al.,
      CORAL, 2020).
    `age_mean` and `age_scale` (years) put the untrained output near the ages of the training set.
    `mean` and `std` are per colour channel, for pixels in 0-1. `backbone` may end in ":face" or
    ":face+chip": see `Views`.

    Raises ValueError for a name that torchvision does not list, or an unknown head.
    """

    def __init__(
        self,
        backbone: str,
        image_size: int,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
        age_mean: float = 33.0,
        age_scale: float = 20.0,
        head: str = "regression",
    ) -> None:
        super().__init__()
        if head not in HEADS:
            raise ValueError(f"head {head!r} is not known here: use one of {', '.join(HEADS)}")
        self.backbone_name, self.image_size, self.head = backbone, image_size, head
        self.origin = "random"  # where the backbone's first weights came from
        outputs = {"distribution": OLDEST + 1, "groups": len(GROUP_CENTRES)}.get(head, 1)
        self.backbone = _backbone(backbone, image_size, outputs)
        layers = {
            name: layer
            for name, layer in self.backbone.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.shape[0] == outputs
        }
        self.last_layer, last = list(layers.items())[-1]
        years = torch.arange(OLDEST + (head != "ordinal"), dtype=torch.float32)
        if head == "groups":
            years = torch.tensor(GROUP_CENTRES)
        self.register_buffer("years", years, persistent=False)
        nn.init.normal_(last.weight, std=0.01)
        if last.bias is not None:
            nn.init.zeros_(last.bias)
            if head in ("distribution", "groups"):  # start from the normal curve of training ages
                last.bias.data.copy_(-((years - age_mean) ** 2) / (2 * age_scale**2))
        if head == "ordinal":
            self.set_last(_ordinal(last, (age_mean - years) / (0.6 * age_scale)))
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("age_mean", torch.tensor(float(age_mean)))
        self.register_buffer("age_scale", torch.tensor(float(age_scale)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Ages in years [B] of RGB images [B, 3, h, w], floats in 0-1.

        Raises TypeError for integer pixels: 0-255 into ImageNet weights is a silent mistake.
        """
        return self.ages(self.outputs(images))

    def outputs(self, images: torch.Tensor) -> torch.Tensor:
        """What the backbone puts out, float32: [B, 1], or the logits [B, K] of the head."""
        if not images.is_floating_point():
            raise TypeError(f"images are {images.dtype}: give floats in 0-1 (utils.augment.resize)")
        return self.backbone((images - self.mean) / self.std).flatten(1).float()

    def ages(self, outputs: torch.Tensor) -> torch.Tensor:
        """Ages in years [B] from `outputs`."""
        if self.head == "regression":
            return self.age_mean + self.age_scale * outputs.squeeze(1)
        if self.head == "ordinal":
            return outputs.sigmoid().sum(1)
        return outputs.softmax(1) @ self.years

    def ages_and_spreads(self, outputs: torch.Tensor) -> torch.Tensor:
        """[B, 2] in years: the age, and the standard deviation of the distribution that it is the
        mean of (NaN with the head "regression", which has none)."""
        ages = self.ages(outputs)
        if self.head == "regression":
            return torch.stack([ages, torch.full_like(ages, torch.nan)], 1)
        if self.head == "ordinal":  # E[age^2] = sum over k of (2k + 1) P(age > k)
            squares = outputs.sigmoid() @ (2 * self.years + 1)
        else:
            squares = outputs.softmax(1) @ self.years**2
        return torch.stack([ages, (squares - ages**2).clamp(min=0).sqrt()], 1)

    def set_last(self, layer: nn.Module) -> None:
        """Put another layer in place of the backbone's last one (an identity: features only)."""
        parent, _, name = self.last_layer.rpartition(".")
        setattr(self.backbone.get_submodule(parent), name, layer)


class Views(nn.Module):
    """One backbone that looks at the tight face, or at the face and at the whole chip.

    From images [B, 3, s, s] the central FACE_PART ("face") and the whole, shrunk to the same size
    ("face+chip"): hair, ears and neck. In the latter each view's places attend to those of the
    other before both are averaged: the idea of MiVOLO (Kuprashevich & Tolstykh, 2023), whose
    second view is the whole person, on a small scale.
    """

    def __init__(self, features: nn.Module, outputs: int, context: bool, width: int = 256) -> None:
        super().__init__()
        self.features, self.context = features, context
        with torch.no_grad():
            channels = features.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
        features.train()
        self.narrow = nn.Conv2d(channels, width, 1)
        if context:
            self.norm = nn.LayerNorm(width)
            self.attend = nn.ModuleList(
                nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(2)
            )
        self.age = nn.Linear(width * (1 + context), outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        side = round(images.shape[-1] * FACE_PART)
        face = center_crop(images, [side, side])
        if not self.context:
            return self.age(self.narrow(self.features(face)).mean((2, 3)))
        chip = nn.functional.interpolate(images, (side, side), mode="bilinear", antialias=True)
        places = self.narrow(self.features(torch.cat([face, chip]))).flatten(2).transpose(1, 2)
        views = places.chunk(2)
        known = self.norm(places).chunk(2)
        seen = []
        for i, attend in enumerate(self.attend):
            other = known[1 - i]
            seen.append(views[i] + attend(known[i], other, other, need_weights=False)[0])
        return self.age(torch.cat([view.mean(1) for view in seen], 1))


def _ordinal(last: nn.Module, biases: torch.Tensor) -> nn.Module:
    """CORAL's layer in place of the last one: one weight vector, a bias for each year."""
    from coral_pytorch.layers import CoralLayer

    if not isinstance(last, nn.Linear):
        raise ValueError("the head 'ordinal' needs a backbone that ends in a linear layer")
    layer = CoralLayer(last.in_features, len(biases) + 1)
    nn.init.normal_(layer.coral_weights.weight, std=0.01)
    layer.coral_bias.data.copy_(biases)
    return layer


def _backbone(name: str, image_size: int, outputs: int) -> nn.Module:
    name, _, views = name.partition(":")
    if views:
        return _with_views(_backbone(name, image_size, outputs), name, views, outputs)
    known = list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"backbone {name!r} is not a torchvision classifier: {', '.join(known)}")
    options = {}
    if name in ("googlenet", "inception_v3"):
        # No auxiliary outputs; their published weights expect ImageNet's mean and std re-scaled.
        options = dict(aux_logits=False, transform_input=True, init_weights=True)
    elif name.startswith("vit_"):
        options = dict(image_size=image_size)
    elif name.startswith("maxvit"):
        options = dict(input_size=(image_size, image_size))
    try:
        model = get_model(name, weights=None, num_classes=outputs, **options)
    except (ValueError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be built for {image_size} px images: {error}") from error
    if name.startswith("squeezenet"):
        model.classifier[2] = nn.Identity()  # its last ReLU would forbid ages below the mean
    return model


def _with_views(model: nn.Module, name: str, views: str, outputs: int) -> Views:
    if views not in ("face", "face+chip"):
        raise ValueError(f"views {views!r} are not known here: use {name}:face or {name}:face+chip")
    if isinstance(model, ResNet):
        features = nn.Sequential(OrderedDict(list(model.named_children())[:-2]))
    elif name.startswith(("mobilenet", "efficientnet", "convnext", "mnasnet")):
        features = next(model.children())
    else:
        raise ValueError(f"{name} cannot have views: use a ResNet, a MobileNet or an EfficientNet")
    return Views(features, outputs, context=views == "face+chip")


def build_model(
    settings: Settings, age_mean: float = 33.0, age_scale: float = 20.0
) -> AgeRegressor:
    """New model for `settings.backbone` at `settings.image_size`, seeded by `settings.seed`.

    With `settings.pretrained` the backbone starts from the file in AGE_BACKBONE_WEIGHTS (a state
    dict of this backbone, .pth or .safetensors, or a file of `save_weights`, whose head is kept),
    else from torchvision's default weights, which are downloaded once. Offline, it warns and
    starts from random weights. Normalisation follows the weights; for a plain file it is ImageNet's
    unless AGE_BACKBONE_MEAN_STD says otherwise ("0.5,0.5": mean and standard deviation of all
    channels, pixels in 0-1).

    Raises FileNotFoundError or ValueError where the file is missing, unreadable, or another
    model's, and ValueError where the backbone cannot take images of this size.
    """
    name, size = settings.backbone, settings.image_size
    state, mean, std, origin = None, IMAGENET_MEAN, IMAGENET_STD, "random"
    file = os.environ.get("AGE_BACKBONE_WEIGHTS")
    trained = _trained(locate(file)) if settings.pretrained and file else None
    if trained:
        state, origin = trained.backbone.state_dict(), f"file {Path(file).name}"
        mean, std = trained.mean.flatten().tolist(), trained.std.flatten().tolist()
    elif settings.pretrained and file:
        state, origin = _read_state(locate(file)), f"file {Path(file).name}"
        mean, std = _mean_std(os.environ.get("AGE_BACKBONE_MEAN_STD"))
    elif settings.pretrained:
        try:
            plain = name.partition(":")[0]
            weights = get_model_weights(plain).DEFAULT
            full = get_model(plain, weights=weights, progress=sys.stderr.isatty())
            state, origin = full.state_dict(), f"torchvision {weights}"
            mean, std = weights.transforms().mean, weights.transforms().std
        except OFFLINE as error:
            warnings.warn(
                f"The weights of {name} could not be downloaded ({error}): training starts from "
                "random weights and will end with a larger error. Set AGE_BACKBONE_WEIGHTS to a "
                "state dict (.pth or .safetensors) to start from a local file.",
                stacklevel=2,
            )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        model = AgeRegressor(
            name, size, tuple(mean), tuple(std), age_mean, age_scale, settings.head
        )
    if state is not None:
        _fill(model, state, origin)
        model.origin = origin
        if trained and trained.head == model.head:
            model.load_state_dict(trained.state_dict())
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{name} cannot take images of {size} px: {error}") from error
    return model.train()


def _trained(path: Path) -> AgeRegressor | None:
    """The model of a file of `save_weights`; None for a file of another kind."""
    try:
        with safe_open(path, "pt") as file:
            ours = (file.metadata() or {}).get("format") == json.dumps(FORMAT)
    except (SafetensorError, OSError):
        return None
    return load_weights(path)[0] if ours else None


def _mean_std(text: str | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not text:
        return IMAGENET_MEAN, IMAGENET_STD
    try:
        mean, std = (float(part) for part in text.split(","))
    except ValueError:
        mean = std = 0.0
    if not std > 0:
        raise ValueError(f"AGE_BACKBONE_MEAN_STD is {text!r}: give mean,std, for example 0.5,0.5")
    return (mean,) * 3, (std,) * 3


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"AGE_BACKBONE_WEIGHTS names {path}, and there is no such file")
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds; all mean the same to the reader
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"AGE_BACKBONE_WEIGHTS={path} cannot be read as a state dict: {reason}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"AGE_BACKBONE_WEIGHTS={path} is not a plain state dict of tensors")
    return state


def _fill(model: AgeRegressor, state: dict[str, torch.Tensor], origin: str) -> None:
    """Copy `state` into the backbone: all but its last layer, whose outputs are not ages."""
    own = model.backbone.state_dict()
    if isinstance(model.backbone, Views):  # only what extracts features has first weights
        own = {key: value for key, value in own.items() if key.startswith("features.")}
        state = {f"features.{key.removeprefix('features.')}": v for key, v in state.items()}
        state = {key: value for key, value in state.items() if key in own}
    unused = [f"{model.last_layer}."]
    if model.backbone_name in ("googlenet", "inception_v3"):
        unused += ["aux1.", "aux2.", "AuxLogits."]
    given = {OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    given = {key: value for key, value in given.items() if not key.startswith(tuple(unused))}
    faults = [
        f"{key} is missing"
        for key in own
        if key not in given and not key.startswith(tuple(unused)) and "num_batches" not in key
    ]
    faults += [f"{key} is unknown" for key in given if key not in own]
    faults += [
        f"{key} is {list(value.shape)} instead of {list(own[key].shape)}"
        for key, value in given.items()
        if key in own and value.shape != own[key].shape
    ]
    if faults:
        raise ValueError(
            f"The weights ({origin}) are not those of a {model.backbone_name} at "
            f"{model.image_size} px: {len(faults)} tensors differ, first {'; '.join(faults[:3])}"
        )
    model.backbone.load_state_dict(given, strict=False)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary sibling, then rename: `path` is never half a file.

    Raises OSError where the disk is full or may not be written; what was there before stays.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError to torch.save
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} cannot be written ({error}): free some space, or set AGE_DATA to a folder you "
            "may write to, then run again. What was there before is still there"
        ) from error


def save_weights(model: AgeRegressor, path: Path, **extra: object) -> None:
    """Write the weights and all that prediction needs to one safetensors file, atomically.

    `extra` (values that JSON can hold: split digest, training settings, ...) joins the metadata.
    """
    packages = ("torch", "torchvision", "lightning", "safetensors", "numpy")
    metadata = dict(
        format=FORMAT,
        version=VERSION,
        backbone=model.backbone_name,
        head=model.head,
        image_size=model.image_size,
        mean=model.mean.flatten().tolist(),
        std=model.std.flatten().tolist(),
        age_mean=model.age_mean.item(),
        age_scale=model.age_scale.item(),
        crop=CROP,
        origin=model.origin,
        libraries={name: importlib.metadata.version(name) for name in packages},
    )
    _write(model, path, metadata | extra)


def add_facts(path: Path, **facts: object) -> None:
    """Write more metadata (values that JSON can hold) into a file of `save_weights`, atomically."""
    model, metadata = load_weights(path)
    _write(model, path, metadata | facts)


def _write(model: AgeRegressor, path: Path, metadata: dict) -> None:
    text = {key: json.dumps(value) for key, value in metadata.items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_atomically(Path(path), lambda file: file.write_bytes(save(tensors, text)))


def load_weights(path: Path) -> tuple[AgeRegressor, dict]:
    """Model in evaluation mode, on the CPU, and the metadata of a file of `save_weights`.

    Raises FileNotFoundError, or ValueError for a pickle, a damaged file, a file of something
    else, or one of a format that this code does not know. No pickle is ever loaded.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: train first, or fetch the published weights")
    with path.open("rb") as file:
        start = file.read(9)  # of a safetensors file: the header's length, then its bracket
    if start.startswith((b"PK", b"\x80")) and start[8:] != b"{":
        raise ValueError(f"{path} is a pickle (.pth, .ckpt), which may run code: not loaded")
    try:
        with safe_open(path, "pt") as file:
            text = file.metadata() or {}
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error
    if text.get("format") != json.dumps(FORMAT):
        raise ValueError(f"{path} is a safetensors file, but not an age model of this course")
    metadata = {key: json.loads(value) for key, value in text.items()}
    if metadata["version"] != VERSION:
        raise ValueError(
            f"{path} has format version {metadata['version']}; this code reads {VERSION}: "
            "update the code, or fetch weights that fit it"
        )
    names = ("backbone", "image_size", "mean", "std", "age_mean", "age_scale", "head")
    with torch.random.fork_rng(devices=[]):
        model = AgeRegressor(**{name: metadata[name] for name in names})
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit a {model.backbone_name}: {error}") from error
    model.origin = metadata["origin"]
    return model.eval(), metadata
