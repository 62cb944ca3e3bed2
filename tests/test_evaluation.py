"""Figures and intervals: right on examples worked by hand, honest on simulated ones."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from utils.evaluation import (
    age_band,
    as_figures,
    constant_errors,
    label_noise,
    label_pairs,
    mean_interval,
    metrics,
    metrics_by,
    ratio_interval,
    record,
    show,
)
from utils.settings import ROOT


def predictions() -> pd.DataFrame:
    """Errors of +2, -4, +5 and -9 years."""
    return pd.DataFrame({
        "age": [20, 30, 40, 50],
        "predicted": [22.0, 26.0, 45.0, 41.0],
        "group": list("abcd"),
        "gender": ["male", "male", "female", "female"],
    })  # fmt: skip


def width(figure: dict) -> float:
    return figure["high"] - figure["low"]


def test_ratio_is_of_the_same_faces():
    """A ratio that is the same for every face has no width; clusters widen it otherwise."""
    rng = np.random.default_rng(0)
    base = rng.gamma(2, 2, 300)
    same = ratio_interval(1.5 * base, base, pd.Series(range(300)))
    assert [same[key] for key in ("value", "low", "high")] == pytest.approx([1.5] * 3)
    other = rng.gamma(2, 3, 300)
    figure = ratio_interval(other, base, pd.Series(range(300)))
    assert figure["value"] == pytest.approx(other.mean() / base.mean()) and figure["n"] == 300
    spread = figure["value"] * np.sqrt(sum((v.std() / v.mean()) ** 2 / 300 for v in (other, base)))
    assert figure["high"] - figure["low"] == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_metrics_by_hand():
    figures = metrics(predictions())
    assert list(figures.index) == ["MAE", "CS@5", "bias"]
    assert figures["value"].to_dict() == {"MAE": 5.0, "CS@5": 0.75, "bias": -1.5}
    assert (figures["n"] == 4).all() and figures["n"].dtype.kind == "i"
    assert (figures["low"] <= figures["value"]).all()
    assert (figures["value"] <= figures["high"]).all()


def test_metrics_by_column_and_by_series():
    rows = predictions()
    mae = metrics_by(rows, "gender")
    assert mae["value"].to_dict() == {"female": 7.0, "male": 3.0}
    assert mae["n"].to_dict() == {"female": 2, "male": 2}
    assert mae.index.name == "gender"
    bias = metrics_by(rows, age_band(rows["age"]).rename("band"), "bias")
    assert bias["value"].to_dict() == {"20-29": 2, "30-39": -4, "40-49": 5, "50-59": -9}
    assert bias.index.name == "band"


def test_a_single_face_and_no_face():
    one = mean_interval([3.0], pd.Series(["a"]))
    assert one == {"value": 3.0, "low": 3.0, "high": 3.0, "n": 1}
    none = mean_interval([], pd.Series([], dtype=str))
    assert none["n"] == 0
    assert all(np.isnan(none[key]) for key in ("value", "low", "high"))


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """95 % is the aim; with 200 repeats, 90 to 99 % is what chance and few draws leave."""
    rng = np.random.default_rng(0)
    faces_of = np.repeat(np.arange(60), 1 + np.arange(60) % 3)  # groups of one, two and three
    hits = 0
    for _ in range(200):
        values = 4 + rng.normal(0, 2, 60)[faces_of] + rng.normal(0, 1, len(faces_of))
        figure = mean_interval(values, pd.Series(faces_of), draws=300)
        hits += figure["low"] <= 4 <= figure["high"]
    assert 0.90 <= hits / 200 <= 0.99


def test_copies_do_not_make_an_interval_narrower():
    """Each error twice: as if it were news the interval shrinks by root two; by group it stays."""
    errors = np.random.default_rng(1).gamma(2, 2.5, 400)
    once = mean_interval(errors, pd.Series(range(400)))
    naive = mean_interval(np.repeat(errors, 2), pd.Series(range(800)))
    by_group = mean_interval(np.repeat(errors, 2), pd.Series(np.repeat(np.arange(400), 2)))
    assert width(by_group) == pytest.approx(width(once), rel=0.1)
    assert width(by_group) / width(naive) == pytest.approx(np.sqrt(2), rel=0.1)
    assert by_group["n"] == 800


def test_an_interval_is_the_same_each_time_and_shrinks_with_n():
    errors = pd.Series(np.random.default_rng(2).normal(5, 3, 1600))
    names = pd.Series(range(1600)).astype(str)
    assert mean_interval(errors, names) == mean_interval(errors, names)
    few = mean_interval(errors[:100], names[:100])
    many = mean_interval(errors, names)
    assert width(few) / width(many) == pytest.approx(4, rel=0.25)
    assert width(many) == pytest.approx(2 * 1.96 * 3 / 40, rel=0.1)


def test_the_constant_baseline_is_the_training_median():
    train = pd.DataFrame({"age": [1, 2, 30, 40, 90]})
    assert constant_errors(train, pd.DataFrame({"age": [30, 20, 75]})).tolist() == [0, 10, 45]


def test_edges_of_age_bands():
    ages = pd.Series([0, 9, 10, 19, 20, 69, 70, 116])
    bands = ["0-9", "0-9", "10-19", "10-19", "20-29", "60-69", "70+", "70+"]
    assert age_band(ages).tolist() == bands
    assert age_band(ages).cat.ordered


def test_pairs_of_identical_files():
    """A pair gives one pair of labels, a triple gives three, a single file none."""
    table = pd.DataFrame({
        "file": ["a", "b", "c", "d", "e", "f"],
        "age": [20, 30, 26, 5, 30, 33],
        "sha256": ["two", "three", "two", "one", "three", "three"],
        "group": ["a", "b", "a", "d", "b", "b"],
    })  # fmt: skip
    pairs = label_pairs(table).set_index(["file", "other_file"])["difference"]
    assert pairs.to_dict() == {("a", "c"): 6, ("b", "e"): 0, ("b", "f"): 3, ("e", "f"): 3}
    alone = label_pairs(table.drop_duplicates("sha256"))
    assert len(alone) == 0
    assert label_noise(alone)["n"] == 0


def test_label_noise_recovers_a_known_spread():
    """Labels with normal errors of 3 years have a mean absolute error of 3 sqrt(2 / pi)."""
    rng = np.random.default_rng(3)
    truth = np.repeat(rng.uniform(1, 80, 2000), 2)
    same = np.repeat(np.arange(2000), 2)
    table = pd.DataFrame({
        "file": np.arange(4000).astype(str),
        "age": truth + rng.normal(0, 3, 4000),
        "sha256": same,
        "group": same,
    })  # fmt: skip
    noise = label_noise(label_pairs(table))
    expected = 3 * np.sqrt(2 / np.pi)
    assert noise["n"] == 2000
    assert noise["value"] == pytest.approx(expected, rel=0.03)
    assert noise["low"] <= expected <= noise["high"]


def results(folder: Path) -> dict:
    """What stands in the file, read strictly: JSON knows neither NaN nor Infinity."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is not JSON")

    return json.loads((folder / "results.json").read_text(), parse_constant=refuse)


