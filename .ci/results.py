"""What results.json says of the published network, computed from figures/predictions.csv.gz alone.

python .ci/results.py     writes it; .ci/publish.py calls this first
"""

import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import evaluation as ev
from utils.augment import CORRUPTIONS, SEVERITIES
from utils.download import file_sha256
from utils.model import load_weights
from utils.settings import CHECKPOINT, ROOT

COUNT = 23_705  # faces of UTKFace: what is said of all of them waits until all are there
FEWEST = 30  # faces of each group in an age band, or the band is not compared
LEVELS = (1, 2, 3, 4, 5)


def summary(faces: pd.DataFrame, over: str) -> dict:
    """MAE, CS@5 and bias of these faces; the first by age band and group."""
    keys = {"age_band": ev.age_band(faces["age"]), "ethnicity": "ethnicity", "gender": "gender"}
    whole = ev.metrics(faces).T.to_dict()
    named = {f"{over}_{name.lower().replace('@', '')}": figure for name, figure in whole.items()}
    return named | {
        f"{over}_mae_by_{name}": ev.metrics_by(faces, key) for name, key in keys.items()
    }


@cache  # reading it once for all its columns is faster than once for each
def every_run() -> pd.DataFrame:
    return pd.read_csv(ROOT / "figures" / "predictions.csv.gz", index_col="file")


def errors(run: str, files: pd.Series) -> np.ndarray:
    """Absolute errors (years) of these faces by a run."""
    faces = every_run().reindex(index=files, columns=[run, "age"])
    if faces[run].isna().any():
        raise KeyError(f"{run!r} lacks faces in predictions.csv.gz: see .ci/experiments.py")
    return (faces[run] - faces["age"]).abs().to_numpy()


def corruptions(faces: pd.DataFrame, levels: tuple) -> dict:
    """MAE by kind and severity, and its ratio to clean at severity 3; one view of each face."""
    clean, group = errors("crossfit one view", faces["file"]), faces["group"]
    found = {kind: {level: errors(f"crossfit {kind} {level}", faces["file"]) for level in levels}
             for kind in SEVERITIES}  # fmt: skip
    mae = {kind: {level: ev.mean_interval(e, group) for level, e in rows.items()}
           for kind, rows in found.items()}  # fmt: skip
    third = {kind: rows[3] for kind, rows in found.items()}
    third["mean of the ten"] = np.mean([third[kind] for kind in CORRUPTIONS], axis=0)
    ratio = {kind: ev.mean_interval(e, group, over=clean) for kind, e in third.items()}
    return {"clean": ev.mean_interval(clean, group), "mae": mae, "ratio": ratio}


def cross_calibrated(predictions: pd.DataFrame) -> pd.DataFrame:
    """Each fold's predictions moved by the `calibration` that the other folds show."""
    moved = predictions.copy()
    for fold in predictions["fold"].unique():
        own = predictions["fold"] == fold
        table = ev.calibration(predictions[~own])
        moved.loc[own, "predicted"] = ev.calibrate(predictions.loc[own, "predicted"], table)
    return moved


def at_equal_age(faces: pd.DataFrame) -> tuple[dict, pd.DataFrame]:
    """Gap and MAE at equal age, of the groups with FEWEST faces or more in every band."""
    table, resamples = ev.standardised(faces.query("ethnicity != 'Others'"), fewest=FEWEST)
    return ev.gap(table, resamples), table


def candidates() -> dict:
    """The gaps before the published calibration and of what was tried; see chapter 6."""
    runs = {"before": "uncalibrated"}
    runs |= {f"short, {name}": f"fair {name}"
             for name in ("base", "balanced", "smoothed", "worst group", "light")}  # fmt: skip
    tables = {}
    for name, run in runs.items():
        with suppress(KeyError):  # not trained yet
            tables[name] = ev.published(run)
    if "short, base" in tables:
        tables["short, calibrated"] = cross_calibrated(tables["short, base"])
    return {name: at_equal_age(faces)[0] for name, faces in tables.items()}


def results() -> dict:
    """All keys that follow from the predictions and the published weights."""
    faces, (_, facts) = ev.published(), load_weights(CHECKPOINT)
    test = faces[faces["split"] == "test"]
    median = faces.assign(predicted=_median()).loc[test.index]
    low, high = ev.interval(test["predicted"], test["spread"], facts["intervals"])
    inside = (test["age"] >= low) & (test["age"] <= high)
    names = """backbone head image_size epochs valid_mae seconds images_per_second device precision
        origin""".split()
    found = summary(test, "test") | {
        "baseline_constant_mae": ev.metrics(median).loc["MAE"],
        "interval_coverage_90": ev.mean_interval(inside, test["group"]),
        "corruption": corruptions(test, LEVELS),
        "digests": {"split": facts["split_digest"], "checkpoint": file_sha256(CHECKPOINT)},
        "training": {name: facts[name] for name in names}
        | {"minutes": round(facts["seconds"] / 60)},
        "versions": facts["libraries"],
    }
    gap, by_ethnicity = at_equal_age(faces)
    found["age_standardised_gap"] = {"published": gap} | candidates()
    found["age_standardised_mae"] = by_ethnicity
    if len(faces) == COUNT:
        found |= summary(faces, "crossfit") | {"corruption_crossfit": corruptions(faces, (3,))}
    return found


def _median() -> float:
    """Of the labels of the main split's training faces: the best constant answer."""
    table = every_run()
    return table.loc[table["split"] == "train", "age"].median()


if __name__ == "__main__":
    ev.record(ROOT / "figures", **results())
