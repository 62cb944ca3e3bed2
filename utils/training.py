"""Training with Lightning (one CPU, one GPU, several processes), its history, and prediction."""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchmetrics import MeanAbsoluteError
from tqdm.auto import tqdm

from utils.augment import STANDARD, augment, resize
from utils.faces import Faces, split_digest
from utils.losses import LOSSES, Loss
from utils.model import AgeRegressor, build_model, load_weights, save_weights, write_atomically
from utils.settings import CHECKPOINT, Settings, get_settings, locate

GROUP_RATE = 0.001  # how fast the shares of groups follow their losses (in years)
CHECK_EVERY = 20  # steps between looks at the loss: each look makes a GPU wait
COLUMNS = ["epoch", "train_mae", "valid_mae", "learning_rate", "seconds", "images_per_second"]
NOISE = (  # understood: each is on purpose, or Lightning's own affair
    ".*does not have many workers",
    ".*exists and is not empty",
    ".*overridden `on_after_batch_transfer`",
    ".*LeafSpec",
)


class FaceRows(Dataset):
    """Rows of the pixel array with their ages; a whole batch is gathered in one go."""

    def __init__(self, pixels: np.ndarray, ages: np.ndarray, rows: np.ndarray, real: np.ndarray):
        self.pixels, self.ages, self.rows, self.real = pixels, ages, rows, real

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, places: list[int]) -> tuple[torch.Tensor, ...]:
        rows = self.rows[places]
        ages, real = torch.from_numpy(self.ages[rows]), torch.from_numpy(self.real[places])
        return _gather(self.pixels, rows), ages, real, torch.from_numpy(rows)


def _gather(pixels: np.ndarray, rows: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pixels[rows])).permute(0, 3, 1, 2)


class WeightedSampler(DistributedSampler):
    """An epoch of draws with replacement, each place as often as its weight says."""

    def __init__(self, weights: np.ndarray, *arguments, **options) -> None:
        super().__init__(weights, *arguments, **options)
        self.weights = torch.from_numpy(np.asarray(weights, np.float64))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.multinomial(self.weights, self.total_size, True, generator=generator)
        return iter(drawn[self.rank :: self.num_replicas].tolist())


