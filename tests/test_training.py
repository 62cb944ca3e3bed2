"""Training on drawn pixels: what is read, kept, resumed, refused, and what comes out."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import utils.training
from utils.augment import corruption
from utils.faces import Faces, split_digest
from utils.model import AgeRegressor, load_weights
from utils.settings import get_settings
from utils.training import predict, train, trained_model

SETTINGS = replace(
    get_settings("sample"), image_size=32, batch_size=8, epochs=3, learning_rate=1e-2
)
SPLITS = ["train"] * 7 + ["valid"] + ["test"] + ["valid"]

pytestmark = pytest.mark.usefixtures("one_thread")


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
    split = np.array([SPLITS[i % 10] for i in range(count)])
    table = pd.DataFrame({"age": ages, "split": split})
    table["file"] = [f"{age}_0_0_{i:04d}.jpg" for i, age in enumerate(ages)]
    table["fold"] = np.where(split == "train", np.arange(count) % 4, 4)
    table["sha256"] = [f"{i:064x}" for i in range(count)]
    return Faces(table, pixels.clip(0, 255).astype(np.uint8), pd.DataFrame())


def make_net() -> AgeRegressor:
    """Small, with batch normalisation and dropout, whose state needs as much care as weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4)]
        layers += [nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 121)]
        return AgeRegressor(nn.Sequential(*layers), 32, head="distribution")


def learn(faces: Faces, run: Path, settings=SETTINGS, **options) -> AgeRegressor:
    return train(faces, settings, run, progress=False, **{"net": make_net()} | options)


def rows_of(faces: Faces, part: str) -> np.ndarray:
    return np.flatnonzero(faces.table["split"] == part)


def same(first, second) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def faces() -> Faces:
    return make_faces()


@pytest.fixture(scope="module")
def reference(faces, tmp_path_factory):
    """An uninterrupted run: model, folder, and the rows that it read."""
    run, spy = tmp_path_factory.mktemp("runs") / "reference", Spy(faces.pixels)
    return learn(faces._replace(pixels=spy), run), run, spy.rows


def test_frozen_blocks_keep_their_start(faces, tmp_path):
    net = AgeRegressor("face_mobilenet", 32, head="distribution")
    start = {name: value.half().float() for name, value in net.state_dict().items()}
    few = replace(SETTINGS, frozen=2, pretrained=True, epochs=1)
    model = train(faces, few, tmp_path / "run", net=net, progress=False)
    moved = {name for name, value in model.state_dict().items()
             if not torch.equal(value.half().float(), start[name])}  # fmt: skip
    assert moved and not any(re.match(r"backbone\.features\.[01]\.", name) for name in moved)
    assert any(name.startswith("backbone.features.2.") for name in moved)


def test_what_a_run_leaves(faces, reference):
    model, run, _ = reference
    assert sorted(file.name for file in run.iterdir()) == [
        "configuration.json", "history.csv", "model.safetensors",
    ]  # fmt: skip
    log = pd.read_csv(run / "history.csv")
    facts = load_weights(run / "model.safetensors", make_net())[1]
    assert list(log.columns) == utils.training.COLUMNS and list(log["epoch"]) == [1, 2, 3]
    assert facts["split_digest"] == split_digest(faces.table) and facts["epochs"] == 3
    assert facts["training"]["fold"] is None and facts["precision"] in ("float32", "bfloat16")
    # The last MAE in the log is that of the exported weights: averaged, buffers included.
    rows = rows_of(faces, "valid")
    error = np.abs(predict(model, faces.pixels, rows) - faces.table["age"][rows]).mean()
    assert error == pytest.approx(facts["valid_mae"], abs=1e-3) == log["valid_mae"].iloc[-1]
    assert error < np.abs(faces.table["age"][rows] - 45).mean(), "it learnt nothing"


def test_every_training_row_once_an_epoch_and_no_test_row(faces, reference):
    rows, count = rows_of(faces, "train"), len(rows_of(faces, "train")) // 8 * 8
    read, valid = np.array(reference[2]), list(rows_of(faces, "valid"))
    orders = read.reshape(3, -1)
    for order in orders:
        assert len(set(order[:count])) == count and set(order[:count]) <= set(rows)
        assert list(order[count:]) == valid
    assert not np.array_equal(orders[0], orders[1])


