"""Training on drawn pixels: what is read, kept, resumed, refused, and what comes out."""

import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DistributedSampler
from torchvision.models import get_model

import utils.model
import utils.sources
import utils.training
from utils.faces import Faces, split_digest
from utils.model import load_weights
from utils.settings import get_settings
from utils.training import (
    AgeTask,
    WeightedSampler,
    history,
    predict,
    train,
    trained_model,
)

# A small net with dropout, and one with batch norm, whose buffers need as much care.
SETTINGS = replace(
    get_settings("sample"), backbone="squeezenet1_1", image_size=32, batch_size=8,
    epochs=3, learning_rate=1e-3, head="regression",
)  # fmt: skip
BATCH_NORM = replace(SETTINGS, backbone="shufflenet_v2_x0_5", learning_rate=3e-3)
SPLITS = ["train"] * 7 + ["valid"] + ["test"] + ["valid"]
OPTIONS = dict(progress=False, precision="32-true")


class Spy:
    """Pixels that note the rows read from them, and act when a row count is reached."""

    def __init__(self, pixels, after=None, act=None):
        self.pixels, self.rows, self.after, self.act = pixels, [], after, act

    def __getitem__(self, rows):
        self.rows += list(rows)
        if self.after and len(self.rows) > self.after:
            self.act()
        return self.pixels[rows]


def make_faces(count: int = 118) -> Faces:
    """Noise whose brightness and stripes tell the age; odd counts in every split."""
    random = np.random.default_rng(0)
    ages = random.integers(1, 90, count)
    pixels = random.integers(0, 60, (count, 36, 36, 3)) + (ages * 1.5)[:, None, None, None]
    pixels[:, ::4] += (ages / 2)[:, None, None, None]
    table = pd.DataFrame(
        dict(
            file=[f"{age}_0_0_{i:04d}.jpg" for i, age in enumerate(ages)],
            age=ages,
            split=[SPLITS[i % 10] for i in range(count)],
            sha256=[f"{i:064x}" for i in range(count)],
        )
    )
    return Faces(table, pixels.clip(0, 255).astype(np.uint8), pd.DataFrame())


def rows_of(faces: Faces, part: str) -> np.ndarray:
    return np.flatnonzero(faces.table["split"] == part)


def mae(model, faces: Faces, part: str) -> float:
    rows = rows_of(faces, part)
    return float(np.abs(predict(model, faces.pixels, rows) - faces.table["age"][rows]).mean())


