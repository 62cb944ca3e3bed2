"""Your own faces: what labels.csv may look like, and what becomes of rows that cannot be used."""

import shutil
from pathlib import Path

import pytest

from utils.faces import prepare
from utils.labels import read_labels
from utils.settings import get_settings
from utils.sources import load_faces


@pytest.fixture
def folder(own_faces, tmp_path) -> Path:
    """Six images of the session's folder, without a labels.csv."""
    (tmp_path / "faces" / "album 0").mkdir(parents=True)
    for i, path in enumerate(sorted(own_faces.glob("album 0/*.JPG"))[:6]):
        shutil.copy(path, tmp_path / "faces" / "album 0" / f"{'abcdef'[i]}.jpg")
    return tmp_path / "faces"


def write(folder: Path, *lines: str, encoding: str = "utf-8") -> None:
    (folder / "labels.csv").write_text("\n".join(lines), encoding=encoding)


def test_a_folder_of_your_own_flows_like_any_other(own_faces, tmp_path, monkeypatch):
    monkeypatch.setenv("AGE_DATA", str(tmp_path))
    monkeypatch.setenv("AGE_FACES", str(own_faces))
    faces = load_faces(get_settings())
    table = faces.table
    assert len(table) == len(faces.pixels) == 156 - len(faces.excluded) > 150
    assert table["file"].is_monotonic_increasing
    assert table["file"].str.match(r"album \d/Bild \d+\.JPG").all()
    assert list(table["gender"].cat.categories) == ["f", "m"]
    assert list(table["ethnicity"].cat.categories) == ["NA", "Süd"], "NA is a name like any other"
    assert not table.isna().any(axis=None) and (table["brightness"] > 0).all()
    assert table.groupby("person")["split"].nunique().max() == 1
    assert table.groupby("sha256")["split"].nunique().max() == 1
    assert set(table["split"]) == {"train", "valid", "test"}
    again = load_faces(get_settings())
    assert again.table.equals(table)


def test_a_person_joins_groups_of_copies(folder, tmp_path):
    shutil.copy(folder / "album 0" / "a.jpg", folder / "copy of a.jpg")
    rows = ["album 0/a.jpg,30,x", "copy of a.jpg,31,", "album 0/b.jpg,30,x", "album 0/c.jpg,30,"]
    write(folder, "file,age,person", *rows)
    table = prepare(folder, tmp_path / "cache").table.set_index("file")
    assert table["group"].loc[["album 0/a.jpg", "copy of a.jpg", "album 0/b.jpg"]].nunique() == 1
    assert table["group"]["album 0/c.jpg"] == "album 0/c.jpg"
    write(folder, "file,age,group", *rows)
    assert (
        prepare(folder, tmp_path / "cache").table.set_index("file")["group"].equals(table["group"])
    )


@pytest.mark.parametrize(
    "lines",
    [
        ["file,age", "album 0/a.jpg,31"],
        ["\ufeffFile ; AGE", "album 0/a.jpg ;31.4"],
        ["age\tfile\tnotes", "30.6\talbum 0\\a.jpg\tx"],
        ['"file","age"', '"./album 0/a.jpg","31"'],
    ],
)
def test_tables_as_people_write_them(lines, folder):
    write(folder, *lines)
    found = dict(read_labels(folder))
    assert found["album 0/a.jpg"] == {
        "age": 31, "gender": "unknown", "ethnicity": "unknown", "person": "",
    }  # fmt: skip


def test_a_name_in_another_spelling_of_the_same_letters(folder):
    (folder / "album 0" / "a.jpg").rename(folder / "Ju\u0308rgen.jpg")  # as macOS may write it
    write(folder, "file,age", "J\u00fcrgen.jpg,40")
    assert dict(read_labels(folder))["Ju\u0308rgen.jpg"]["age"] == 40


@pytest.mark.fault(
    "a labels.csv with bad rows", "each is left out, counted, and listed with its reason"
)
def test_rows_that_cannot_be_used_are_listed(folder, tmp_path):
    (folder / "album 0" / "f.jpg").write_bytes(b"no image")
    shutil.copy(folder / "album 0" / "a.jpg", tmp_path / "outside.jpg")
    write(
        folder, "file,age", "album 0/a.jpg,30", "album 0/a.jpg,31", "album 0/b.jpg,dreißig",
        "album 0/c.jpg,-1", "album 0/d.jpg,121", "album 0/f.jpg,50", "gone.jpg,20",
        "../outside.jpg,20", ",20", "album 0/g.jpg",
    )  # fmt: skip
    faces = prepare(folder, tmp_path / "cache")
    assert faces.table["file"].tolist() == ["album 0/a.jpg"]
    assert sorted(faces.excluded.itertuples(index=False, name=None)) == [
        ("../outside.jpg", "no such image in the folder"),
        ("album 0/a.jpg", "a second row of labels.csv for this file"),
        ("album 0/b.jpg", "age 'dreißig' is not a number"),
        ("album 0/c.jpg", "age -1 is not between 0 and 120 years"),
        ("album 0/d.jpg", "age 121 is not between 0 and 120 years"),
        ("album 0/e.jpg", "no row in labels.csv"),
        ("album 0/f.jpg", "cannot be decoded: damaged, cut off or not an image"),
        ("album 0/g.jpg", "no such image in the folder"),
        ("gone.jpg", "no such image in the folder"),
        ("labels.csv", "a row without a file name"),
    ]


def test_a_changed_label_gives_another_cache(folder, tmp_path):
    write(folder, "file,age", "album 0/a.jpg,30")
    assert prepare(folder, tmp_path / "cache").table["age"].tolist() == [30]
    write(folder, "file,age", "album 0/a.jpg,31")
    assert prepare(folder, tmp_path / "cache").table["age"].tolist() == [31]
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


@pytest.mark.fault("a labels.csv with bad rows")
def test_a_file_that_is_no_table_is_refused(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("AGE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("AGE_FACES", str(folder))
    with pytest.raises(FileNotFoundError, match="labels.csv is not there.*file and age"):
        load_faces(get_settings())
    write(folder, "name,years", "a.jpg,30")
    with pytest.raises(ValueError, match="labels.csv has the columns name, years: 'file' and"):
        load_faces(get_settings())
    for text in (b"", b"file,age\nJ\xfcrgen.jpg,3\n", b'file,age\n"a.jpg,3\n'):
        (folder / "labels.csv").write_bytes(text)
        with pytest.raises(ValueError, match="labels.csv is no CSV in UTF-8.*save it as"):
            load_faces(get_settings())
    write(folder, "file,age", "a.jpg,x")
    with pytest.raises(FileNotFoundError, match="no usable face .*no such image in the folder"):
        load_faces(get_settings())
