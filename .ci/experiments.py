"""Every training of the published run: what differs, for which chapter, and how long it takes.

python .ci/experiments.py            trains what is missing, one after another, and resumes
python .ci/experiments.py --list     says what is there
python .ci/experiments.py NAME ...   only these

Each adds its ages to figures/predictions.csv.gz. Chapter 9 brings its own networks, and trains them
when it is published.
"""

import argparse
import sys
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copyfile

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter1d

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import cross_calibrated

from utils import evaluation
from utils.augment import (
    CORRUPTIONS,
    GEOMETRY,
    LIGHT,
    OCCLUSION,
    QUALITY,
    STANDARD,
    augment,
    corruption,
)
from utils.faces import FOLDS, Faces, load_faces
from utils.model import load_weights, save_weights
from utils.settings import CHECKPOINT, CHIP_SIZE, ROOT, Settings, comparison_settings, get_settings
from utils.training import predict, train

MAIN = FOLDS - 1  # the fold that is valid and test of the main split
WRONG_CROP = dict(rotate=10.0, scale=0.1, shift=0.05)  # up to so much, as a careless crop has it
MOBILENET_V2 = {"backbone": "mobilenet_v2", "frozen": 0}


def crossing(table: pd.DataFrame) -> pd.Series:
    """Ethnicity and ten-year band of each face."""
    return table["ethnicity"].astype(str) + " " + evaluation.age_band(table["age"]).astype(str)


def balanced(table: pd.DataFrame) -> dict:
    """Draw each ethnicity and age band by the square root of its count instead of its count."""
    return {"sampling": crossing(table).map(crossing(table).value_counts()).to_numpy() ** -0.5}


def smoothed(table: pd.DataFrame) -> dict:
    """Weights by label distribution smoothing (Yang et al., 2021), within each ethnicity."""
    weights = np.zeros(len(table))
    for _, rows in table.groupby("ethnicity", observed=True):
        counts = np.bincount(rows["age"], minlength=121).astype(float)
        near = gaussian_filter1d(counts, sigma=2, mode="constant")[rows["age"]]
        weights[rows.index] = near**-0.5
    return {"weights": np.minimum(weights / weights.mean(), 5).astype(np.float32)}


def worst_group(table: pd.DataFrame) -> dict:
    """Group DRO (Sagawa et al., 2020) over ethnicities."""
    return {"groups": table["ethnicity"].cat.codes.to_numpy("int64")}


def more_light(_: pd.DataFrame) -> dict:
    """Half as much again of every change of light."""
    return {"augmentation": STANDARD | {name: 1.5 * most for name, most in LIGHT.items()}}


def at_random(table: pd.DataFrame) -> dict:
    """Folds that know nothing of duplicates: what a split at random would do."""
    return {"fold": np.random.default_rng(0).permutation(len(table)) % FOLDS}


