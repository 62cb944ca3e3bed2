"""The real UTKFace, from its archive to the split: the numbers that the course tells."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

from utils.evaluation import label_noise, label_pairs
from utils.faces import Faces, near_duplicates, prepare, split_digest
from utils.model import load_weights
from utils.settings import CHECKPOINT, ROOT
from utils.sources import check, file_sha256, unpack
from utils.training import predict

ARCHIVE = os.environ.get("UTKFACE_ARCHIVE")
pytestmark = pytest.mark.skipif(not ARCHIVE, reason="needs UTKFACE_ARCHIVE, UTKFace's own archive")


class Run(NamedTuple):
    faces: Faces
    folder: Path
    seconds: float


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Run]:
    home = tmp_path_factory.mktemp("utkface")
    archive = Path(ARCHIVE).expanduser()
    start = time.monotonic()
    unpack(archive if archive.exists() else ROOT / archive, home / "UTKFace")
    faces = prepare(home / "UTKFace", home / "cache")
    yield Run(faces, home / "UTKFace", time.monotonic() - start)
    shutil.rmtree(home, ignore_errors=True)  # 1.3 GB, which pytest would keep for three runs


def test_from_archive_to_split_in_under_90_seconds(run):
    assert run.seconds < 90


def test_the_archive_holds_the_complete_original(run):
    report = check(run.folder)
    assert report.complete and report.files == 23_708


def test_three_names_are_malformed_and_all_else_is_usable(run):
    table, pixels, excluded = run.faces
    assert len(table) == 23_705
    assert pixels.shape == (23_705, 128, 128, 3)
    assert excluded["file"].tolist() == [
        "39_1_20170116174525125.jpg.chip.jpg",
        "61_1_20170109142408075.jpg.chip.jpg",
        "61_1_20170109150557335.jpg.chip.jpg",
    ]
    assert excluded["reason"].str.startswith("malformed name").all()
    for odd in ("55_0_0_20170116232725357jpg.chip.jpg", "24_0_1_20170116220224657 .jpg.chip.jpg"):
        assert odd in set(table["file"])


def test_who_is_in_it(run):
    table = run.faces.table
    assert table["ethnicity"].value_counts().to_dict() == {
        "White": 10_078, "Black": 4_526, "Indian": 3_975, "Asian": 3_434, "Others": 1_692,
    }  # fmt: skip
    assert (table["age"] == 26).sum() == 2_197
    assert (table["age"] == 1).sum() == 1_123
    assert (table["age"].min(), table["age"].max()) == (1, 116)
    constant = (table["age"] - table["age"].median()).abs().mean()
    assert constant == pytest.approx(14.97, abs=0.005)


def test_byte_identical_files_and_their_labels(run):
    table = run.faces.table
    copies = table[table.duplicated("sha256", keep=False)]
    assert len(copies) == 765
    assert copies["sha256"].nunique() == 375
    assert (copies.groupby("sha256")["group"].nunique() == 1).all()
    pairs = label_pairs(table)
    assert len(pairs) == 406
    assert (pairs["difference"] > 0).mean() == pytest.approx(0.54, abs=0.005)
    assert pairs["difference"].mean() == pytest.approx(4.1, abs=0.05)
    noise = label_noise(pairs)
    assert noise["value"] == pytest.approx(2.9, abs=0.05)
    assert noise["low"] < 2.7 and noise["high"] > 3.1


def test_no_near_duplicates_across_the_split(run):
    """Computed anew from the hashes, whatever the groups say."""
    table = run.faces.table
    hashes = np.stack([np.frombuffer(bytes.fromhex(hash_), np.uint8) for hash_ in table["dhash"]])
    part = table["split"].cat.codes.to_numpy()
    near, across = 0, 0
    for pairs in near_duplicates(hashes):
        near += len(pairs)
        across += (part[pairs[:, 0]] != part[pairs[:, 1]]).sum()
    assert near >= 1_000
    assert across == 0


def test_sizes_of_the_split(run):
    shares = run.faces.table["split"].value_counts(normalize=True).to_dict()
    assert shares == pytest.approx({"train": 0.8, "valid": 0.1, "test": 0.1}, abs=0.01)


def test_the_split_is_the_published_one(run):
    results = ROOT / "figures" / "results.json"
    digests = json.loads(results.read_text()).get("digests", {}) if results.is_file() else {}
    if "split" not in digests:
        pytest.skip("figures/results.json holds no split digest yet")
    assert split_digest(run.faces.table) == digests["split"]


def test_the_published_weights_give_the_published_error(run):
    """From the images to the MAE, with the checkpoint of this repository."""
    results = json.loads((ROOT / "figures" / "results.json").read_text())
    assert file_sha256(CHECKPOINT) == results["digests"]["checkpoint"]
    table = run.faces.table
    test = table[table["split"] == "test"]
    model, facts = load_weights(CHECKPOINT)
    assert facts["split_digest"] == split_digest(table)
    ages = predict(model, run.faces.pixels, test.index, flip=True)
    mae = np.abs(ages - test["age"]).mean()
    assert mae == pytest.approx(results["test_mae"]["value"], abs=0.02)
    shipped = pd.read_csv(ROOT / "figures" / "predictions_test.csv").set_index("file")["predicted"]
    assert np.abs(ages - shipped[test["file"]].to_numpy()).max() < 0.1