def same(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return all(torch.equal(first[key], second[key]) for key in first)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def faces() -> Faces:
    return make_faces()


@pytest.fixture(scope="module")
def reference(faces, tmp_path_factory):
    """An uninterrupted run: model, folder, and the rows that it read, in order."""
    run, spy = tmp_path_factory.mktemp("runs") / "reference", Spy(faces.pixels)
    return train(faces._replace(pixels=spy), SETTINGS, run, **OPTIONS), run, spy.rows


def test_run_folder_and_metadata(faces, reference):
    model, run, _ = reference
    assert sorted(file.name for file in run.iterdir()) == [
        "configuration.json", "logs", "model.safetensors",
    ]  # fmt: skip
    assert list(run.glob("logs/version_0/events.out.tfevents.*"))
    log = history(run)
    assert list(log.columns) == [
        "epoch", "train_mae", "valid_mae", "learning_rate", "seconds", "images_per_second",
    ]  # fmt: skip
    assert list(log["epoch"]) == [1, 2, 3]
    assert (log["learning_rate"].diff()[1:] < 0).all() and (log["seconds"] > 0).all()
    metadata = load_weights(run / "model.safetensors")[1]
    best = log.loc[log["valid_mae"].idxmin()]
    assert metadata["best_epoch"] == best["epoch"] and metadata["epochs"] == 3
    assert metadata["valid_mae"] == pytest.approx(best["valid_mae"])
    assert metadata["seconds"] == pytest.approx(log["seconds"].sum(), abs=0.1)
    assert metadata["split_digest"] == split_digest(faces.table)
    assert metadata["age_mean"] == pytest.approx(faces.table["age"][rows_of(faces, "train")].mean())
    assert metadata["training"]["learning_rate"] == SETTINGS.learning_rate
    assert metadata["device"].startswith("CPU" if not torch.cuda.is_available() else "")
    # The valid MAE in the log is that of the weights in the file: averaged, buffers included.
    assert mae(model, faces, "valid") == pytest.approx(metadata["valid_mae"], abs=1e-3)


def test_rows_are_read_in_seeded_order_and_no_test_row(faces, reference):
    expected = []
    rows = rows_of(faces, "train")
    sampler = DistributedSampler(rows, 1, 0, seed=SETTINGS.seed)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(rows[list(sampler)])
        expected += order[: len(order) // 8 * 8] + list(rows_of(faces, "valid"))
    assert reference[2] == expected


def test_test_rows_have_no_influence(faces, reference, tmp_path):
    rows = rows_of(faces, "test")
    table, pixels = faces.table.copy(), faces.pixels.copy()
    table.loc[rows, "age"], pixels[rows] = 10_000, 255
    model = train(Faces(table, pixels, faces.excluded), SETTINGS, tmp_path / "run", **OPTIONS)
    assert same(model, reference[0])


def test_one_clean_line_an_epoch(faces, tmp_path, capfd):
    before = torch.random.get_rng_state(), signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(faces, SETTINGS, tmp_path / "run", epochs=2, progress=False, precision="bf16-mixed")
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert err == "" and len(lines) == 2
    assert re.fullmatch(
        r"epoch 2/2: train MAE [\d.]+, valid MAE [\d.]+ years, \d+ s, \d+ images/s", lines[1]
    )
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert before[1] == signal.getsignal(signal.SIGINT)


def test_a_finished_run_is_loaded_not_trained(faces, reference, capsys):
    model, run, _ = reference
    nothing = faces._replace(pixels=None)
    assert same(train(nothing, SETTINGS, run, **OPTIONS), model)
    assert "reference: trained earlier, 3 epochs from random weights" in capsys.readouterr().out


@pytest.mark.fault("a run folder of other settings", "refused; names each setting that differs")
def test_another_configuration_is_refused(faces, reference, monkeypatch):
    run = reference[1]
    with pytest.raises(ValueError, match=r"reference.*learning_rate 0.001 there, 0.01 now.*delete"):
        train(faces, replace(SETTINGS, learning_rate=0.01), run)
    with pytest.raises(ValueError, match="epochs 3 there, 4 now"):
        train(faces, SETTINGS, run, epochs=4)
    with pytest.raises(ValueError, match="augmentation"):
        train(faces, SETTINGS, run, augmentation={})
    moved = faces.table.assign(split=np.roll(faces.table["split"], 1))
    with pytest.raises(ValueError, match=r"\(faces"):
        train(faces._replace(table=moved), SETTINGS, run)
    with pytest.raises(ValueError, match="start random there, torchvision now"):
        train(faces, replace(SETTINGS, pretrained=True), run)
    # What plays no part may change: folders, and weights that the run does not ask for.
    monkeypatch.setenv("AGE_BACKBONE_WEIGHTS", "elsewhere.pth")
    train(faces, replace(SETTINGS, cache=Path("elsewhere")), run, **OPTIONS)


def test_bad_input_is_refused(faces, tmp_path):
    with pytest.raises(ValueError, match="batch_size 8 does not divide by 3 processes"):
        train(faces, SETTINGS, tmp_path / "run", devices=3)
    no_valid = faces.table.replace({"split": {"valid": "test"}})
    with pytest.raises(ValueError, match="no face has split 'valid'"):
        train(faces._replace(table=no_valid), SETTINGS, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no training log"):
        history(tmp_path)


@pytest.mark.parametrize("settings", [SETTINGS, BATCH_NORM], ids=lambda given: given.backbone)
def test_averaged_weights_are_what_is_validated_and_kept(settings, faces, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr(utils.training, "_export", lambda *arguments: None)
    with pytest.raises(FileNotFoundError):  # nothing was exported
        train(faces, settings, run, epochs=2, **OPTIONS)
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    steps = 2 * (len(rows_of(faces, "train")) // 8)
    assert int(checkpoint["averaging_state"]["n_averaged"]) == steps
    model, errors = utils.training.build_model(settings), {}
    for name, state in (("averaged", averaged), ("current", current)):
        model.load_state_dict({key.removeprefix("model."): v for key, v in state.items()})
        errors[name] = mae(model, faces, "valid")
    logged = history(run)["valid_mae"][1]
    assert errors["averaged"] == pytest.approx(logged, abs=1e-3)
    assert abs(errors["current"] - logged) > 0.01
    for key in averaged:
        if "running_" in key:  # batch norm's statistics are averaged with the weights
            assert not torch.equal(averaged[key], current[key])
        if "tracked" in key:
            assert averaged[key] == current[key] == steps
    assert torch.equal(averaged["model.mean"], model.mean), "constants drift"


@pytest.mark.parametrize("settings", [SETTINGS, BATCH_NORM], ids=lambda given: given.backbone)
@pytest.mark.fault(
    "training stopped by hand (Ctrl-C)",
    "goes on after its last whole epoch, also when its folder was moved; the same weights come out",
)
def test_stopped_by_hand_then_resumed_elsewhere(settings, faces, tmp_path, capsys):
    """Ctrl-C in epoch 2; the folder moves; the rest is read and learnt as if nothing had been."""

    def stop():
        raise KeyboardInterrupt

    whole = Spy(faces.pixels)
    model = train(faces._replace(pixels=whole), settings, tmp_path / "whole", **OPTIONS)
    read = whole.rows
    first = Spy(faces.pixels, after=len(read) // 3 + 40, act=stop)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="call it again to resume"):
        train(faces._replace(pixels=first), settings, tmp_path / "run", **OPTIONS)
    assert signal.getsignal(signal.SIGINT) == handler
    moved = shutil.move(tmp_path / "run", tmp_path / "moved")
    rest = Spy(faces.pixels)
    resumed = train(faces._replace(pixels=rest), settings, moved, **OPTIONS)
    assert "moved: resumed after its last whole epoch" in capsys.readouterr().out
    assert rest.rows == read[len(read) // 3 :]
    assert same(resumed, model)
    log = history(moved)
    assert list(log["epoch"]) == [1, 2, 3]
    pd.testing.assert_frame_equal(log.iloc[:, :4], history(tmp_path / "whole").iloc[:, :4])


def test_resumed_with_loader_processes_and_without_the_first_weights(faces, tmp_path, monkeypatch):
    """Loader processes fetch ahead: the order has to be right before Lightning tells the epoch.

    The weights that the run started from are in its checkpoint, and are not asked for again.
    """

    def stop(self, hook=AgeTask.on_train_epoch_start):
        if self.current_epoch == 1:
            raise RuntimeError("stop here")
        hook(self)

    first = get_model(SETTINGS.backbone, weights=None).state_dict()
    torch.save(first, tmp_path / "first.pth")
    monkeypatch.setenv("AGE_BACKBONE_WEIGHTS", str(tmp_path / "first.pth"))
    settings = replace(SETTINGS, pretrained=True)
    whole = train(faces, settings, tmp_path / "whole", **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(AgeTask, "on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="stop here"):
            train(faces, settings, tmp_path / "run", **OPTIONS)
    monkeypatch.delattr(utils.model, "_read_state")
    resumed = train(faces, settings, tmp_path / "run", workers=1, **OPTIONS)
    assert same(resumed, whole)
    assert load_weights(tmp_path / "run/model.safetensors")[1]["origin"] == "file first.pth"


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
sys.path[:0] = {paths}
from test_training import BATCH_NORM, OPTIONS, SETTINGS, Spy, make_faces
from utils import model, training

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
faces, run = make_faces(), Path(sys.argv[1])
{body}
"""


def script(folder: Path, body: str, *launcher: str) -> subprocess.CompletedProcess:
    here = Path(__file__).parent
    path = folder / "script.py"
    path.write_text(SCRIPT.format(paths=[str(here), str(here.parent)], body=body))
    command = [sys.executable, *launcher, str(path), str(folder / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)


KILLS = {
    "while reading": """
faces = faces._replace(pixels=Spy(faces.pixels, after=150, act=kill))
training.train(faces, SETTINGS, run, **OPTIONS)
""",
    "while writing": """
replace, seen = os.replace, []

def count(source, target):
    seen.append(Path(target).name)
    if seen.count("last.ckpt") == 2:
        with open(source, "r+b") as file:
            file.truncate(1000)
        kill()
    replace(source, target)

os.replace = count
training.train(faces, SETTINGS, run, **OPTIONS)
""",
}


ENDS = {
    "before the weights are written": "training.save_weights = lambda *_, **__: kill()",
    "before the checkpoints are removed": "Path.unlink = lambda *_, **__: kill()",
}


@pytest.mark.parametrize("moment", ENDS)
@pytest.mark.fault("killed while training")
def test_killed_at_the_end_then_called_again(moment, faces, reference, tmp_path):
    train_it = "\ntraining.train(faces, SETTINGS, run, **OPTIONS)"
    ended = script(tmp_path, ENDS[moment] + train_it)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    run = tmp_path / "run"
    assert (run / "last.ckpt").is_file()
    assert (run / "model.safetensors").is_file() == (moment == list(ENDS)[1])
    spy = Spy(faces.pixels)
    assert same(train(faces._replace(pixels=spy), SETTINGS, run, **OPTIONS), reference[0])
    assert not set(spy.rows) & set(rows_of(faces, "train")), "an epoch was trained once more"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes")
@pytest.mark.fault(
    "disk full while training", "says so; goes on after its last whole epoch once there is room"
)
def test_a_full_disk_while_training(faces, reference, tmp_path):
    """The operating system refuses a checkpoint's bytes in epoch 2; what there was stays."""
    ended = script(
        tmp_path,
        "import resource\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "save = training.torch.save\n"
        "def limited(checkpoint, file):\n"
        "    if checkpoint['epoch'] == 1:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "    save(checkpoint, file)\n"
        "training.torch.save = limited\n"
        "training.train(faces, SETTINGS, run, **OPTIONS)",
    )
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert re.search(r"OSError: .*\.ckpt cannot be written .*free some space.*still there", last)
    run = tmp_path / "run"
    assert {file.name for file in run.glob("*ckpt*")} == {"best.ckpt", "last.ckpt"}
    assert torch.load(run / "last.ckpt", weights_only=True)["epoch"] == 0
    assert same(train(faces, SETTINGS, run, **OPTIONS), reference[0])


def memory_for(most: int, epoch: int = 0):
    """A training step on a GPU whose memory is too small for more than `most` faces at once."""

    def training_step(self, batch, step, real=AgeTask.training_step):
        if len(batch[0]) > most and self.current_epoch >= epoch:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, batch, step)

    return training_step


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.fault(
    "CUDA out of memory",
    "batch halved, two halves make one step, said so; the same weights come out",
)
def test_out_of_gpu_memory_halves_the_batch(epoch, faces, tmp_path, monkeypatch, capsys):
    """From the start or after a whole epoch; without chance, the same weights come out."""
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda values, *_: values)
    options = dict(augmentation={}, epochs=2, **OPTIONS)
    whole = train(faces, SETTINGS, tmp_path / "whole", **options)
    capsys.readouterr()
    monkeypatch.setattr(AgeTask, "training_step", memory_for(2, epoch))
    model = train(faces, SETTINGS, tmp_path / "run", **options)
    said = capsys.readouterr().out
    for size, parts in ((4, 2), (2, 4)):
        assert f"too small for {2 * size} faces at once" in said
        assert f"with {size} at once; {parts} of these make a step" in said
    pairs = zip(whole.parameters(), model.parameters(), strict=True)
    assert max((a - b).abs().max() for a, b in pairs) < 1e-4
    one, two = history(tmp_path / "whole"), history(tmp_path / "run")
    pd.testing.assert_frame_equal(one.iloc[:, :4], two.iloc[:, :4], rtol=1e-4)


@pytest.mark.fault("CUDA out of memory")
def test_out_of_gpu_memory_to_the_end_says_what_to_do(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(AgeTask, "training_step", memory_for(0))
    with pytest.raises(torch.cuda.OutOfMemoryError, match="CUDA out of memory.*smaller image_size"):
        train(faces, SETTINGS, tmp_path / "run", **OPTIONS)


class Attack:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", ["cut off", "a pickle that runs code", "a web page"])
@pytest.mark.fault("a checkpoint truncated, or a pickle", "refused by name; nothing in it is run")
def test_a_damaged_checkpoint_is_named(damage, faces, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(utils.training, "_export", lambda *arguments: None)
        with pytest.raises(FileNotFoundError):
            train(faces, SETTINGS, tmp_path / "run", epochs=1, **OPTIONS)
    last = tmp_path / "run" / "last.ckpt"
    if damage == "cut off":
        last.write_bytes(last.read_bytes()[:-1000])
    elif damage == "a web page":
        last.write_text("<html>not found</html>")
    else:
        torch.save({"epoch": Attack(tmp_path / "attacked")}, last)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged or no checkpoint.*delete it"):
        train(faces, SETTINGS, tmp_path / "run", epochs=1, **OPTIONS)
    assert not (tmp_path / "attacked").exists()
    last.unlink()
    train(faces, SETTINGS, tmp_path / "run", epochs=1, **OPTIONS)


@pytest.mark.fault("read-only data folder")
def test_a_folder_that_cannot_be_written_is_told(faces, tmp_path):
    (tmp_path / "file").write_text("in the way")  # root may write wherever there is a folder
    with pytest.raises(OSError, match="run cannot be written.*AGE_DATA"):
        train(faces, SETTINGS, tmp_path / "file" / "run", **OPTIONS)


@pytest.mark.parametrize("moment", KILLS)
@pytest.mark.fault(
    "killed while training",
    "goes on after its last whole epoch; the same weights come out as without",
)
def test_killed_then_resumed_is_the_uninterrupted_run(moment, faces, reference, tmp_path):
    ended = script(tmp_path, KILLS[moment])
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert "epoch 1/3" in ended.stdout or not ended.stdout
    run = tmp_path / "run"
    assert torch.load(run / "last.ckpt", weights_only=True)["epoch"] == 0
    model = train(faces, SETTINGS, run, **OPTIONS)
    assert same(model, reference[0])
    log, whole = history(run), history(reference[1])
    pd.testing.assert_frame_equal(log.iloc[:, :4], whole.iloc[:, :4])


def test_two_processes_agree_with_one(faces, tmp_path, monkeypatch):
    """Without chance (views, dropout) and batch norm, two halves of each batch make the same run.

    With batch norm each process has statistics of its own half, yet the valid MAE is that of the
    file. 23 valid rows are padded to 24: the MAE must count each once.
    """
    assert len(rows_of(faces, "valid")) % 2 == 1
    ended = script(
        tmp_path,
        "torch.nn.functional.dropout = lambda values, *_: values\n"
        "for settings in (SETTINGS, BATCH_NORM):\n"
        "    home = run / settings.backbone\n"
        "    training.train(faces, settings, home, augmentation={}, **OPTIONS)",
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("epoch 3/3") == 2, "one process prints, once a run"
    for settings in (SETTINGS, BATCH_NORM):
        model, kept = load_weights(tmp_path / "run" / settings.backbone / "model.safetensors")
        assert kept["processes"] == 2
        assert mae(model, faces, "valid") == pytest.approx(kept["valid_mae"], abs=1e-3)
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda values, *_: values)
    train(faces, SETTINGS, tmp_path / "one", augmentation={}, **OPTIONS)
    one, two = history(tmp_path / "one"), history(tmp_path / "run" / SETTINGS.backbone)
    for column in ("train_mae", "valid_mae", "learning_rate"):
        assert np.allclose(one[column], two[column], rtol=0.01), column


@pytest.mark.fault(
    "a loss that is not a number",
    "stops at once; names epoch, step and learning rate; keeps no broken weights",
)
def test_non_finite_loss_stops_and_says_where(faces, tmp_path):
    ages = faces.table["age"].astype(float)
    ages[rows_of(faces, "train")[5]] = np.nan
    broken = faces._replace(table=faces.table.assign(age=ages))
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 1, learning rate 4\.0e-05.*tenth"):
        train(broken, SETTINGS, tmp_path / "age", **OPTIONS)
    with pytest.raises(FloatingPointError, match=r"loss is (nan|inf) in epoch 1, step [23]"):
        train(faces, replace(SETTINGS, learning_rate=1e30), tmp_path / "rate", **OPTIONS)
    assert not list(tmp_path.rglob("*.ckpt")), "broken weights were kept"


def test_early_stop_stays_stopped(faces, tmp_path, capsys, monkeypatch):
    """With a learning rate of zero and no batch norm the valid MAE never gets better."""
    settings = replace(SETTINGS, learning_rate=0.0, epochs=5)
    options = dict(patience=2, augmentation={}, **OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(utils.training, "_export", lambda *arguments: None)
        with pytest.raises(FileNotFoundError):
            train(faces, settings, tmp_path / "run", **options)
    assert list(history(tmp_path / "run")["epoch"]) == [1, 2, 3]
    for name, epoch in (("best", 0), ("last", 2)):
        assert torch.load(tmp_path / f"run/{name}.ckpt", weights_only=True)["epoch"] == epoch
    train(faces, settings, tmp_path / "run", **options)
    assert list(history(tmp_path / "run")["epoch"]) == [1, 2, 3]
    assert "stopped early: no better valid MAE after epoch 1" in capsys.readouterr().out
    assert load_weights(tmp_path / "run" / "model.safetensors")[1]["best_epoch"] == 1


def test_it_learns_a_few_faces_by_heart(faces, tmp_path):
    rows = np.repeat(rows_of(faces, "train")[:12], 16)
    table = faces.table.iloc[rows].reset_index(drop=True)
    table["split"] = (["valid"] + ["train"] * 15) * 12
    few = Faces(table, faces.pixels[rows], faces.excluded)
    model = train(few, SETTINGS, tmp_path / "run", epochs=10, augmentation={}, **OPTIONS)
    assert mae(model, few, "train") < 2 < 15 < np.abs(table["age"] - table["age"].mean()).mean()


def test_predictions(faces, reference):
    model = reference[0]
    rows = np.array([7, 3, 100, 50, 3, 12])
    ages = predict(model, faces.pixels, rows)
    assert ages.shape == (6,) and ages.dtype == np.float32
    assert ages[1] == pytest.approx(ages[4], abs=1e-4), "one answer a face, in the rows' order"
    for size in (1, 2, 4, 64):
        assert np.allclose(predict(model, faces.pixels, rows, batch_size=size), ages, atol=1e-3)
    model.train()
    assert np.allclose(predict(model, list_of(faces, rows), np.arange(6)), ages, atol=1e-3)
    mirrored = predict(model, faces.pixels[:, :, ::-1], rows)
    both = predict(model, faces.pixels, rows, flip=True)
    assert np.allclose(both, (ages + mirrored) / 2, atol=1e-3)
    assert not np.allclose(both, ages, atol=1e-3)
    assert predict(model, faces.pixels, []).shape == (0,)
    with pytest.raises(TypeError, match="mask"):
        predict(model, faces.pixels, faces.table["split"] == "valid")


def list_of(faces: Faces, rows: np.ndarray) -> np.ndarray:
    return np.stack([faces.pixels[row] for row in rows])


def test_command_line(faces, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AGE_DATA", str(tmp_path))
    monkeypatch.setenv("AGE_FACES", "sample")
    monkeypatch.setattr(utils.training, "get_settings", lambda: replace(SETTINGS, runs=tmp_path))
    monkeypatch.setattr(utils.sources, "load_faces", lambda settings: faces)
    utils.training.main(["--name", "mine", "--epochs", "1", "--no-bar"])
    out = capsys.readouterr().out
    assert "squeezenet1_1" in out and "epoch 1/1" in out and "weights:" in out
    assert load_weights(tmp_path / "mine" / "model.safetensors")[1]["epochs"] == 1


def test_weighted_sampler_keeps_its_proportions_and_its_order():
    weights = np.array([1.0, 3.0, 0.0, 4.0])
    samplers = [WeightedSampler(np.tile(weights, 500), 2, rank, seed=3) for rank in (0, 1)]
    drawn = [list(sampler) for sampler in samplers]
    assert drawn == [list(sampler) for sampler in samplers], "one epoch, one order"
    kinds = np.bincount(np.concatenate(drawn) % 4, minlength=4) / 2000
    assert kinds == pytest.approx([0.125, 0.375, 0, 0.5], abs=0.04) and kinds[2] == 0
    samplers[0].set_epoch(1)
    assert list(samplers[0]) != drawn[0]


def test_sampling_and_weights_decide_who_teaches(faces, tmp_path):
    """The old are neither drawn nor counted: the network puts everybody lower."""
    young = (faces.table["age"] < 45).to_numpy(float)
    means = {}
    for name, options in (
        ("all", {}),
        ("drawn", {"sampling": young}),
        ("weighed", {"weights": young}),
    ):
        model = train(faces, SETTINGS, tmp_path / name, augmentation={}, **options, **OPTIONS)
        means[name] = predict(model, faces.pixels, rows_of(faces, "valid")).mean()
    assert means["drawn"] < means["all"] - 3 and means["weighed"] < means["all"] - 3
    with pytest.raises(ValueError, match=r"weights \w+ there, None now"):
        train(faces, SETTINGS, tmp_path / "weighed", augmentation={}, **OPTIONS)


def test_unit_weights_change_nothing(faces, tmp_path):
    plain = train(faces, SETTINGS, tmp_path / "plain", augmentation={}, **OPTIONS)
    ones = train(faces, SETTINGS, tmp_path / "ones", augmentation={},
                 weights=np.ones(len(faces.table)), **OPTIONS)  # fmt: skip
    assert same(plain, ones)


def test_worst_group_gains_weight_and_the_file_holds_only_the_model(faces, tmp_path):
    groups = (faces.table["age"] > 45).to_numpy(np.int64)
    task = AgeTask(utils.training.build_model(SETTINGS), SETTINGS, 10, {}, groups=groups)
    losses, members = torch.tensor([1.0, 9.0, 3.0, 11.0]), torch.tensor([0, 1, 0, 1])
    for _ in range(100):
        loss = task._worst_groups(losses, members)
    rate = utils.training.GROUP_RATE
    odds = float(np.exp(100 * rate * (10 - 2)))
    assert task.shares.tolist() == pytest.approx([1 / (1 + odds), odds / (1 + odds)], rel=1e-3)
    assert loss.item() == pytest.approx((2 + 10 * odds) / (1 + odds), rel=1e-3)
    alone = task._worst_groups(losses[:1], members[:1])
    assert torch.isfinite(alone), "a group that is missing from a batch"
    model = train(faces, SETTINGS, tmp_path / "run", epochs=1, groups=groups, **OPTIONS)
    assert mae(model, faces, "valid") < 40


@pytest.mark.fault(
    "weights that may know the test faces", "refused where they were trained on another split"
)
def test_trained_model_is_the_own_run_else_the_published_weights(
    faces, reference, tmp_path, monkeypatch, capsys
):
    settings = replace(SETTINGS, faces="utkface", runs=tmp_path)
    monkeypatch.setattr(utils.training, "CHECKPOINT", reference[1] / "model.safetensors")
    assert same(trained_model(faces, settings), reference[0])
    assert "published weights" in capsys.readouterr().out and not list(tmp_path.iterdir())
    moved = faces.table.assign(split=np.roll(faces.table["split"], 1))
    with pytest.raises(ValueError, match="may know your test faces: train your own"):
        trained_model(faces._replace(table=moved), settings)
    shutil.copytree(reference[1], tmp_path / "cnn_regression")
    trained_model(faces, settings)
    assert "cnn_regression: trained earlier" in capsys.readouterr().out
    drawn = replace(settings, faces="sample")
    assert same(trained_model(faces, drawn), reference[0])


@pytest.mark.fault(
    "two notebooks that train the same network",
    "the second waits and loads what the first has made",
)
def test_two_at_once_train_it_once(faces, tmp_path, capsys):
    """As two notebooks do: the second waits, and loads what the first has made."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(train, faces, SETTINGS, tmp_path / "run", **OPTIONS) for _ in range(2)]
        first, second = (job.result() for job in jobs)
    assert same(first, second)
    said = capsys.readouterr().out
    assert said.count("epoch 1/3") == 1 and said.count("trained earlier") == 1
