"""Training speed against the usual notebook loop, prediction time, and the cost of augmentation.

    python tests/benchmarks/training_speed.py [--rounds 3] [--backbone resnet50]

The usual loop: Pillow for each image (Resize 128, flip, rotation 15, ColorJitter, ToTensor,
Normalize), a DataLoader with 2 workers, float32, NCHW, batch 128, SGD. Ours: `utils.training`
with all of its augmentation, same backbone, size and batch. Both run in processes of their own,
in turn, so that a busy machine slows both. On a GPU where there is one. With AGE_PUBLISH=1 the
figures go to results.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import evaluation
from utils.augment import STANDARD, augment
from utils.model import IMAGENET_MEAN, IMAGENET_STD, build_model
from utils.settings import get_settings
from utils.sources import load_faces
from utils.training import FaceRows, history, predict, train

SIZE, BATCH, WARM_UP = 128, 128, 1


def usual(settings, steps: int) -> float:
    """Images per second of the usual loop, after WARM_UP steps."""
    import torch
    from PIL import Image
    from torch import nn
    from torchvision import models, transforms

    pipeline = transforms.Compose([
        transforms.Resize((SIZE, SIZE)),
        transforms.RandomHorizontalFlip(),
        transforms.RandomRotation(15),
        transforms.ColorJitter(0.2, 0.2, 0.2),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip
    files = load_faces(settings).table["file"].iloc[: BATCH * (steps + WARM_UP)]

    class FaceFiles(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, i):
            image = Image.open(settings.folder / files.iloc[i]).convert("RGB")
            return pipeline(image), torch.tensor(float(files.iloc[i].split("_")[0]))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = models.get_model(settings.backbone, weights=None)
    model.fc = nn.Linear(model.fc.in_features, 1)
    model = model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
    loader = torch.utils.data.DataLoader(FaceFiles(), BATCH, shuffle=True, num_workers=2)
    for step, (images, ages) in enumerate(loader):
        if step == WARM_UP:
            _wait(device)
            start = time.perf_counter()
        loss = nn.functional.l1_loss(model(images.to(device))[:, 0], ages.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    _wait(device)
    return steps * BATCH / (time.perf_counter() - start)


def ours(settings, steps: int) -> float:
    """Images per second of utils.training: an epoch to warm up, and one that counts."""
    faces = load_faces(settings)
    count = BATCH * steps + 8
    split = np.where(np.arange(count) < BATCH * steps, "train", "valid")
    few = faces._replace(table=faces.table.iloc[:count].assign(split=split))
    with tempfile.TemporaryDirectory() as folder:
        train(few, settings, Path(folder) / "run", epochs=2, progress=False)
        return float(history(Path(folder) / "run")["images_per_second"].iloc[-1])


def first_step(settings) -> float:
    """Seconds from the archive (or the images' folder) to the end of a training step."""
    start = time.perf_counter()
    faces = load_faces(settings)
    few = faces._replace(table=faces.table.iloc[: BATCH + 8].copy())
    few.table["split"] = ["train"] * BATCH + ["valid"] * 8
    with tempfile.TemporaryDirectory() as folder:
        train(few, settings, Path(folder) / "run", epochs=1, progress=False)
    return time.perf_counter() - start


def augmentation_share(settings, images_per_second: float) -> float:
    """Time of `augment` on a batch, as a share of the whole step's."""
    import torch

    faces = load_faces(settings)
    ages = faces.table["age"].to_numpy(np.float32)
    rows = np.arange(settings.batch_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = FaceRows(faces.pixels, ages, rows, np.ones(len(rows), bool))
    pixels = data.__getitems__(list(rows))[0].to(device)
    generator, times = torch.Generator().manual_seed(0), []
    for _ in range(40):
        start = time.perf_counter()
        augment(pixels, settings.image_size, generator, **STANDARD)
        _wait(device)
        times.append(time.perf_counter() - start)
    return median(times[5:]) * images_per_second / settings.batch_size


def predict_ms(settings) -> float:
    """Milliseconds for one face, batch of 1, on one CPU core."""
    import torch

    torch.set_num_threads(1)
    faces, model = load_faces(settings), build_model(replace(settings, pretrained=False))
    times = []
    for row in range(60):
        start = time.perf_counter()
        predict(model, faces.pixels, [row])
        times.append(time.perf_counter() - start)
    return 1000 * median(times[10:])


def predict_rate(settings) -> float:
    """Images per second of prediction in batches of 256."""
    faces, model = load_faces(settings), build_model(replace(settings, pretrained=False))
    rows = np.arange(min(1024, len(faces.table)))
    predict(model, faces.pixels, rows[:256])
    start = time.perf_counter()
    predict(model, faces.pixels, rows)
    return len(rows) / (time.perf_counter() - start)


def _wait(device) -> None:
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize()


def measure(part: str, settings, steps: int, environment: dict | None = None) -> dict:
    """One part in a process of its own: its figure and the peak memory of all its processes."""
    command = [sys.executable, __file__, "--part", part, "--steps", str(steps)]
    command += ["--backbone", settings.backbone, "--size", str(settings.image_size)]
    command += ["--batch", str(settings.batch_size)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | (environment or {})
    )
    tree, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        used = 0
        try:
            for member in [tree, *tree.children(recursive=True)]:
                used += member.memory_full_info().uss
        except psutil.Error:
            continue  # a process ended while it was looked at
        peak = max(peak, used)
        time.sleep(2)  # looking is not free
    lines = process.stdout.read().splitlines()
    if process.returncode:
        raise SystemExit(f"{part} failed with status {process.returncode}")
    return {"figure": json.loads(lines[-1]), "megabytes": peak / 2**20}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given = parser.parse_args()
    own = get_settings("utkface")
    load_faces(own)
    rival = replace(
        own, backbone=given.backbone, pretrained=False, image_size=given.size,
        batch_size=given.batch,
    )  # fmt: skip
    if given.part:
        part = {"usual": usual, "ours": ours}.get(given.part)
        single = {"predict_ms": predict_ms, "predict_rate": predict_rate, "first": first_step}
        figure = part(rival, given.steps) if part else single[given.part](rival)
        print(json.dumps(figure))
        return

    rounds = []
    for number in range(given.rounds):
        pair = {part: measure(part, rival, given.steps) for part in ("usual", "ours")}
        rounds.append(pair)
        print(f"round {number + 1}: " + ", ".join(
            f"{part} {got['figure']:.1f} images/s, {got['megabytes']:.0f} MB"
            for part, got in pair.items()))  # fmt: skip
    ratios = [pair["ours"]["figure"] / pair["usual"]["figure"] for pair in rounds]
    ratio = {"value": median(ratios), "low": min(ratios), "high": max(ratios), "n": len(ratios)}
    gpu = torch.cuda.is_available()
    light = replace(own, pretrained=False)
    speed = measure("ours", light, 8)
    with tempfile.TemporaryDirectory() as folder:
        fresh = {"AGE_DATA": folder} if os.environ.get("UTKFACE_ARCHIVE") else {}
        first = measure("first", light, 1, fresh)["figure"]
    result = {
        "cpu_ratio": None if gpu else ratio,
        "gpu_ratio": ratio if gpu else None,
        "cpu_images_per_second": None if gpu else speed["figure"],
        "peak_memory_mb": {part: max(pair[part]["megabytes"] for pair in rounds)
                           for part in ("usual", "ours")},
        "augmentation_share": augmentation_share(own, speed["figure"]),
        "predict_ms_per_face": measure("predict_ms", light, 1)["figure"],
        "predict_images_per_second": measure("predict_rate", light, 1)["figure"],
        "seconds_to_first_step": first,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if own.publish:
        evaluation.record(own.figures, benchmark=result)


if __name__ == "__main__":
    main()
