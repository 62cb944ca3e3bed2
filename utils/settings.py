"""The one switch of the course: which faces, and everything that follows from it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "data" / "checkpoints" / "age_utkface.safetensors"  # the published weights
CHIP_SIZE = 128  # px: side of a face in the pixel cache


@dataclass(frozen=True)
class Settings:
    """What a run uses. Paths are absolute, sizes in pixels, the seed is for every generator."""

    faces: str  # "sample" (drawn by this project), "utkface" or "own"
    folder: Path  # the face images
    cache: Path  # decoded pixels and the face table
    runs: Path  # training runs: logs, checkpoints, weights
    figures: Path  # figures and results.json
    publish: bool  # True while `make publish` runs: face grids are pixelated
    image_size: int  # side of the network's input
    backbone: str  # name in torchvision.models
    pretrained: bool  # start from ImageNet weights
    epochs: int
    batch_size: int
    learning_rate: float  # highest rate of the one-cycle schedule
    head: str  # "regression" or "distribution": see utils.model
    seed: int = 0

    def __str__(self) -> str:
        width = max(len(field.name) for field in fields(self))
        rows = []
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Path):
                value = _short(value)
            rows.append(f"{field.name:<{width}}  {value}")
        return "\n".join(rows)


def _short(path: Path) -> str:
    """Path relative to the project, so that outputs do not tell where the project lies."""
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT).as_posix()
    return f".../{path.name}"


def get_settings(faces: str | None = None) -> Settings:
    """Settings for `faces`, else for the environment variable AGE_FACES, else for what is there.

    Each is "sample", "utkface" or a folder of your own images with a labels.csv. Unset, the course
    runs on UTKFace where `data/UTKFace` exists or UTKFACE_ARCHIVE names an archive, and on the
    drawn sample otherwise. AGE_DATA moves the data folder (default `data/`).

    Raises ValueError where AGE_FACES is none of the three, or a published run is not UTKFace's.
    """
    data = Path(os.environ.get("AGE_DATA") or ROOT / "data").expanduser().resolve()
    publish = os.environ.get("AGE_PUBLISH") == "1"
    faces = faces or os.environ.get("AGE_FACES", "").strip()
    if not faces:
        there = (data / "UTKFace").is_dir() or os.environ.get("UTKFACE_ARCHIVE")
        faces = "utkface" if there else "sample"
    folder, name = locate(faces).resolve(), faces.lower()
    if name in ("sample", "utkface"):
        folder, faces = data / ("sample" if name == "sample" else "UTKFace"), name
    elif folder.is_dir():
        # Two folders of one name must not share a cache: it keeps the newest set only.
        name = f"{folder.name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:6]}"
        faces = "own"
    else:
        raise ValueError(
            f"AGE_FACES is {faces!r}: set it to 'sample' or 'utkface', to a folder of images with "
            "a labels.csv (README, 'Your own faces'), or unset it"
        )
    if publish and faces == "own":
        raise ValueError("AGE_PUBLISH=1 writes the course's own results: not with your own faces")
    paths = dict(
        folder=folder,
        cache=data / "cache" / name,
        runs=data / "runs" / name,
        figures=ROOT / "figures" if publish else ROOT / "build" / "figures",
        publish=publish,
    )
    if faces == "sample":
        return Settings(
            faces, **paths, image_size=64, backbone="resnet18", pretrained=False,
            epochs=8, batch_size=64, learning_rate=2e-3, head="distribution",
        )  # fmt: skip
    return Settings(
        faces, **paths, image_size=112, backbone="mobilenet_v2", pretrained=True,
        epochs=16, batch_size=64, learning_rate=5e-4, head="distribution",
    )  # fmt: skip


def locate(name: str) -> Path:
    """Path as given, or relative to the project: a notebook's working folder is its own."""
    path = Path(name).expanduser()
    return path if path.exists() else ROOT / path


def comparison_settings(settings: Settings) -> Settings:
    """The same at a fraction of the cost, for training many variants at one equal budget."""
    if settings.faces == "sample":
        return replace(settings, image_size=32, epochs=3)
    return replace(settings, image_size=64, epochs=4)


def banner(settings: Settings) -> str:
    """One sentence that tells whose numbers a reader is about to see."""
    if settings.faces == "utkface":
        return "This run uses UTKFace, as the text does."
    whose = "your own faces" if settings.faces == "own" else "the drawn sample"
    return (
        f"This run uses {whose}. The numbers quoted in the text are UTKFace's: "
        "compare them\nwith the published outputs, not with the ones below."
    )