def test_test_rows_have_no_influence(faces, reference, tmp_path):
    rows = rows_of(faces, "test")
    table, pixels = faces.table.copy(), faces.pixels.copy()
    table.loc[rows, "age"], pixels[rows] = 110, 255
    assert same(learn(Faces(table, pixels, faces.excluded), tmp_path / "run"), reference[0])


@pytest.mark.parametrize("fold", [1, 4])
def test_a_fold_is_held_out_whole(faces, fold, tmp_path):
    spy = Spy(faces.pixels)
    learn(faces._replace(pixels=spy), tmp_path / "run", fold=fold)
    out = np.flatnonzero(faces.table["fold"] == fold)
    shown = out if fold == 1 else rows_of(faces, "valid")
    per_epoch = len(spy.rows) // 3
    trained, checked = spy.rows[: per_epoch - len(shown)], spy.rows[per_epoch - len(shown) :]
    assert not set(trained) & set(out) and checked[: len(shown)] == list(shown)
    assert set(spy.rows).isdisjoint(rows_of(faces, "test")) == (fold == 4)


def test_a_finished_run_is_loaded_and_another_configuration_refused(faces, reference, capsys):
    model, run, _ = reference
    assert same(learn(faces._replace(pixels=None), run), model)
    assert "reference: trained earlier" in capsys.readouterr().out
    moved = faces.table.assign(split=np.roll(faces.table["split"], 1))
    other = make_net()
    other.backbone[0].weight.data += 1
    for change in (
        dict(settings=replace(SETTINGS, learning_rate=0.1)),
        dict(augmentation={}),
        dict(fold=2),
        dict(net=other),
        dict(loss=lambda outputs, ages, rows: outputs.mean(1)),
        dict(sampling=np.ones(len(faces.table))),
        dict(faces=faces._replace(table=moved)),
    ):
        with pytest.raises(ValueError, match=r"reference holds a run of another configuration.*go"):
            learn(change.pop("faces", faces), run, **change)
    no_valid = faces.table.replace({"split": {"valid": "test"}})
    with pytest.raises(ValueError, match="none held out"):
        learn(faces._replace(table=no_valid), run)


def test_own_loss_sampling_weights_and_groups(faces, tmp_path):
    """Each leads the network: to a constant, to what is drawn, to what weighs, to the worst."""
    old = faces.table["age"].to_numpy() >= 60
    mean = {}
    for name, options in {
        "all": {},
        "sampling": {"sampling": np.where(old, 1.0, 0.0)},
        "weights": {"weights": np.where(old, 1.0, 0.0)},
        "groups": {"groups": old.astype(int)},
        "loss": {"loss": lambda outputs, ages, rows: (outputs.softmax(1) @ YEARS - 5).abs()},
    }.items():
        spy = Spy(faces.pixels)
        model = learn(faces._replace(pixels=spy), tmp_path / name, **options)
        mean[name] = predict(model, faces.pixels, np.arange(len(old))).mean()
        if name == "sampling":
            count = len(rows_of(faces, "train")) // 8 * 8
            assert old[spy.rows[:count]].all()
    assert mean["loss"] < mean["all"] - 5 and mean["groups"] != mean["all"]
    assert min(mean["sampling"], mean["weights"]) > mean["all"] + 5


YEARS = torch.arange(121.0)


def test_a_loss_that_is_not_finite_stops_at_once(faces, tmp_path):
    def broken(outputs, ages, rows):
        return outputs.mean(1) * (torch.nan if 1 in rows else 1.0)

    with pytest.raises(FloatingPointError, match=r"loss is nan in epoch 1, step \d+: try a tenth"):
        learn(faces, tmp_path / "run", loss=broken)
    assert not (tmp_path / "run" / "last.ckpt").exists(), "broken weights were kept"


