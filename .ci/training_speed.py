"""Training speed against the usual notebook loop, prediction time, and the cost of augmentation.

    python .ci/training_speed.py [--rounds 3] [--backbone resnet50]
    python .ci/training_speed.py --to-goal    minutes of training to a test MAE of 5.04 years

The usual loop: Pillow for each image (Resize 128, flip, rotation 15, ColorJitter, ToTensor,
Normalize), a DataLoader with 2 workers, float32, NCHW, batch 128, SGD. Ours: `utils.training`
with all of its augmentation, same backbone, size and batch. Both run in processes of their own,
in turn, so that a busy machine slows both. On a GPU where there is one. With AGE_PUBLISH=1 the
figures go to results.json.

To the goal, both start from faces with the face MobileNet at 128 px, in batches of 64. The usual
loop is given Adam at 0.0001 and the L1 loss, and is tested after each epoch, for an hour at most.
Ours is trained for one epoch, and if that does not reach the goal, anew for two, and so on. The
time that testing takes does not count.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import psutil
import torch
from PIL import Image
from torchvision import models, transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import evaluation
from utils.augment import STANDARD, augment, resize
from utils.faces import load_faces
from utils.model import AgeRegressor, build_model, load_weights
from utils.settings import CHECKPOINT, get_settings

# utils.training is imported inside the functions that use it, as it makes PyTorch keep freed
# memory: the usual loop runs without that.

SIZE, BATCH, WARM_UP = 128, 128, 1
GOAL, LIMIT = 5.04, 60  # years of test MAE; minutes of training


def usual_loader(settings, faces, rows: np.ndarray, *last):
    """Batches of images [B, 3, SIZE, SIZE] and ages [B], as most notebooks read them."""
    pipeline = transforms.Compose([
        transforms.Resize((SIZE, SIZE)),
        transforms.RandomHorizontalFlip(),
        transforms.RandomRotation(15),
        transforms.ColorJitter(0.2, 0.2, 0.2),
        transforms.ToTensor(),
        *last,
    ])  # fmt: skip
    files = faces.table["file"].iloc[rows]

    class FaceFiles(torch.utils.data.Dataset):
        def __len__(self):
            return len(files)

        def __getitem__(self, i):
            image = Image.open(settings.folder / files.iloc[i]).convert("RGB")
            return pipeline(image), torch.tensor(float(files.iloc[i].split("_")[0]))

    return torch.utils.data.DataLoader(FaceFiles(), settings.batch_size, True, num_workers=2)


def usual_steps(model, loader, optimizer) -> Iterator[int]:
    """Once over the images: the loop of most notebooks. Yields each step's number before it."""
    device = next(model.parameters()).device
    for step, (images, ages) in enumerate(loader):
        yield step
        loss = torch.nn.functional.l1_loss(model(images.to(device)).flatten(), ages.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()


def usual(settings, faces, steps: int) -> float:
    """Images per second of the usual loop, after WARM_UP steps."""
    scale = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    loader = usual_loader(settings, faces, np.arange(BATCH * (steps + WARM_UP)), scale)
    model = models.get_model(settings.backbone, weights=None)
    model.fc = torch.nn.Linear(model.fc.in_features, 1)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").train()
    optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
    for step in usual_steps(model, loader, optimizer):
        if step == WARM_UP:
            start = time.perf_counter()
    return steps * BATCH / (time.perf_counter() - start)


def ours(settings, faces, steps: int) -> float:
    """Images per second of utils.training: an epoch to warm up, and one that counts."""
    from utils.training import train

    split = np.where(np.arange(BATCH * steps + 8) < BATCH * steps, "train", "valid")
    few = faces._replace(table=faces.table.iloc[: len(split)].assign(split=split))
    with tempfile.TemporaryDirectory() as folder:
        train(few, replace(settings, epochs=2), Path(folder) / "run", progress=False)
        return float(pd.read_csv(Path(folder) / "run/history.csv")["images_per_second"].iloc[-1])


def recipe(settings, faces, steps: int) -> float:
    """Images per second of the published recipe: from faces, with its frozen blocks."""
    return ours(replace(settings, pretrained=True), faces, steps)


def test_mae(model, faces) -> float:
    from utils.training import predict

    test = faces.table[faces.table["split"] == "test"]
    ages = predict(model.eval(), faces.pixels, test.index, flip=True)
    return float(np.abs(ages - test["age"]).mean())


def usual_to_goal(settings, faces, steps: int) -> dict:
    """Minutes and epochs of the usual loop until the test MAE is GOAL, and that MAE; None for all
    after LIMIT."""
    settings = replace(settings, pretrained=True)
    known = np.flatnonzero(faces.table["split"] == "train")
    some = np.random.default_rng(settings.seed).choice(known, 512)
    chips = torch.from_numpy(faces.pixels[some]).permute(0, 3, 1, 2)
    ages = faces.table["age"].iloc[known]
    model = build_model(settings, ages.mean(), ages.std(), resize(chips, settings.image_size))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    loader = usual_loader(settings, faces, known)
    optimizer, minutes = torch.optim.Adam(model.parameters(), 1e-4), 0.0
    for epochs in count(1):
        start = time.perf_counter()
        for _ in usual_steps(model.train(), loader, optimizer):
            pass
        minutes += (time.perf_counter() - start) / 60
        print(f"usual: {minutes:.1f} minutes, test MAE {(mae := test_mae(model, faces)):.2f}")
        if mae <= GOAL or minutes > LIMIT:
            return _reached(minutes, epochs, mae)


def ours_to_goal(settings, faces, steps: int) -> dict:
    """The same of the shortest training by utils.training, in whole epochs."""
    from utils.training import train

    for epochs in count(1):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            whole = replace(settings, pretrained=True, epochs=epochs)
            model = train(faces, whole, run, progress=False)
            log = pd.read_csv(run / "history.csv")
        known = (faces.table["split"] == "train").sum()
        minutes = float((known / log["images_per_second"]).sum() / 60)
        print(f"ours: {minutes:.1f} minutes, test MAE {(mae := test_mae(model, faces)):.2f}")
        if mae <= GOAL or minutes > LIMIT:
            return _reached(minutes, epochs, mae)


def _reached(minutes: float, epochs: int, mae: float) -> dict:
    found = {"minutes": minutes, "epochs": epochs, "test_mae": mae}
    return found if mae <= GOAL else dict.fromkeys(found)


def augment_ms(settings, faces, steps: int) -> float:
    """Milliseconds of augmentation for a batch."""
    chips = torch.tensor(faces.pixels[: settings.batch_size]).permute(0, 3, 1, 2)
    generator = torch.Generator().manual_seed(0)
    return _median_ms(lambda _: augment(chips, settings.image_size, generator, **STANDARD), 40)


def predict_ms(settings, faces, steps: int) -> float:
    """Milliseconds of the published network for one crop and its mirror image, on one core."""
    from utils.training import predict

    torch.set_num_threads(1)
    model, _ = load_weights(CHECKPOINT)
    return _median_ms(lambda row: predict(model, faces.pixels, [row], flip=True), 60)


def onnx_ms(settings, faces, steps: int) -> float:
    """The same by ONNX Runtime, of its export, with the correction by bands of age."""
    import onnxruntime

    from utils.predict import AgePredictor, export_onnx

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        export_onnx(AgePredictor(), path := Path(folder) / "age.onnx")
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    chips = faces.pixels[:60].transpose(0, 3, 1, 2)
    return _median_ms(lambda row: session.run(None, {"chips": chips[[row]]}), 60)


def _median_ms(act, times: int) -> float:
    found = []
    for number in range(times):
        start = time.perf_counter()
        act(number)
        found.append(time.perf_counter() - start)
    return 1000 * median(found[times // 6 :])


def measure(part: str, settings, steps: int) -> dict:
    """One part in a process of its own: its figure and the peak memory of all its processes."""
    command = [sys.executable, __file__, "--part", part, "--steps", str(steps)]
    command += ["--backbone", settings.backbone, "--size", str(settings.image_size)]
    command += ["--batch", str(settings.batch_size)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    tree, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        try:
            members = [tree, *tree.children(recursive=True)]
            peak = max(peak, sum(member.memory_full_info().uss for member in members))
        except psutil.Error:
            continue  # a process ended while it was looked at
        time.sleep(2)  # looking is not free
    lines = process.stdout.read().splitlines()
    for line in lines[:-1]:
        print(line)
    if process.returncode:
        raise SystemExit(f"{part} failed with status {process.returncode}")
    return {"figure": json.loads(lines[-1]), "megabytes": peak / 2**20}


def _machine() -> str:
    """What decides the speed: processor, threads, and bfloat16 instructions where it has them."""
    from utils.training import _precision

    precision = _precision(AgeRegressor("small", SIZE), torch.device("cpu"))
    bfloat16 = "with" if precision == torch.bfloat16 else "without"
    can = getattr(torch.cpu, "get_capabilities", dict)()  # which PyTorch 2.9 has not yet
    name = can.get("cpu_name") or torch.backends.cpu.get_cpu_capability()
    return f"{name}, {torch.get_num_threads()} threads, {bfloat16} bfloat16 instructions"


def publish(settings, **figures) -> None:
    """Add them to `benchmark` in results.json, where results are published."""
    path = settings.figures / "results.json"
    if settings.publish:
        there = json.loads(path.read_text()) if path.is_file() else {}
        evaluation.record(settings.figures, benchmark=there.get("benchmark", {}) | figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--to-goal", action="store_true", help="the minutes to the goal, only")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    given, own = parser.parse_args(), replace(get_settings("utkface"), pretrained=False)
    rival = replace(
        own, backbone=given.backbone, image_size=given.size, batch_size=given.batch
    )  # fmt: skip
    if given.part:
        print(json.dumps(globals()[given.part](rival, load_faces(own), given.steps)))
        return

    if given.to_goal:
        small = replace(own, image_size=SIZE)
        found = {part: measure(f"{part}_to_goal", small, 0)["figure"] for part in ("ours", "usual")}
        names = ("minutes", "epochs", "test_mae")
        found = {f"{name}_to_5_04": {p: figures[name] for p, figures in found.items()}
                 for name in names}  # fmt: skip
        print(json.dumps(found))
        publish(own, **found)
        return

    rounds = []
    for number in range(given.rounds):
        pair = {part: measure(part, rival, given.steps) for part in ("usual", "ours")}
        rounds.append(pair)
        texts = (f"{p} {got['figure']:.1f} images/s, {got['megabytes']:.0f} MB"
                 for p, got in pair.items())  # fmt: skip
        print(f"round {number + 1}: " + ", ".join(texts), flush=True)
    ratios = [pair["ours"]["figure"] / pair["usual"]["figure"] for pair in rounds]
    ratio = {"value": median(ratios), "low": min(ratios), "high": max(ratios), "n": len(ratios)}
    whole = measure("recipe", own, 16)
    speed = whole["figure"]
    step_ms = 1000 * own.batch_size / speed
    minutes = own.epochs * (load_faces(own).table["split"] == "train").sum() / speed / 60
    memory = {p: max(pair[p]["megabytes"] for pair in rounds) for p in ("usual", "ours")}
    memory["recipe"] = whole["megabytes"]
    result = {
        "gpu_ratio" if torch.cuda.is_available() else "cpu_ratio": ratio,
        "recipe_images_per_second": round(speed),
        "recipe_minutes": round(minutes),  # by that speed; validation comes on top
        "peak_memory_gb": {part: round(mb / 1024, 1) for part, mb in memory.items()},
        "augmentation_share": measure("augment_ms", own, 1)["figure"] / step_ms,
        "predict_ms_per_face": {
            part: round(measure(f"{name}_ms", own, 1)["figure"])
            for part, name in (("pytorch", "predict"), ("onnx", "onnx"))
        },
        "machine": _machine(),
    }
    print(json.dumps(result, indent=1))
    publish(own, **result)


if __name__ == "__main__":
    main()