def year_class(outputs: torch.Tensor, ages: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """Cross-entropy of the labelled year, as in DEX (Rothe et al., 2015)."""
    return torch.nn.functional.cross_entropy(outputs, ages.long(), reduction="none")


def views(*parts: dict):
    return lambda _: {"augmentation": {k: v for part in parts for k, v in part.items()}}


# options(table) -> arguments of `train`; settings: what differs from the recipe, or from the
# comparison's; minutes: of two cores, all folds together.
Experiment = namedtuple("Experiment", "chapter minutes folds options settings")
EXPERIMENTS = {
    "crossfit": Experiment(4, 150, [MAIN, *range(MAIN)], None, None),
    "fair base": Experiment(6, 12, (0, 1), None, {}),
    "fair balanced": Experiment(6, 12, (0, 1), balanced, {}),
    "fair smoothed": Experiment(6, 12, (0, 1), smoothed, {}),
    "fair worst group": Experiment(6, 12, (0, 1), worst_group, {}),
    "fair light": Experiment(6, 12, (0, 1), more_light, {}),
    "base": Experiment(3, 6, [MAIN], None, {}),
    "views none": Experiment(3, 6, [MAIN], views({}), {}),
    "views geometry": Experiment(3, 6, [MAIN], views(GEOMETRY), {}),
    "views light": Experiment(3, 6, [MAIN], views(GEOMETRY, LIGHT), {}),
    "views occlusion": Experiment(3, 6, [MAIN], views(STANDARD, OCCLUSION), {}),
    "without light": Experiment(3, 6, [MAIN], views(GEOMETRY, QUALITY), {}),
    "without blur": Experiment(3, 6, [MAIN], views(STANDARD, dict(blur=0, resolution=0)), {}),
    "without grain": Experiment(3, 6, [MAIN], views(STANDARD, dict(jpeg=0, noise=0)), {}),
    "six epochs": Experiment(4, 12, [MAIN], None, {"epochs": 6}),
    "start face": Experiment(4, 8, [MAIN], None, {"frozen": 0}),
    "start random": Experiment(4, 8, [MAIN], None, {"pretrained": False}),
    "start imagenet": Experiment(4, 12, [MAIN], None, MOBILENET_V2),
    "start imagenet random": Experiment(4, 12, [MAIN], None, MOBILENET_V2 | {"pretrained": False}),
    "head l1": Experiment(8, 6, [MAIN], None, {"head": "regression"}),
    "head year classes": Experiment(8, 6, [MAIN], lambda _: {"loss": year_class}, {}),
    "random split": Experiment(2, 6, [0], at_random, {}),
}


def run_folder(name: str, fold: int) -> Path:
    """The main split's network is the one of notebook 4."""
    if (name, fold) == ("crossfit", MAIN):
        return get_settings("utkface").runs / "cnn_regression"
    return get_settings("utkface").runs / f"{name.replace(' ', '_')}_{fold}"


def prepare(name: str, faces: Faces) -> tuple[Faces, dict]:
    """The faces, with other folds where the experiment wants them, and arguments of `train`."""
    options = EXPERIMENTS[name].options
    arguments = options(faces.table) if options else {}
    folds = arguments.pop("fold", faces.table["fold"])
    return faces._replace(table=faces.table.assign(fold=folds)), arguments


def is_corrupted(name: str) -> bool:
    """Whether the run is evaluated on corrupted faces as well."""
    return EXPERIMENTS[name].chapter == 3 or name == "crossfit"


def is_published(column: str, files: pd.Series) -> bool:
    """Whether predictions.csv.gz holds the ages of these files by a run."""
    try:
        return files.isin(evaluation.published(column)["file"]).all()
    except (FileNotFoundError, KeyError, ValueError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--fold", type=int, help="only this one")
    parser.add_argument("--list", action="store_true", help="say what is there, train nothing")
    given, settings = parser.parse_args(), get_settings("utkface")
    all_faces = load_faces(settings)
    if not given.list:
        evaluation.publish(ROOT / "figures", all_faces.table)  # makes the table if it is missing
    for name in given.names or EXPERIMENTS:
        experiment, (faces, arguments) = EXPERIMENTS[name], prepare(name, all_faces)
        for fold in experiment.folds if given.fold is None else [given.fold]:
            files = faces.table.loc[faces.table["fold"] == fold, "file"]
            done = is_published(f"{name} occlusion 3" if is_corrupted(name) else name, files)
            minutes = experiment.minutes / len(experiment.folds)
            if given.list:
                about = f"chapter {experiment.chapter}, {minutes:.0f} minutes"
                print(f"{name}, fold {fold} ({about}):", "done" if done else "missing")
            elif not done:
                run(name, fold, faces, settings, arguments)
    if not given.list:
        publish_calibrated(len(all_faces.table))


def publish_calibrated(count: int) -> None:
    """Once all folds are there: each one's answers, corrected by what the others show (chapter 6),
    and the correction of the published network in its file."""
    try:
        raw = evaluation.published("uncalibrated")
    except KeyError:
        return
    if len(raw) == count:
        faces = cross_calibrated(raw)
        answers = {"crossfit": faces["predicted"], "crossfit spread": faces["spread"]}
        evaluation.publish(ROOT / "figures", faces, **answers)
        model, facts = load_weights(CHECKPOINT)
        facts["calibration"] = evaluation.calibration(raw[raw["fold"] != MAIN])
        facts["intervals"] = evaluation.conformal(faces[faces["split"] == "valid"])
        save_weights(model, CHECKPOINT, **facts)


def run(name: str, fold: int, faces: Faces, settings: Settings, arguments: dict) -> None:
    """Train one network without a fold, and publish its ages of that fold."""
    chapter, differs = EXPERIMENTS[name].chapter, EXPERIMENTS[name].settings
    if differs is not None:
        settings = replace(comparison_settings(settings), **differs)
    held = None if name == "crossfit" and fold == MAIN else fold
    model = train(faces, settings, run_folder(name, fold), fold=held, progress=False, **arguments)
    part = faces.table[faces.table["fold"] == fold]

    def publish(part: pd.DataFrame, column: str, **options) -> None:
        if not is_published(column, part["file"]):
            ages = predict(model, faces.pixels, part.index, **options)
            evaluation.publish(ROOT / "figures", part, **{column: ages})

    read = model.ages_and_spreads
    ages, spreads = predict(model, faces.pixels, part.index, flip=True, read=read).T
    if held is None:  # the published weights, and how wide an interval must be
        valid = part.assign(predicted=ages, spread=spreads).query("split == 'valid'")
        facts = load_weights(run_folder(name, fold) / "model.safetensors")[1]
        save_weights(model, CHECKPOINT, **facts | {"intervals": evaluation.conformal(valid)})
    if name == "six epochs":  # the curves of chapter 4
        copyfile(run_folder(name, fold) / "history.csv", ROOT / "figures" / "training_history.csv")
    column = "uncalibrated" if name == "crossfit" else name
    evaluation.publish(ROOT / "figures", part, **{column: ages, f"{column} spread": spreads})
    mae = np.abs(ages - part["age"]).mean()
    print(f"{name}, fold {fold}: MAE {mae:.2f} years", flush=True)
    if chapter == 3:
        generator = torch.Generator().manual_seed(0)
        damage = partial(augment, image_size=CHIP_SIZE, generator=generator, **WRONG_CROP)
        publish(part, f"{name} wrong crop", corrupt=damage)
    if is_corrupted(name):
        publish(part, f"{name} one view")
        for kind in [*CORRUPTIONS, "occlusion"]:
            for level in (1, 2, 4, 5) if held is None else ():
                damage = corruption(kind, level, seed=fold)
                publish(part[part["split"] == "test"], f"{name} {kind} {level}", corrupt=damage)
            publish(part, f"{name} {kind} 3", corrupt=corruption(kind, 3, seed=fold))


if __name__ == "__main__":
    main()