def test_record_adds_and_replaces_and_keeps_the_rest(tmp_path):
    folder = tmp_path / "new" / "figures"
    record(folder, faces=23705, digests={"split": "abc"})
    record(folder, test={"MAE": {"value": np.float64(4.123456), "n": np.int64(7)}}, faces=5)
    assert results(folder) == {
        "digests": {"split": "abc"},
        "faces": 5,
        "test": {"MAE": {"value": 4.1235, "n": 7}},
    }


def test_record_keeps_four_digits_of_small_figures(tmp_path):
    record(tmp_path, p=0.000123456, rate=5e-4, share=0.123456, none=0.0)
    assert results(tmp_path) == {"p": 0.0001235, "rate": 0.0005, "share": 0.1235, "none": 0.0}


@pytest.mark.fault("two notebooks that record results at once", "both are kept")
def test_two_notebooks_record_at_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(record, tmp_path, **{f"figure_{i}": i}) for i in range(40)]
        [job.result() for job in jobs]
    assert results(tmp_path) == {f"figure_{i}": i for i in range(40)}


@pytest.mark.fault("killed while recording results", "the file holds the former results, whole")
def test_killed_while_recording(tmp_path):
    record(tmp_path, good=1)
    code = (
        "import os, signal, sys; from pathlib import Path; from utils import evaluation\n"
        "write = Path.write_text\n"
        "def half(path, text):\n"
        "    write(path, text[: len(text) // 2])\n"
        "    os.kill(os.getpid(), getattr(signal, 'SIGKILL', signal.SIGTERM))\n"
        "Path.write_text = half\n"
        "evaluation.record(Path(sys.argv[1]), good=2, more=list(range(1000)))"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=120)
    assert ended.returncode != 0 and results(tmp_path) == {"good": 1}
    record(tmp_path, more=3)
    assert results(tmp_path) == {"good": 1, "more": 3}


def test_record_takes_tables_of_figures(tmp_path):
    record(tmp_path, by_gender=as_figures(metrics_by(predictions(), "gender")))
    by_gender = results(tmp_path)["by_gender"]
    assert list(by_gender["male"]) == ["high", "low", "n", "value"]
    assert (by_gender["male"]["value"], by_gender["male"]["n"]) == (3.0, 2)


def test_record_writes_the_same_text_for_the_same_figures(tmp_path):
    record(tmp_path / "one", b=1, a=0.25)
    record(tmp_path / "two", a=0.25)
    record(tmp_path / "two", b=1)
    texts = {(tmp_path / run / "results.json").read_text() for run in ("one", "two")}
    assert len(texts) == 1


def test_record_writes_a_missing_figure_as_null(tmp_path):
    record(tmp_path, empty=mean_interval([], pd.Series([], dtype=str)))
    assert results(tmp_path)["empty"] == {"value": None, "low": None, "high": None, "n": 0}


@pytest.mark.parametrize("figure", [Path("x"), {1, 2}, np.arange(3), pd.Timestamp(0)])
def test_record_refuses_unknown_types_and_leaves_the_file_alone(tmp_path, figure):
    record(tmp_path, good=1)
    with pytest.raises(TypeError, match=f"results.json: {type(figure).__name__}"):
        record(tmp_path, good=2, bad=figure)
    assert results(tmp_path) == {"good": 1}


def test_a_figure_as_text():
    figure = {"value": 4.899, "low": 4.706, "high": 5.1, "n": 2384}
    assert show(figure) == "4.90 [4.71, 5.10], n = 2,384"
    assert show(pd.Series(figure), digits=1) == "4.9 [4.7, 5.1], n = 2,384"