def test_stopped_by_hand_then_resumed(faces, reference, tmp_path, capsys):
    """Ctrl-C in epoch 2; the rest is read and learnt as if nothing had been."""
    model, run, read = reference

    def stop():
        raise KeyboardInterrupt

    before = torch.random.get_rng_state()
    spy = Spy(faces.pixels, after=len(read) // 3 + 40, act=stop)
    with pytest.raises(KeyboardInterrupt):
        learn(faces._replace(pixels=spy), tmp_path / "run")
    assert torch.equal(before, torch.random.get_rng_state())
    rest = Spy(faces.pixels)
    resumed = learn(faces._replace(pixels=rest), tmp_path / "run")
    assert "run: resumed after epoch 1" in capsys.readouterr().out
    assert rest.rows == read[len(read) // 3 :] and same(resumed, model)
    columns = ["epoch", "train_mae", "valid_mae", "learning_rate"]
    resumed_log = pd.read_csv(tmp_path / "run" / "history.csv")
    pd.testing.assert_frame_equal(resumed_log[columns], pd.read_csv(run / "history.csv")[columns])


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {paths}
import torch
from test_training import SETTINGS, Spy, learn, make_faces
from utils import settings, training

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
faces, run = make_faces(), Path(sys.argv[1])
{body}
learn(faces, run)
"""
MOMENTS = {
    "while reading": "faces = faces._replace(pixels=Spy(faces.pixels, after=150, act=kill))",
    "while writing": "os.replace = lambda source, target: kill() if 'ckpt' in str(target) and "
    "Path(target).is_file() else os.rename(source, target)",
    "before the weights are written": "training.save_weights = lambda *_, **__: kill()",
    "before the checkpoint is removed": "Path.unlink = lambda *_, **__: kill()",
}


def script(folder: Path, body: str, *launcher: str) -> subprocess.CompletedProcess:
    here, path = Path(__file__).parent, folder / "script.py"
    path.write_text(SCRIPT.format(paths=[str(here), str(here.parent)], body=body))
    command = [sys.executable, *launcher, str(path), str(folder / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_then_called_again(moment, faces, reference, tmp_path):
    ended = script(tmp_path, MOMENTS[moment])
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert same(learn(faces, tmp_path / "run"), reference[0])


def test_two_processes_under_torchrun(faces, tmp_path):
    """Each reads its share of every global batch; the first one writes, and the run is loaded."""
    ended = script(tmp_path, "", "-m", "torch.distributed.run", "--nproc_per_node", "2")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("epoch 3/3") == 1
    model, facts = load_weights(tmp_path / "run" / "model.safetensors", make_net())
    assert facts["processes"] == 2
    assert same(learn(faces._replace(pixels=None), tmp_path / "run"), model)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file sizes")
def test_a_full_disk_while_training(faces, reference, tmp_path):
    limit = "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    ended = script(tmp_path, limit + "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000,) * 2)")
    assert "cannot be written" in ended.stderr and "free some space" in ended.stderr
    assert same(learn(faces, tmp_path / "run"), reference[0])


def test_two_at_once_train_it_once(faces, tmp_path, capsys):
    nets = make_net(), make_net()  # not in the threads, which share the random numbers
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(learn, faces, tmp_path / "run", net=net) for net in nets]
        first, second = (job.result() for job in jobs)
    said = capsys.readouterr().out
    assert same(first, second)
    assert said.count("epoch 1/3") == 1 and said.count("trained earlier") == 1


def test_predict_is_the_same_in_any_batches_and_takes_what_changes_faces(faces, reference):
    model, rows = reference[0], np.arange(20)
    ages = predict(model, faces.pixels, rows)
    assert ages.dtype == np.float32
    np.testing.assert_allclose(predict(model, faces.pixels, rows, 3), ages, atol=1e-4)
    mirrored = predict(model, faces.pixels[:, :, ::-1], rows)
    both = predict(model, faces.pixels, rows, flip=True)
    np.testing.assert_allclose(both, (ages + mirrored) / 2, atol=1e-3)
    dark = predict(model, faces.pixels, rows, corrupt=corruption("dark", 5))
    assert np.abs(dark - ages).mean() > 0.1
    answers = predict(model, faces.pixels, rows, read=model.ages_and_spreads)
    assert answers.shape == (20, 2) and np.allclose(answers[:, 0], ages, atol=1e-4)
    assert predict(model, faces.pixels, []).shape == (0,)
    with pytest.raises(TypeError, match="mask"):
        predict(model, faces.pixels, np.ones(len(faces.table), bool))


def test_published_weights_are_for_the_split_that_they_know(faces, monkeypatch, tmp_path, capsys):
    settings = replace(get_settings("utkface"), runs=tmp_path)
    model, facts = load_weights(utils.training.CHECKPOINT)
    with pytest.raises(ValueError, match=r"age_utkface.*another split.*may know your test faces"):
        trained_model(faces, settings)
    monkeypatch.setattr(utils.training, "split_digest", lambda table: facts["split_digest"])
    assert same(trained_model(faces, settings), model)
    assert "published weights, valid MAE" in capsys.readouterr().out
