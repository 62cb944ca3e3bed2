"""The model's recipe on the split that papers report since CORAL (Cao et al., 2020).

    python .ci/coral_split.py utk_train.csv utk_test.csv

The two files (columns file and age, the age minus 21) hold ages 21 to 60 only. Trains on rows of
the first file, a tenth of them kept for validation, and tests once on the second, whose near
duplicates in the first are counted. Writes `coral_test_mae`, `coral_test_cs5` and
`coral_test_mae_without_duplicates` to results.json where AGE_PUBLISH=1.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import evaluation
from utils.faces import load_faces
from utils.settings import get_settings
from utils.training import predict, train

YOUNGEST, OLDEST = 21, 60


def coral_table(table: pd.DataFrame, train_file: Path, test_file: Path) -> pd.DataFrame:
    """The face table with the split of the two files; rows of neither have no split.

    Training rows without a usable face are counted and left out. Raises ValueError where a test
    row has none, or where the ages are not those of the file names.
    """
    ages = table.set_index("file")["age"]
    split = pd.Series("", index=ages.index)
    for file, part in ((train_file, "train"), (test_file, "test")):
        rows = pd.read_csv(file)
        absent = ~rows["file"].isin(ages.index)
        if absent.any():
            message = (
                f"{file}: {absent.sum()} of {len(rows)} faces are not in the face table, "
                f"first {rows['file'][absent].iloc[0]}"
            )
            if part == "test":
                raise ValueError(message)
            print(f"{message}: left out")
        rows = rows[~absent]
        wrong = ages[rows["file"]].to_numpy() != rows["age"] + YOUNGEST
        if wrong.any():
            raise ValueError(f"{file}: {wrong.sum()} ages are not those of the file names + 21")
        split[rows["file"]] = part
    split = split.to_numpy()
    split[(split == "train") & (table["split"] == "valid")] = "valid"
    return table.assign(split=split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("train_file", type=Path)
    parser.add_argument("test_file", type=Path)
    parser.add_argument("--epochs", type=int, help="instead of the settings' number")
    given = parser.parse_args()
    settings = get_settings("utkface")
    faces = load_faces(settings)
    table = coral_table(faces.table, given.train_file, given.test_file)
    print(table["split"].value_counts().drop("").to_string())
    settings = replace(settings, epochs=given.epochs or settings.epochs)
    run = settings.runs / "coral_split"
    model = train(faces._replace(table=table), settings, run, progress=False)
    test = table[table["split"] == "test"].copy()
    ages = predict(model, faces.pixels, test.index, flip=True)
    test["predicted"] = np.clip(ages, YOUNGEST, OLDEST)
    result = evaluation.metrics(test)
    known = test["group"].isin(table["group"][table["split"].isin(["train", "valid"])])
    print(result.round(3).to_string())
    alone = evaluation.metrics(test[~known]).loc["MAE"]
    print(f"{known.sum()} of {len(test)} test faces have a near duplicate among the training rows;")
    print("without them: MAE", evaluation.show(alone))
    if settings.publish:
        figures = {"coral_test_mae": result.loc["MAE"], "coral_test_cs5": result.loc["CS@5"]}
        evaluation.record(settings.figures, **figures, coral_test_mae_without_duplicates=alone)


if __name__ == "__main__":
    main()
