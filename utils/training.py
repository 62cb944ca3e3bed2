"""Training as one readable loop, its history, and the only prediction loop."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from utils.augment import STANDARD, augment, resize
from utils.faces import FOLDS, Faces, load_faces, split_digest
from utils.model import LOSSES, AgeRegressor, build_model, load_weights, save_weights
from utils.settings import CHECKPOINT, Settings, get_settings, locate, write_atomically

with suppress(OSError, AttributeError):  # glibc keeps freed memory, which the system would clear at
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # every step: on two cores 1.1
        ctypes.CDLL("libc.so.6").mallopt(option, value)  # times as fast to train, 2 to predict
COLUMNS = ["epoch", "train_mae", "valid_mae", "learning_rate", "seconds", "images_per_second"]


def train(
    faces: Faces,
    settings: Settings,
    run: Path,
    *,
    fold: int | None = None,
    net: AgeRegressor | None = None,
    loss: Callable[[torch.Tensor, torch.Tensor, np.ndarray], torch.Tensor] | None = None,
    augmentation: dict | None = None,
    sampling: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    progress: bool = True,
) -> AgeRegressor:
    """Train on the split "train", or on all faces outside `fold`, and return the network.
    `run` keeps history.csv (COLUMNS), a checkpoint until the end, then `model.safetensors`: the
    moving average of the weights after the last epoch. Called again, it loads a finished run and
    resumes an unfinished one after its last whole epoch, to the same weights. The MAE on faces held
    out (the split "valid" without a fold, or with the last one) is shown; nothing is chosen by it.
    `net` replaces `build_model`'s network, `loss(outputs [B, K], ages [B], rows [B])` the head's
    loss, one value a face, `augmentation` the strengths STANDARD. Arrays over the table: `sampling`
    draws training faces with replacement in these proportions, `weights` multiply their losses,
    `groups` (numbers) favour those that do worst (group DRO, Sagawa et al., 2020). Under torchrun
    each process takes its share of a batch. Raises ValueError where `run` holds another
    configuration, FloatingPointError for a loss that is not finite."""
    rank, world = (int(os.environ.get(*given)) for given in (("RANK", 0), ("WORLD_SIZE", 1)))
    known, held = faces.table["split"] == "train", faces.table["split"] == "valid"
    if fold is not None:
        known = faces.table["fold"] != fold
        held = held if fold == FOLDS - 1 else ~known
    train_rows, valid_rows = np.flatnonzero(known), np.flatnonzero(held)
    if not len(train_rows) or not len(valid_rows):
        raise ValueError("no face to train on, or none held out: look at the column split")
    strengths = STANDARD if augmentation is None else augmentation
    arrays = {"sampling": sampling, "weights": weights, "groups": groups}
    configuration = _configuration(faces, settings, fold, net, loss, strengths, arrays)
    run, final, checkpoint = Path(run), Path(run) / "model.safetensors", Path(run) / "last.ckpt"
    with _claimed(run, configuration, world):
        if final.is_file():
            model, facts = load_weights(final, net)
            _say(f"{run.name}: trained earlier, valid MAE {facts['valid_mae']:.2f} years; loaded")
            return model

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if world > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        ages = torch.from_numpy(faces.table["age"].to_numpy(np.float32))
        sampling, weights, groups = (a if a is None else torch.tensor(a) for a in arrays.values())
        size = min(settings.batch_size, len(train_rows)) // world
        steps = len(train_rows) // (size * world)
        if (model := net) is None:
            some = np.random.default_rng(settings.seed).choice(train_rows, 512)
            examples = resize(_gather(faces.pixels, some), settings.image_size)
            years = ages[train_rows].numpy()
            model = build_model(settings, float(years.mean()), float(years.std()) or 1.0, examples)
        model.to(device, memory_format=torch.channels_last)
        blocks = getattr(model.backbone, "features", torch.nn.Sequential())
        frozen = blocks[: settings.frozen if settings.pretrained else 0]
        frozen.requires_grad_(False)
        learnt = [value for value in model.parameters() if value.requires_grad]
        backbone = DistributedDataParallel(model.backbone) if world > 1 else model.backbone
        loss = loss or (lambda outputs, labels, rows: LOSSES[model.head](model, outputs, labels))
        rate, decay, total = settings.learning_rate, settings.weight_decay, steps * settings.epochs
        optimizer = torch.optim.AdamW(learnt, rate, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total)
        average = AveragedModel(model, multi_avg_fn=_average(total), use_buffers=True)
        precision = _precision(model, device)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        shares = None if groups is None else torch.ones(int(groups.max()) + 1, device=device)
        parts, log = [model, average, optimizer, schedule, scaler], []
        if checkpoint.is_file():
            states, log, shares = torch.load(checkpoint, map_location=device, weights_only=True)
            for part, state in zip(parts, states, strict=True):
                part.load_state_dict(state)
            _say(f"{run.name}: resumed after epoch {len(log)}")

        for epoch in range(len(log), settings.epochs):
            # Order, views and dropout follow from (seed, epoch): a resumed run is the same.
            start, error = time.perf_counter(), torch.zeros((), device=device)
            key = np.random.SeedSequence((settings.seed, epoch, rank))
            views, dropout = key.generate_state(2).tolist()
            generator = torch.Generator().manual_seed(views)
            torch.manual_seed(dropout)
            order, count = torch.Generator().manual_seed(settings.seed + epoch), len(train_rows)
            if sampling is None:
                places = torch.randperm(count, generator=order)
            else:
                share = sampling[train_rows].double()
                places = torch.multinomial(share, count, True, generator=order)
            rows_of_epoch = train_rows[places[rank : steps * size * world : world]]
            bar = batches(faces.pixels, rows_of_epoch, size)
            bar = tqdm(bar, f"epoch {epoch + 1}", steps, False, disable=not progress or rank > 0)
            model.train()
            frozen.eval()
            for step, (chips, rows) in enumerate(bar, 1):
                images = augment(chips.to(device), model.image_size, generator, **strengths)
                labels = ages[rows].to(device)
                with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                    outputs = backbone(model.normalised(images)).float()
                losses = loss(outputs, labels, rows)
                if weights is not None:
                    losses = losses * weights[rows].to(losses)
                mean = losses.mean()
                if groups is not None:  # each group's mean loss by its share, which follows it
                    of_face = groups[rows].to(device)
                    sums = torch.zeros_like(shares).index_add(0, of_face, losses)
                    means = sums / torch.bincount(of_face, minlength=len(shares)).clamp(min=1)
                    shares = (shares.log() + 0.001 * means.detach()).softmax(0)
                    mean = (shares * means).sum()
                if not mean.isfinite():
                    place = f"epoch {epoch + 1}, step {step}: try a tenth of the learning rate"
                    raise FloatingPointError(f"the loss is {mean.item()} in {place}")
                optimizer.zero_grad()
                scaler.scale(mean).backward()
                scaler.step(optimizer)
                scaler.update()
                schedule.step()
                average.update_parameters(model)
                error += (model.ages(outputs.detach()) - labels).abs().sum()
            train_mae, trained = error.item() / (steps * size), time.perf_counter() - start
            if rank > 0:
                continue
            found = predict(average.module, faces.pixels, valid_rows)
            valid_mae = float(np.abs(found - ages[valid_rows].numpy()).mean())
            seconds, speed = time.perf_counter() - start, steps * size * world / trained
            row = epoch + 1, train_mae, valid_mae, schedule.get_last_lr()[0], seconds, speed
            log.append(dict(zip(COLUMNS, row, strict=True)))
            write_atomically(run / "history.csv", partial(pd.DataFrame(log).to_csv, index=False))
            kept = [part.state_dict() for part in parts], log, shares
            write_atomically(checkpoint, partial(torch.save, kept))
            errors = f"train MAE {train_mae:.2f}, valid MAE {valid_mae:.2f} years"
            _say(f"{run.name}: epoch {epoch + 1}/{settings.epochs}: {errors}, {seconds:.0f} s")

        if rank == 0:
            table, cpu = pd.DataFrame(log), f"CPU, {torch.get_num_threads()} thread(s)"
            save_weights(
                average.module, final,
                split_digest=split_digest(faces.table), training=configuration, epochs=len(log),
                valid_mae=log[-1]["valid_mae"], seconds=round(table["seconds"].sum(), 1),
                images_per_second=round(table["images_per_second"].median(), 1),
                device=torch.cuda.get_device_name() if device.type == "cuda" else cpu,
                processes=world, precision=str(precision).removeprefix("torch."),
            )  # fmt: skip
            checkpoint.unlink()
        if world > 1:
            distributed.barrier()
        return load_weights(final, net)[0]


def batches(pixels: np.ndarray, rows: np.ndarray, size: int) -> Iterator[tuple]:
    """Whole batches: chips uint8 [size, 3, H, W] and their rows, gathered in the background."""
    parts = iter(rows[: len(rows) // size * size].reshape(-1, size))
    with ThreadPoolExecutor(1) as pool:
        gathered = pool.submit(_gather, pixels, part := next(parts))
        for following in parts:
            chips, gathered = gathered.result(), pool.submit(_gather, pixels, following)
            yield chips, part
            part = following
        yield gathered.result(), part


def _gather(pixels: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pixels[rows])).permute(0, 3, 1, 2)


def _average(steps: int) -> Callable:
    """Exponential moving average over about a tenth of all `steps`, shorter at the start."""

    @torch.no_grad()
    def update(averages: list, currents: list, count: torch.Tensor) -> None:
        decay = min(1 - 1 / max(1.0, steps / 10), (1 + int(count)) / (10 + int(count)))
        for mean, now in zip(averages, currents, strict=True):  # or batch norm's step counter
            mean.lerp_(now, 1 - decay) if mean.is_floating_point() else mean.copy_(now)

    return update


def _precision(model: AgeRegressor, device: torch.device) -> torch.dtype:
    if device.type == "cuda":  # which has bfloat16 since compute capability 8
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    can = getattr(torch.cpu, "get_capabilities", dict)()  # which PyTorch 2.9 has not yet
    groups = (getattr(m, "groups", 1) for m in model.modules())
    # Depthwise convolutions wait for memory: on a CPU bfloat16 slows most such networks down.
    gains = model.backbone_name == "face_mobilenet" or max(groups) == 1
    fast = can.get("avx512_bf16") or can.get("amx_bf16")
    return torch.bfloat16 if fast and gains else torch.float32


def _configuration(faces, settings, fold, net, loss, strengths, arrays) -> dict:
    """All that decides the weights, short enough to compare and to read."""
    names = """backbone head image_size epochs batch_size learning_rate weight_decay seed pretrained
    frozen"""
    rows = faces.table[["file", "age", "split", "sha256"]].to_csv(index=False)
    contents = {name: array.tobytes() for name, array in arrays.items() if array is not None}
    contents["faces"] = rows.encode()
    file = locate(os.environ.get("AGE_BACKBONE_WEIGHTS") or "none")
    if net is not None:
        tensors = (value.cpu().numpy().tobytes() for value in net.state_dict().values())
        contents["net"] = repr(net).encode() + b"".join(tensors)
    elif settings.pretrained and file.is_file():
        contents["start"] = file.read_bytes()
    if loss is not None:
        contents["loss"] = inspect.getsource(loss).encode()
    chosen = {name: getattr(settings, name) for name in names.split()}
    chosen |= {key: hashlib.sha256(value).hexdigest()[:12] for key, value in contents.items()}
    return chosen | {"fold": fold, "augmentation": strengths}


@contextmanager
def _claimed(run: Path, configuration: dict, world: int) -> Iterator[None]:
    """The run's folder, for one training of this configuration at a time; another waits."""
    lock, random_state = FileLock(run.with_name(f".{run.name}.lock")), torch.get_rng_state()
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=2)
    except Timeout:
        _say(f"{run.name}: another process is training it; waiting for its end ...")
        lock.acquire()
    except OSError as error:
        raise OSError(f"{run} cannot be made ({error}): set AGE_DATA to another folder") from error
    try:
        if not (path := run / "configuration.json").is_file():
            write_atomically(path, lambda file: file.write_text(json.dumps(configuration)))
        if world > 1:  # the processes of one training share the folder
            lock.release()
        there, now = json.loads(path.read_text()), json.loads(json.dumps(configuration))
        differ = [f"{key} {there.get(key)} there, {now.get(key)} now" for key in there | now
                  if there.get(key) != now.get(key)]  # fmt: skip
        if differ:
            advice = "delete that folder, train into another one, or go back to its settings"
            raise ValueError(f"{run} holds a run of another configuration ({differ}): {advice}")
        yield
    except torch.cuda.OutOfMemoryError as error:
        advice = f"try batch_size={configuration['batch_size'] // 2} in a new run folder"
        raise torch.cuda.OutOfMemoryError(f"{error}. On this GPU, {advice}") from None
    finally:
        torch.set_rng_state(random_state)
        lock.release()