class FaceBatches(L.LightningDataModule):
    """Batches of each process. The global batch is the same for any number of processes."""

    def __init__(
        self,
        faces: Faces,
        batch_size: int,
        seed: int,
        workers: int,
        sampling: np.ndarray | None = None,
    ) -> None:
        super().__init__()
        self.pixels, self.seed, self.workers = faces.pixels, seed, workers
        self.sampling, self.digest = sampling, split_digest(faces.table)
        self.ages = faces.table["age"].to_numpy(np.float32)
        self.rows = {
            part: np.flatnonzero(faces.table["split"] == part) for part in ("train", "valid")
        }
        for part, rows in self.rows.items():
            if len(rows) == 0:
                raise ValueError(f"no face has split {part!r}: training needs 'train' and 'valid'")
        self.batch_size = min(batch_size, len(self.rows["train"]))
        self.parts = 1  # of a batch, one after the other, their gradients added up

    def halve(self) -> bool:
        """Make each part half as large, where one process trains; False where that cannot be."""
        size, odd = divmod(self.batch_size // self.parts, 2)
        if odd or self.trainer.world_size > 1:
            return False
        self.parts *= 2
        _say(
            f"The GPU's memory is too small for {2 * size} faces at once. Going on from the last "
            f"whole epoch with {size} at once; {self.parts} of these make a step, as large as ever"
        )
        return True

    def _loader(self, rows: np.ndarray, real: np.ndarray, **options) -> DataLoader:
        return DataLoader(
            FaceRows(self.pixels, self.ages, rows, real),
            max(1, self.batch_size // self.trainer.world_size // self.parts),
            collate_fn=tuple,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # leaves the random numbers of dropout alone
            **options,
        )

    def train_dataloader(self) -> DataLoader:
        rows = self.rows["train"]
        kind = DistributedSampler if self.sampling is None else WeightedSampler
        sampler = kind(
            rows if self.sampling is None else self.sampling[rows],
            self.trainer.world_size,
            self.trainer.global_rank,
            seed=self.seed,
            drop_last=True,
        )
        # Loader processes fetch ahead, before Lightning tells the sampler which epoch it resumes.
        sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)
        return self._loader(rows, np.ones(len(rows), bool), sampler=sampler, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        rows, world = self.rows["valid"], self.trainer.world_size
        # All processes need as many batches; the padding is marked and not counted.
        places = np.arange(math.ceil(len(rows) / world) * world)[self.trainer.global_rank :: world]
        return self._loader(rows[places % len(rows)], places < len(rows))


class AgeTask(L.LightningModule):
    """Loss in years, AdamW with a one-cycle learning rate, augmentation on the device."""

    def __init__(
        self,
        model: AgeRegressor,
        settings: Settings,
        steps: int,
        strengths: dict,
        weights: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        loss: Loss | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss or LOSSES[model.head]
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)
        self.groups = None if groups is None else torch.tensor(groups)
        if groups is not None:  # how much each group counts: changes as training goes on
            count = int(groups.max()) + 1
            self.register_buffer("shares", torch.full((count,), 1 / count))
        self.model, self.settings, self.steps, self.strengths = model, settings, steps, strengths
        self.train_mae, self.valid_mae = MeanAbsoluteError(), MeanAbsoluteError()
        self._recent: list[tuple[torch.Tensor, float]] = []

    def configure_optimizers(self) -> dict:
        # Lightning's estimated_stepping_batches would start the loader before a resume is known.
        rate = self.settings.learning_rate
        optimizer = torch.optim.AdamW(self.parameters(), rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Seed by (seed, epoch, process), so that a resumed epoch sees the same views."""
        key = (self.settings.seed, self.current_epoch, self.global_rank)
        views, dropout = np.random.SeedSequence(key).generate_state(2)
        self._generator = torch.Generator().manual_seed(int(views))
        torch.manual_seed(int(dropout))

    def on_after_batch_transfer(self, batch: tuple, dataloader_idx: int) -> tuple:
        """Pixels to views, outside autocast: bfloat16 would blur the colours."""
        pixels, *rest = batch
        size = self.model.image_size
        if self.trainer.training:
            return augment(pixels, size, self._generator, **self.strengths), *rest
        return resize(pixels, size), *rest

    def training_step(self, batch: tuple, step: int) -> torch.Tensor:
        images, ages, _, rows = batch
        outputs = self.model.outputs(images)
        predicted = self.model.ages(outputs)
        losses = self.loss(self.model, outputs, ages)
        if self.weights is not None:
            losses = losses * self.weights[rows.cpu()].to(losses)
        if self.groups is None:
            loss = losses.mean()
        else:
            loss = self._worst_groups(losses, self.groups[rows.cpu()].to(losses.device))
        self._recent.append((loss.detach(), self.optimizers().param_groups[0]["lr"]))
        if len(self._recent) == CHECK_EVERY or self.trainer.is_last_batch:
            self._check_finite(step)
        self.train_mae.update(predicted.detach(), ages)
        self.log(
            "train_mae", self.train_mae, on_step=False, on_epoch=True, prog_bar=True, logger=False
        )
        return loss

    def _worst_groups(self, losses: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
        """Loss that leans to the groups with the largest losses (Sagawa et al., ICLR 2020)."""
        count = len(self.shares)
        sums = torch.zeros(count, device=losses.device).index_add(0, groups, losses)
        means = sums / torch.bincount(groups, minlength=count).clamp(min=1)
        self.shares = self.shares * (GROUP_RATE * means.detach()).exp()
        self.shares = self.shares / self.shares.sum()
        return (self.shares * means).sum()

    def _check_finite(self, step: int) -> None:
        finite = torch.stack([loss for loss, _ in self._recent]).isfinite().tolist()
        if not self.trainer.strategy.reduce_boolean_decision(all(finite), all=True):
            first = finite.index(False) if False in finite else len(finite) - 1
            loss, rate = self._recent[first]
            raise FloatingPointError(
                f"The loss is {loss.item()} in epoch {self.current_epoch + 1}, step "
                f"{step + 2 + first - len(finite)}, learning rate {rate:.1e}. Try a tenth of the "
                "learning rate, in a new run folder; if it stays, look for broken ages or pixels."
            )
        self._recent.clear()

    def validation_step(self, batch: tuple, step: int) -> None:
        images, ages, real, _ = batch
        with torch.autocast(self.device.type, enabled=False):  # as `predict` does
            predicted = self.model(images)
        self.valid_mae.update(predicted[real], ages[real])
        self.log("valid_mae", self.valid_mae, prog_bar=True, logger=False)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["origin"] = self.model.origin

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.model.origin = checkpoint["origin"]


class EpochLog(L.Callback):
    """One row an epoch to the logs, before the checkpoint is written; one line to the reader."""

    def __init__(self, show: bool) -> None:
        self.show = show

    def on_train_epoch_start(self, trainer: L.Trainer, task: AgeTask) -> None:
        self.start = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, task: AgeTask) -> None:
        self.trained = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, task: AgeTask) -> None:
        row = {key: trainer.callback_metrics[key].item() for key in ("train_mae", "valid_mae")}
        row["epoch"] = trainer.current_epoch + 1
        row["learning_rate"] = task.lr_schedulers().get_last_lr()[0]
        row["seconds"] = time.perf_counter() - self.start
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        faces = batches * trainer.datamodule.batch_size
        row["images_per_second"] = faces / (self.trained - self.start)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=row["epoch"])
            logger.save()
        if self.show:
            _say(
                f"epoch {row['epoch']}/{trainer.max_epochs}: train MAE {row['train_mae']:.2f}, "
                f"valid MAE {row['valid_mae']:.2f} years, {row['seconds']:.0f} s, "
                f"{row['images_per_second']:.0f} images/s"
            )


class Stopping(EarlyStopping):
    """Early stopping that stays stopped when its checkpoint is resumed."""

    def on_train_start(self, trainer: L.Trainer, task: AgeTask) -> None:
        trainer.should_stop = trainer.should_stop or self.stopped_epoch > 0


class Checkpoint(ModelCheckpoint):
    """One file, written over at an epoch's end, which stays its own when the folder is moved."""

    def __init__(self, run: Path, name: str, monitor: str | None = None) -> None:
        super().__init__(
            run, name, monitor, save_on_train_epoch_end=True, enable_version_counter=False
        )

    def load_state_dict(self, state: dict) -> None:
        file, score = str(Path(self.dirpath) / f"{self.filename}.ckpt"), state["best_model_score"]
        here = dict(dirpath=self.dirpath, best_model_path=file, kth_best_model_path=file)
        best = {} if score is None else {file: score}
        super().load_state_dict(state | here | {"best_k_models": best})


class AtomicIO(TorchCheckpointIO):
    """A kill at any moment leaves the former checkpoint or the new one, never half a file."""

    def load_checkpoint(self, path: str, *arguments, **options) -> dict:
        try:
            return super().load_checkpoint(path, *arguments, **options)
        except Exception as error:  # torch.load raises many kinds; all mean the same to the reader
            raise ValueError(
                f"{path} is damaged or no checkpoint ({str(error).splitlines()[0]}): delete it, "
                "and the training starts anew"
            ) from error

    def save_checkpoint(self, checkpoint: dict, path: str, storage_options: object = None) -> None:
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


def _average(steps: int) -> WeightAveraging:
    """Exponential moving average over about a tenth of all `steps`, shorter at the start."""
    longest = 1 - 1 / max(1.0, steps / 10)

    @torch.no_grad()
    def update(averages: list, currents: list, count: torch.Tensor) -> None:
        decay = min(longest, (1 + int(count)) / (10 + int(count)))
        if averages[0].is_floating_point():
            torch._foreach_lerp_(averages, currents, 1 - decay)
        else:
            torch._foreach_copy_(averages, currents)  # batch norm's step counter

    return WeightAveraging(multi_avg_fn=update)


def train(
    faces: Faces,
    settings: Settings,
    run: Path,
    *,
    epochs: int | None = None,
    patience: int | None = None,
    progress: bool = True,
    devices: int | None = None,
    num_nodes: int | None = None,
    precision: str | None = None,
    workers: int = 0,
    augmentation: dict | None = None,
    sampling: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    loss: Loss | None = None,
) -> AgeRegressor:
    """Train on the rows with split "train", choose by the MAE on "valid"; "test" is never read.

    `run` keeps the logs (CSV and TensorBoard), checkpoints until the end, and then
    `model.safetensors`: the moving-average weights of the best epoch. Called again, it loads a
    finished run and resumes an unfinished one from its last epoch, in the same order.
    `epochs` overrides the settings; `patience` stops after so many epochs without a better
    valid MAE; `progress` shows a bar instead of a line an epoch; `augmentation` holds strengths
    of utils.augment.augment, by default STANDARD; `loss` replaces that of the model's head
    (utils.losses.LOSSES). Precision is bfloat16 where processor and
    backbone are made for it.

    Against imbalance, each an array over all rows of the table: `sampling` draws training faces
    with replacement in these proportions, `weights` multiply their losses, and `groups` (whole
    numbers from 0) let the loss lean to the groups that do worst.

    One process by default, on the GPU if there is one. Under torchrun every process takes its
    share of `settings.batch_size`, the global batch; `run` has to lie on a shared disk.

    Raises ValueError where `run` holds another configuration, and FloatingPointError where the
    loss is not finite.
    """
    settings = replace(settings, epochs=epochs or settings.epochs)
    run = Path(run)
    strengths = STANDARD if augmentation is None else augmentation
    devices, num_nodes = _processes(devices, num_nodes)
    if settings.batch_size % (devices * num_nodes):
        raise ValueError(
            f"batch_size {settings.batch_size} does not divide by {devices * num_nodes} processes"
        )
    balance = {"sampling": sampling, "weights": weights, "groups": groups}
    configuration = _configuration(faces, settings, patience, strengths, balance)
    if loss is not None:
        configuration["loss"] = loss.__name__
    with _alone(run, devices * num_nodes):
        _claim(run, configuration)
        if (run / "model.safetensors").is_file():
            model, kept = load_weights(run / "model.safetensors")
            _say(
                f"{run.name}: trained earlier, {kept['epochs']} epochs from {kept['origin']} "
                f"weights, valid MAE {kept['valid_mae']:.2f} years; loaded"
            )
            return model
        batches = FaceBatches(faces, settings.batch_size, settings.seed, workers, sampling)
        hardware = dict(devices=devices, num_nodes=num_nodes, precision=precision)
        task = partial(AgeTask, strengths=strengths, weights=weights, groups=groups, loss=loss)
        while True:
            try:
                return _fit(
                    batches, task, settings, run, configuration, patience, progress, hardware
                )
            except torch.cuda.OutOfMemoryError as error:
                if not batches.halve():
                    raise torch.cuda.OutOfMemoryError(
                        f"{error}. Batches cannot be made smaller: close what else uses the GPU "
                        "(other notebooks), or choose a smaller image_size or backbone"
                    ) from None
            # Outside of the except block, whose traceback would hold the tensors.
            torch.cuda.empty_cache()


def _fit(
    batches: FaceBatches,
    make_task: Callable[..., AgeTask],
    settings: Settings,
    run: Path,
    configuration: dict,
    patience: int | None,
    progress: bool,
    hardware: dict,
) -> AgeRegressor:
    """The training that `train` describes, in a folder that nobody else writes to."""
    final, last = run / "model.safetensors", run / "last.ckpt"
    ages = batches.ages[batches.rows["train"]]
    fresh = replace(settings, pretrained=settings.pretrained and not last.is_file())
    model = build_model(fresh, float(ages.mean()), float(ages.std()) or 1.0)
    steps = len(ages) // batches.batch_size * settings.epochs
    task = make_task(model.to(memory_format=torch.channels_last), settings, steps)
    if last.is_file():
        _say(f"{run.name}: resumed after its last whole epoch")
    _keep_memory()
    version = len(list((run / "logs").glob("version_*")))
    callbacks = [
        _average(steps),
        EpochLog(show=not progress),
        Stopping("valid_mae", patience=patience or settings.epochs),
        Checkpoint(run, "best", "valid_mae"),
        Checkpoint(run, "last"),  # after the best, which it must not outrun
    ]
    interrupt = signal.getsignal(signal.SIGINT)
    with _quiet(), torch.random.fork_rng(devices=[]):
        trainer = L.Trainer(
            accelerator="gpu" if torch.cuda.is_available() else "cpu",
            devices=hardware["devices"],
            num_nodes=hardware["num_nodes"],
            strategy="ddp" if hardware["devices"] * hardware["num_nodes"] > 1 else "auto",
            precision=hardware["precision"] or _precision(model),
            max_epochs=settings.epochs,
            accumulate_grad_batches=batches.parts,
            limit_train_batches=len(ages) // batches.batch_size * batches.parts,  # whole steps
            callbacks=callbacks,
            logger=[logger(run, "logs", version) for logger in (CSVLogger, TensorBoardLogger)],
            plugins=[AtomicIO()],
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            benchmark=torch.cuda.is_available(),
            enable_model_summary=False,
            enable_progress_bar=progress,
            default_root_dir=run,
        )
        try:
            resumed = last if last.is_file() else None
            trainer.fit(task, datamodule=batches, ckpt_path=resumed, weights_only=True)
        except SystemExit as error:
            if not isinstance(error.__context__, KeyboardInterrupt):
                raise
            # Lightning leaves Ctrl-C ignored and ends the process: a notebook goes on.
            signal.signal(signal.SIGINT, interrupt)
            raise KeyboardInterrupt("training stopped; call it again to resume") from None
    if trainer.is_global_zero:
        _export(run, trainer, task.model, configuration, batches.digest)
    trainer.strategy.barrier()
    return load_weights(final)[0]


def _keep_memory() -> None:
    """Let glibc keep freed memory: the system would have to clear the same pages at every step.

    A fifth faster on a CPU. Elsewhere than on glibc this does nothing (mallopt(3)).
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):
            mallopt(option, value)  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


def _processes(devices: int | None, num_nodes: int | None) -> tuple[int, int]:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return devices or 1, num_nodes or 1
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return local, int(os.environ["WORLD_SIZE"]) // local


def _precision(model: AgeRegressor) -> str:
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.get_device_capability() >= (8, 0) else "16-mixed"
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = any(getattr(torch.cpu, name, bool)() for name in checks)
    # Depthwise convolutions (MobileNet, EfficientNet) wait for memory: bfloat16 slows them down.
    fast = fast and all(getattr(layer, "groups", 1) == 1 for layer in model.modules())
    return "bf16-mixed" if fast else "32-true"


def _configuration(
    faces: Faces,
    settings: Settings,
    patience: int | None,
    strengths: dict,
    balance: dict,
) -> dict:
    """All that decides the weights, short enough to compare and to read."""
    names = ("backbone", "head", "image_size", "epochs", "batch_size", "learning_rate", "seed")
    start, file = "random", os.environ.get("AGE_BACKBONE_WEIGHTS")
    if settings.pretrained:
        start = "torchvision"
        if file and locate(file).is_file():
            start = hashlib.sha256(locate(file).read_bytes()).hexdigest()[:12]
            start += " " + os.environ.get("AGE_BACKBONE_MEAN_STD", "")
    balance = {
        name: hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:12]
        for name, array in balance.items()
        if array is not None
    }
    rows = faces.table[["file", "age", "split", "sha256"]].to_csv(index=False)
    return {name: getattr(settings, name) for name in names} | {
        "start": start.strip(),
        "patience": patience,
        "augmentation": strengths,
        "faces": hashlib.sha256(rows.encode()).hexdigest()[:12],
        **balance,
    }


def _claim(run: Path, configuration: dict) -> None:
    """Make the run's folder, or make sure that it holds the same configuration."""
    path = run / "configuration.json"
    if not path.is_file():
        if rank_zero_only.rank == 0:
            run.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: file.write_text(json.dumps(configuration)))
        return
    there = json.loads(path.read_text())
    differences = [
        f"{key} {there.get(key)} there, {configuration.get(key)} now"
        for key in there | configuration
        if there.get(key) != configuration.get(key)
    ]
    if differences:
        raise ValueError(
            f"{run} holds a run of another configuration ({'; '.join(differences)}): delete that "
            "folder, train into another one, or go back to its settings"
        )


def _export(
    run: Path,
    trainer: L.Trainer,
    model: AgeRegressor,
    configuration: dict,
    split: str,
) -> None:
    best = torch.load(run / "best.ckpt", map_location="cpu", weights_only=True)
    state = {
        key.removeprefix("model."): value
        for key, value in best["state_dict"].items()
        if key.startswith("model.")
    }
    model.load_state_dict(state)
    log = history(run).set_index("epoch")
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
    save_weights(
        model,
        run / "model.safetensors",
        split_digest=split,
        training=configuration,
        epochs=len(log),
        best_epoch=best["epoch"] + 1,
        valid_mae=float(log["valid_mae"][best["epoch"] + 1]),
        seconds=round(float(log["seconds"].sum()), 1),
        images_per_second=round(float(log["images_per_second"].median()), 1),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        processes=trainer.world_size,
        precision=trainer.precision,
    )
    for name in ("best.ckpt", "last.ckpt"):
        (run / name).unlink()
    if len(log) < trainer.max_epochs:
        _say(f"stopped early: no better valid MAE after epoch {best['epoch'] + 1}")


@contextmanager
def _alone(run: Path, processes: int) -> Iterator[None]:
    """Another notebook that trains the same run is waited for. Processes of one run share it."""
    lock = FileLock(run.with_name(f".{run.name}.lock"))
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        if processes == 1:
            lock.acquire(timeout=1)
    except Timeout:
        _say(f"{run.name}: another process is training it; waiting for its end ...")
        lock.acquire()
    except OSError as error:
        raise OSError(
            f"{run} cannot be written ({error.strerror or error}): set AGE_DATA to a folder that "
            "you may write to"
        ) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's tips and the warnings that are understood out of the reader's way."""
    logs = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [log.level for log in logs]
    try:
        for log in logs:
            log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for message in NOISE:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


_say = rank_zero_only(partial(print, flush=True))


def trained_model(faces: Faces, settings: Settings, progress: bool = True) -> AgeRegressor:
    """The network of notebook 4: your own run of it, else the published weights if the faces are
    UTKFace's, else a training now."""
    run = settings.runs / "cnn_regression"
    if settings.faces == "utkface" and CHECKPOINT.is_file():
        if not (run / "configuration.json").is_file():
            model, facts = load_weights(CHECKPOINT)
            if facts["split_digest"] != split_digest(faces.table):
                raise ValueError(
                    f"{CHECKPOINT.name} was trained on another split of UTKFace and may know "
                    "your test faces: train your own model in notebook 4"
                )
            _say(f"published weights, valid MAE {facts['valid_mae']:.2f} years; loaded")
            return model
    return train(faces, settings, run, progress=progress)


def history(run: Path) -> pd.DataFrame:
    """One row an epoch: epoch (from 1), train_mae, valid_mae (years), learning_rate at its end,
    seconds, images_per_second. train_mae is of the changing weights on augmented faces, so it
    is no test of the model; valid_mae is of the moving-average weights.

    Raises FileNotFoundError where `run` has no log.
    """
    files = list((Path(run) / "logs").glob("version_*/metrics.csv"))
    if not files:
        raise FileNotFoundError(f"{run} has no training log: train into it first")
    files.sort(key=lambda file: int(file.parent.name.split("_")[1]))
    log = pd.concat([pd.read_csv(file) for file in files])
    log = log.drop_duplicates("epoch", keep="last").sort_values("epoch", ignore_index=True)
    return log[COLUMNS]


def predict(
    model: AgeRegressor,
    pixels: np.ndarray,
    rows: np.ndarray,
    batch_size: int = 256,
    flip: bool = False,
    progress: bool = False,
    spoil: Callable[[torch.Tensor], torch.Tensor] | None = None,
    read: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> np.ndarray:
    """Ages in years, float32 [len(rows)], of `pixels[rows]` (uint8 RGB [N, H, W, 3]).

    Streams batch by batch in float32, on the GPU if there is one. `flip` averages each face with
    its mirror image; `spoil` changes the uint8 chips [B, 3, H, W] before they are resized, as
    utils.corruptions does. `read` turns the model's outputs into something else than ages: with
    `model.ages_and_spreads` the answer is [len(rows), 2]. Raises TypeError for a mask: give row
    numbers.
    """
    rows = np.asarray(rows)
    if rows.dtype == bool:
        raise TypeError("rows is a mask of booleans: give row numbers (numpy.flatnonzero)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device, memory_format=torch.channels_last).eval()
    read = read or model.ages
    answers = [np.empty(0, np.float32)] if len(rows) == 0 else []
    with torch.inference_mode():
        for start in tqdm(range(0, len(rows), batch_size), "predict", disable=not progress):
            part = slice(start, start + batch_size)
            chips = _gather(pixels, rows[part]).to(device)
            images = resize(spoil(chips) if spoil else chips, model.image_size)
            answer = read(model.outputs(images))
            if flip:
                answer = (answer + read(model.outputs(images.flip(3)))) / 2
            answers.append(answer.cpu().numpy())
    return np.concatenate(answers)


def main(arguments: list[str] | None = None) -> None:
    """`python -m utils.training`; `torchrun --nproc_per_node 2 -m utils.training` for two GPUs."""
    from utils.sources import load_faces

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--name", default="cnn_regression", help="of the run's folder")
    parser.add_argument("--epochs", type=int, help="instead of the settings' number")
    parser.add_argument("--patience", type=int, help="stop after so many epochs without gain")
    parser.add_argument("--devices", type=int, help="processes on this machine, without torchrun")
    parser.add_argument("--no-bar", action="store_true", help="a line an epoch instead of a bar")
    given = parser.parse_args(arguments)
    settings = get_settings()
    _say(settings)
    train(
        load_faces(settings),
        settings,
        settings.runs / given.name,
        epochs=given.epochs,
        patience=given.patience,
        progress=not given.no_bar,
        devices=given.devices,
    )
    _say(f"weights: {settings.runs / given.name / 'model.safetensors'}")


if __name__ == "__main__":
    main()
