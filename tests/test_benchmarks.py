"""What the benchmarks take from outside: the files of a published split."""

import sys
from pathlib import Path

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from coral_split import coral_table


@pytest.fixture
def table() -> pd.DataFrame:
    ages = [21, 30, 40, 60, 5]
    names = [f"{age}_0_0_{i}.jpg" for i, age in enumerate(ages)]
    split = ["train", "valid", "test", "valid", "train"]
    return pd.DataFrame({"file": names, "age": ages, "split": split})


def write(folder: Path, name: str, rows: pd.DataFrame, shift: int = 21) -> Path:
    rows.assign(age=rows["age"] - shift)[["file", "age"]].to_csv(folder / name)
    return folder / name


def test_split_of_the_files(table, tmp_path, capsys):
    extra = pd.concat([table.iloc[:3], pd.DataFrame({"file": ["39_1_x.jpg"], "age": [39]})])
    train = write(tmp_path, "train.csv", extra)
    test = write(tmp_path, "test.csv", table.iloc[3:4])
    split = coral_table(table, train, test)["split"]
    assert list(split) == ["train", "valid", "train", "test", ""]
    assert "1 of 4 faces are not in the face table, first 39_1_x.jpg" in capsys.readouterr().out
    with pytest.raises(ValueError, match="1 of 4 faces are not"):
        coral_table(table, test, train)
    with pytest.raises(ValueError, match="1 ages are not those of the file names"):
        coral_table(table, train, write(tmp_path, "wrong.csv", table.iloc[3:4], shift=20))
