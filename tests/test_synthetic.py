"""The drawn sample: always the same bytes, and everything planted in it is known."""

import hashlib
import re
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from utils import faces, synthetic
from utils.settings import CHIP_SIZE, ROOT

COUNT = 100
DIGEST = "d4783729ac310a8c6b6b3f94ed69646ea4bd92728c3bc39bba372cfdc1340118"  # of names and bytes
FILE_NAME = re.compile(r"\d{1,3}_[01]_[0-4]_\d{17} ?\.jpg\.chip\.jpg")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "sample"
    synthetic.draw_sample(folder, COUNT)
    return folder


@pytest.fixture(scope="module")
def plan():
    return synthetic.plan_sample(4000)


def test_a_sample_is_always_the_same_and_another_seed_another(sample, tmp_path):
    digest = hashlib.sha256()
    for file in sorted(sample.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    assert digest.hexdigest() == DIGEST
    synthetic.draw_sample(tmp_path / "other", 50, seed=1)
    mine, other = ({f.read_bytes() for f in d.iterdir()} for d in (sample, tmp_path / "other"))
    assert not mine & other


def test_names_are_utkfaces(plan):
    assert len({name for name, _, _ in plan}) == 4000
    for name, person, defect in plan:
        assert (FILE_NAME.fullmatch(name) is None) == (defect == "malformed")
        assert (" " in name) == (defect == "space")
        assert name.startswith(f"{person.label}_{person.gender}_")
        assert 1 <= person.age <= 100 and person.label >= 1


def test_files_are_chips_but_for_one_cut_short_and_copies_are_near(sample):
    plan, first, kinds = synthetic.plan_sample(COUNT), {}, set()
    assert sorted(d for _, _, d in plan if d) == ["corrupt", *["malformed"] * 3, "space"]
    assert {name for name, _, _ in plan} == {file.name for file in sample.iterdir()}
    for name, person, defect in plan:
        data, image = (sample / name).read_bytes(), cv2.imread(str(sample / name))
        assert (image is None) == (defect == "corrupt")
        if image is None:
            continue
        assert image.shape == (CHIP_SIZE, CHIP_SIZE, 3)
        original, pixels = first.setdefault(person.index, (data, image))
        if person.copy:
            assert (data == original) == (person.kind == "identical")
            assert cv2.absdiff(image, pixels).mean() < 8
            kinds.add(person.kind)
    assert len(kinds) > 1


def test_the_gap_makes_one_group_darker_and_noisier_and_its_control_none():
    for gap, brightness, grain in ((True, (0, 0.5), (3, 99)), (False, (0.88, 1.12), (0.88, 1.12))):
        chosen = [synthetic.get_person(0, k, gap=gap) for k in range(120)]
        photos = [synthetic.draw_face(person).astype(np.float32) for person in chosen]
        light = np.array([photo.mean() for photo in photos])
        rough = np.array([np.abs(cv2.Laplacian(p, cv2.CV_32F)).mean() for p in photos]) / light
        group = np.array([person.ethnicity == 3 for person in chosen])
        for values, (low, high) in ((light, brightness), (rough, grain)):
            assert low < values[group].mean() / values[~group].mean() < high
        for k, person in enumerate(chosen):
            control = synthetic.get_person(0, k, gap=not gap)
            assert control._replace(exposure=person.exposure) == person
            assert (control.exposure == person.exposure) == (person.ethnicity != 3)


def test_killed_half_way_leaves_no_sample_and_a_used_folder_is_refused(tmp_path, monkeypatch):
    settings = SimpleNamespace(faces="sample", folder=tmp_path / "sample", cache=tmp_path / "cache")
    code = "import sys, pathlib, utils.download as d, utils.synthetic as s; "
    code += "d.make_once(pathlib.Path(sys.argv[1]), s.draw_sample)"
    process = subprocess.Popen([sys.executable, "-c", code, str(settings.folder)], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".sample*/*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait(20) != 0
    assert list(tmp_path.glob(".sample*/*.jpg")) and not settings.folder.exists()
    monkeypatch.setattr(faces, "draw_sample", partial(synthetic.draw_sample, count=50))
    assert (
        len(faces.load_faces(settings).table) == 46 and len(list(settings.folder.iterdir())) == 50
    )
    with pytest.raises(FileExistsError, match="remove it"):
        synthetic.draw_sample(settings.folder, 50)
