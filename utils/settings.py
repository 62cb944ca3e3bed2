"""The one switch of the course: which faces, and everything that follows from it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "data" / "checkpoints" / "age_utkface.safetensors"  # the published weights
CHIP_SIZE = 128  # px: side of a face in the pixel cache
OLDEST = 120  # years: the highest age of a label, and the last class of a distribution


@dataclass(frozen=True)
class Settings:
    """What a run uses. Paths are absolute, sizes in pixels, the seed is for every generator."""

    faces: str  # "sample" (drawn by this project), "utkface" or "own"
    folder: Path  # the face images
    cache: Path  # decoded pixels and the face table
    runs: Path  # training runs: history, checkpoints, weights
    figures: Path  # figures and results.json
    publish: bool  # True while `make publish` runs: no single face of UTKFace is shown
    image_size: int = 160  # side of the network's input
    backbone: str = "face_mobilenet"  # or "small", or a name in torchvision.models
    pretrained: bool = True  # start from weights learnt on faces or on ImageNet
    frozen: int = 6  # first blocks of the backbone's `features` that keep that start
    epochs: int = 6
    batch_size: int = 64
    learning_rate: float = 5e-4  # highest rate of the one-cycle schedule
    weight_decay: float = 0.02
    head: str = "distribution"  # or "regression": see utils.model
    seed: int = 0


def get_settings(faces: str | None = None) -> Settings:
    """Settings for `faces`, else for the variable AGE_FACES: "sample", "utkface", or a folder of
    your own images (or ValueError). Unset: UTKFace where `data/UTKFace` exists or UTKFACE_ARCHIVE
    names an archive, else the sample. AGE_DATA moves the data folder, `data/`."""
    data = Path(os.environ.get("AGE_DATA") or ROOT / "data").expanduser().resolve()
    faces = (faces or os.environ.get("AGE_FACES", "")).strip()
    if not faces:
        there = (data / "UTKFace").is_dir() or os.environ.get("UTKFACE_ARCHIVE")
        faces = "utkface" if there else "sample"
    folder, name = locate(faces).resolve(), faces.lower()
    if name in ("sample", "utkface"):
        folder, faces = data / ("sample" if name == "sample" else "UTKFace"), name
    elif folder.is_dir():  # two folders of one name must not share a cache
        name = f"{folder.name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:6]}"
        faces = "own"
    else:
        raise ValueError(
            f"AGE_FACES is {faces!r}: set it to 'sample' or 'utkface', to a folder of images with "
            "a labels.csv (README, 'Your own faces'), or unset it"
        )
    publish = os.environ.get("AGE_PUBLISH") == "1"
    if publish and faces == "own":
        raise ValueError("AGE_PUBLISH=1 writes the course's own results: not with your own faces")
    figures = ROOT / "figures" if publish else ROOT / "build" / "figures"
    paths = folder, data / "cache" / name, data / "runs" / name, figures
    if faces == "sample":
        drawn = dict(image_size=48, backbone="small", pretrained=False, learning_rate=3e-3)
        return Settings(faces, *paths, publish, **drawn)
    return Settings(faces, *paths, publish)


def comparison_settings(settings: Settings) -> Settings:
    """The same at a fraction of the cost, for training many variants at one equal budget."""
    small, epochs = (32, 2) if settings.faces == "sample" else (96, 3)
    return replace(settings, image_size=small, epochs=epochs)


def banner(settings: Settings) -> str:
    """One sentence that tells whose numbers a reader is about to see."""
    whose = {"own": "your own faces", "sample": "the drawn sample"}.get(settings.faces)
    other = f"{whose}; the text quotes UTKFace's numbers, as the published pages show."
    return "This run uses " + (other if whose else "UTKFace, as the text does.")


def locate(name: str) -> Path:
    """Path as given, or relative to the project: a notebook's working folder is its own."""
    path = Path(name).expanduser()
    return path if path.exists() else ROOT / path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary sibling, then rename: `path` is never half a file, and what was
    there before stays. Raises OSError where the disk is full or may not be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk is a RuntimeError to torch.save
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        advice = "free some space, or set AGE_DATA to a folder you may write to, then run again"
        raise OSError(f"{path} cannot be written ({error}): {advice}") from error