def _say(text: str) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def trained_model(faces: Faces, settings: Settings, progress: bool = True) -> AgeRegressor:
    """Your own run of notebook 4, else the published weights for UTKFace, else a training now.
    Raises ValueError where the weights know another split."""
    run = settings.runs / "cnn_regression"
    if run.is_dir() or settings.faces != "utkface" or not CHECKPOINT.is_file():
        return train(faces, settings, run, progress=progress)
    model, facts = load_weights(CHECKPOINT)
    if facts["split_digest"] != split_digest(faces.table):
        known = "was trained on another split and may know your test faces: train your own model"
        raise ValueError(f"{CHECKPOINT.name} {known}")
    _say(f"published weights, valid MAE {facts['valid_mae']:.2f} years; loaded")
    return model


def predict(model: AgeRegressor, pixels: np.ndarray, rows: np.ndarray, batch_size: int = 64, *,
            flip: bool = False, progress: bool = False,
            corrupt: Callable[[torch.Tensor], torch.Tensor] | None = None,
            read: Callable[[torch.Tensor], torch.Tensor] | None = None) -> np.ndarray:  # fmt: skip
    """Ages in years, float32 [len(rows)], of `pixels[rows]` (uint8 RGB [N, H, W, 3]).
    `flip` averages each face with its mirror image; `corrupt` changes the uint8 chips [B, 3, H, W],
    as utils.augment.corruption does; `read` turns the model's outputs into something else than
    ages: `model.ages_and_spreads` gives [len(rows), 2]. Raises TypeError for a mask."""
    rows, read = np.asarray(rows), read or model.ages
    if rows.dtype == bool:
        raise TypeError("rows is a mask of booleans: give row numbers (numpy.flatnonzero)")
    rows = rows.astype(np.int64)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, answers = model.to(device, memory_format=torch.channels_last).eval(), []
    with torch.inference_mode():
        for start in tqdm(range(0, max(len(rows), 1), batch_size), "predict", disable=not progress):
            chips = _gather(pixels, rows[start : start + batch_size]).to(device)
            images = resize(corrupt(chips) if corrupt else chips, model.image_size)
            views = torch.cat([images, images.flip(3)]) if flip else images
            answer = read(model.outputs(views)).unflatten(0, (1 + flip, len(images))).mean(0)
            answers.append(answer.cpu().numpy())
    return np.concatenate(answers)


def main() -> None:
    """Train from the command line; `torchrun --nproc_per_node 2 -m utils.training` on two GPUs."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--name", default="cnn_regression", help="of the run's folder")
    parser.add_argument("--fold", type=int, choices=range(FOLDS), help="the fold to hold out")
    given, settings = parser.parse_args(), get_settings()
    train(load_faces(settings), settings, settings.runs / given.name, fold=given.fold)


if __name__ == "__main__":
    main()
