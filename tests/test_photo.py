"""Photos as people have them, faults with their messages, and the way from a photo to a chip."""

import io
import os
import re
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from utils import photo
from utils.photo import LANDMARKS, Face, align, decode_photo, get_crops, read_photo
from utils.settings import CHIP_SIZE
from utils.synthetic import draw_face, get_person

DETECTOR = os.environ.get("AGE_FACE_DETECTOR")
needs_detector = pytest.mark.skipif(not DETECTOR, reason="needs AGE_FACE_DETECTOR, YuNet's file")


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    return draw_face(get_person(0, 7, gap=False))


def encode(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def change(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "WEBP", "BMP"])
def test_every_kind_of_file_gives_the_picture(tmp_path, face, kind):
    path = tmp_path / "Grüße 写真.jpg"  # the ending does not decide
    path.write_bytes(encode(Image.fromarray(face), kind, quality=95))
    seen = read_photo(path)
    assert seen.shape == face.shape and seen.dtype == np.uint8
    assert change(seen, face).mean() < (0.01 if kind in ("PNG", "BMP") else 5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_exif_says(face, orientation):
    stored, exif = Image.fromarray(face[:, :96]), Image.Exif()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> PIL.Image.Transpose
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif[0x0112] = orientation
    assert np.array_equal(decode_photo(encode(stored, "PNG", exif=exif), "x.png"), face[:, :96])


def test_grey_palette_cmyk_sixteen_bits_and_what_is_transparent(face):
    picture, grey = Image.fromarray(face), cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    clear = Image.fromarray(np.dstack([face, np.where(grey > 99, 255, 0).astype(np.uint8)]))
    half = np.where(grey[..., None] > 99, face, photo.GROUND)
    for data, expected, limit in [
        (encode(picture.convert("L"), "PNG"), np.dstack([grey] * 3), 0.01),
        (encode(picture.convert("P", palette=1, colors=256), "PNG"), face, 8),
        (encode(picture.convert("CMYK"), "JPEG", quality=95), face, 6),
        (encode(deep, "PNG"), np.dstack([grey] * 3), 0),
        (cv2.imencode(".png", face[..., ::-1].astype(np.uint16) * 257)[1].tobytes(), face, 0),
        (encode(clear, "PNG"), half, 0),
        (encode(Image.new("LA", (4, 4), (200, 0)), "PNG"), np.full((4, 4, 3), photo.GROUND), 0),
    ]:
        seen = decode_photo(data, "x")
        assert seen.shape == expected.shape and change(seen, expected).mean() <= limit


JPEG, PNG = (encode(Image.effect_noise((64, 64), 50), kind) for kind in ("JPEG", "PNG"))
WEBP = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "WEBP")
NOT_A_PICTURE = "is no JPEG, PNG, WebP or BMP: convert HEIC and PDF (LFS pointer: git lfs pull)"
FAULTS = {
    "empty": (b"", NOT_A_PICTURE),
    "text": (b"not a picture", NOT_A_PICTURE),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", NOT_A_PICTURE),
    "avif": (b"\0\0\0\x0aftypavif\0\0\0\0mif1avif", NOT_A_PICTURE),
    "gif": (encode(Image.new("L", (9, 9)), "GIF"), NOT_A_PICTURE),
    "noise in a JPEG": (JPEG[:200] + bytes(2000), "is damaged or cut off|is no JPEG"),
    "bomb": (encode(Image.new("1", (20_000, 20_000)), "PNG"), "100 megapixels: not opened"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_photo_is_refused_by_name(tmp_path, fault):
    data, messages = FAULTS[fault]
    reasons = "|".join(map(re.escape, messages.split("|")))
    (tmp_path / "Foto von mir.jpg").write_bytes(data)
    with pytest.raises(ValueError, match=f"^Foto von mir.jpg .*({reasons})"):
        read_photo(tmp_path / "Foto von mir.jpg")


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_a_file_cut_anywhere_is_refused(share):
    for data in (JPEG, PNG, WEBP):
        with pytest.raises(ValueError, match="^cut.jpg is (damaged or cut off|no JPEG)"):
            decode_photo(data[: max(int(share * len(data)), 1)], "cut.jpg")


@needs_detector
def test_the_detector_is_fetched_once(tmp_path, monkeypatch):
    monkeypatch.delenv("AGE_FACE_DETECTOR")
    monkeypatch.setenv("AGE_DATA", str(tmp_path))
    for url in (Path(DETECTOR).resolve().as_uri(), "http://127.0.0.1:9/"):
        monkeypatch.setattr(photo, "DETECTOR_URL", url)
        photo.load_detector.cache_clear()
        photo.load_detector()
    assert (tmp_path / photo.DETECTOR).read_bytes() == Path(DETECTOR).read_bytes()


def test_without_a_network_or_with_another_file_the_way_out_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("AGE_FACE_DETECTOR", raising=False)
    monkeypatch.setenv("AGE_DATA", str(tmp_path))
    photo.load_detector.cache_clear()
    (tmp_path / "page.html").write_text("<html>sign in</html>")
    for url in ("http://127.0.0.1:9/", (tmp_path / "page.html").as_uri()):
        monkeypatch.setattr(photo, "DETECTOR_URL", url)
        with pytest.raises(ConnectionError, match=f"{url}.*AGE_FACE_DETECTOR.*--crop"):
            photo.load_detector()
        assert not (tmp_path / photo.DETECTOR).exists()


def test_a_named_detector_that_is_missing_or_another_file(tmp_path, monkeypatch):
    monkeypatch.setenv("AGE_FACE_DETECTOR", str(tmp_path / "yunet.onnx"))
    photo.load_detector.cache_clear()
    for _ in range(2):
        with pytest.raises(ValueError, match="names .*yunet.onnx, not this detector.*--crop"):
            photo.load_detector()
        (tmp_path / "yunet.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")


@needs_detector
@pytest.mark.parametrize("size, lefts, h, w", [
    (160, (700, 20, 300), 500, 900), (2400, (50,), 2600, 3000), (400, (50,), 3000, 4000),
    (60, (50,), 250, 300), (0, (), 300, 400),
])  # fmt: skip
def test_faces_of_any_size_are_found_from_left_to_right(face, size, lefts, h, w):
    picture = np.full((h, w, 3), (176, 196, 206), np.uint8)
    for left in lefts:
        picture[100 : 100 + size, left : left + size] = cv2.resize(face, (size, size))
    for found, left in zip(photo.find_faces(picture), sorted(lefts), strict=True):
        middle = (found.landmarks.mean(0) - (left, 100)) / size
        assert np.abs(middle - (0.5, 0.48)).max() < 0.06


@needs_detector
def test_a_real_face_and_its_mirror_image_have_the_same_landmarks():
    astronaut = pytest.importorskip("skimage.data").astronaut()
    (found,) = photo.find_faces(astronaut)
    (mirrored,) = photo.find_faces(astronaut[:, ::-1])
    points = mirrored.landmarks[photo.MIRRORED] * (-1, 1) + (astronaut.shape[1], 0)
    assert np.abs(found.box - (178, 63, 90, 113)).max() < 2
    assert np.abs(points - found.landmarks).max() < 0.02 * found.box[2]


def test_a_crop_needs_no_detector_and_has_three_views(face, monkeypatch):
    monkeypatch.setenv("AGE_FACE_DETECTOR", "/nowhere")
    (crop,) = get_crops(np.pad(face, [(0, 0), (20, 20), (0, 0)], "edge"), crop=True)
    assert crop.face is None and not crop.refused
    for chip, margin in zip(crop.chips, (0, -0.025, 0.025), strict=True):
        assert change(chip, align(face, LANDMARKS * CHIP_SIZE, margin)).max() <= 2


@needs_detector
@pytest.mark.skipif(not os.environ.get("UTKFACE_ARCHIVE"), reason="needs UTKFACE_ARCHIVE")
def test_landmarks_are_those_of_utkface():
    """The constants, measured anew on sixty chips of the archive, padded by half their side."""
    known = []
    with tarfile.open(os.environ["UTKFACE_ARCHIVE"]) as packed:
        chips = (packed.extractfile(info).read() for info in packed if ".jpg" in info.name)
        for data, _ in zip(chips, range(60), strict=False):
            chip = decode_photo(data, "chip")
            padded = np.pad(chip, [(100, 100), (100, 100), (0, 0)], "edge")
            known += [face.landmarks / len(chip) - 0.5 for face in photo.find_faces(padded)]
    assert len(known) >= 58
    assert np.abs(np.median(known, 0) - LANDMARKS).max() < 0.015


def landmarks_at(angle: float, side: float, middle: tuple[float, float]) -> np.ndarray:
    turn = np.exp(1j * np.radians(angle)) * (LANDMARKS - 0.5) @ [1, 1j]
    return np.column_stack([turn.real, turn.imag]) * side + middle


@pytest.mark.parametrize(("angle", "side"), [(0, 128), (30, 60), (-90, 500), (180, 1600)])
def test_align_brings_back_the_chip(face, angle, side):
    """A chip drawn into a photo at any turn and size comes back as it was, but for resampling."""
    middle, soft = (1100.0, 1050.0), cv2.GaussianBlur(face, (0, 0), 2)
    points = landmarks_at(angle, side, middle)
    forth = cv2.getRotationMatrix2D((0, 0), -angle, side / CHIP_SIZE)
    forth[:, 2] = middle - forth[:, :2] @ np.full(2, CHIP_SIZE / 2 - 0.5) - 0.5
    chip = align(cv2.warpAffine(soft, forth, (2300, 2200)), points)
    assert change(chip, soft)[12:-12, 12:-12].mean() < (4 if side == 60 else 1.5)


def test_a_fine_pattern_is_averaged_and_not_sampled():
    """Stripes of one pixel in a large photo become grey; plain sampling would give stripes."""
    stripes = np.zeros((1500, 1500, 3), np.uint8)
    stripes[:, ::2] = 255
    assert change(align(stripes, landmarks_at(0, 700, (750, 750))), 127).max() < 30


def test_a_good_face_passes_and_each_fault_is_named(face):
    points, blurred = landmarks_at(10, 300, (450, 300)), cv2.GaussianBlur(face, (0, 0), 12)
    away = points + np.array([(0, 0), (0, 0), (70, 0), (0, 0), (0, 0)])
    for chip, landmarks, text, refused in [
        (face // 4, points, "dark: mean brightness", False),
        (face // 64, points, "too dark: mean brightness", True),
        (255 - (255 - face) // 5, points, "bright: mean brightness", False),
        (cv2.GaussianBlur(face, (0, 0), 3), points, "blurred: sharpness", False),
        (blurred, points, "too blurred: sharpness", True),
        (blurred // 8, points, "dark: ", False),  # what is dark is not called blurred
        (face, landmarks_at(0, 30, (450, 300)), "small: 30 px wide", False),
        (face, landmarks_at(0, 9, (450, 300)), "too small: 9 px wide", True),
        (face, away, "turned away: eyes, nose and mouth are out of place", False),
        (face, landmarks_at(0, 300, (60, 300)), "cut off: 31% outside", False),
        (face, landmarks_at(0, 300, (0, 300)), "too cut off: 50% outside", True),
    ]:
        texts, refuses = photo.judge(chip, Face(np.zeros(4), landmarks, 0.9), (600, 900))
        assert len(texts) == 1 and texts[0].startswith(text) and refuses == refused
    assert photo.judge(face, Face(np.zeros(4), points, 0.9), (600, 900)) == ([], False)
