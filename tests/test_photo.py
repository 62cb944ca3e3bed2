"""Photos as people have them, faults with their messages, and the way from a photo to a chip."""

import io
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from utils import photo
from utils.photo import LANDMARKS, Face, align, decode_photo, get_crops, read_photo, similarity
from utils.settings import CHIP_SIZE
from utils.synthetic import draw_face, get_person

DETECTOR = os.environ.get("AGE_FACE_DETECTOR")
needs_detector = pytest.mark.skipif(not DETECTOR, reason="needs AGE_FACE_DETECTOR, YuNet's file")


@pytest.fixture(autouse=True)
def no_detector_kept():
    """No test uses the detector that another one has loaded."""
    photo._open_detector.cache_clear()
    yield
    photo._open_detector.cache_clear()


@pytest.fixture(scope="module")
def face() -> np.ndarray:
    return draw_face(get_person(0, 7, gap=False))[0]


def encode(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def scene(face: np.ndarray, size: int = 240, places: tuple = (80,), shape=(500, 900)) -> np.ndarray:
    """A drawn face, or the same several times, on a plain ground."""
    photo_ = np.full((*shape, 3), (176, 196, 206), np.uint8)
    for left in places:
        photo_[100 : 100 + size, left : left + size] = cv2.resize(face, (size, size))
    return photo_


# Reading


@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"quality": 95}), ("JPEG", {"quality": 95, "progressive": True}), ("PNG", {}),
     ("WEBP", {"quality": 95}), ("WEBP", {"lossless": True}), ("BMP", {}),
     ("MPO", {"quality": 95})],
)  # fmt: skip
def test_every_kind_of_file_gives_the_picture(tmp_path, face, kind, options):
    path = tmp_path / "Grüße 写真.jpg"  # the ending does not decide
    path.write_bytes(encode(Image.fromarray(face), kind, **options))
    seen = read_photo(path)
    assert seen.shape == face.shape and seen.dtype == np.uint8
    assert np.abs(seen.astype(int) - face).mean() < (5 if "quality" in options else 0.01)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_exif_says(face, orientation):
    upright = Image.fromarray(face[:, :96])
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # orientation -> PIL.Image.Transpose
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    seen = decode_photo(encode(stored, "PNG", exif=exif), "x.png")
    assert np.array_equal(seen, face[:, :96])


def test_grey_palette_and_cmyk(face):
    picture = Image.fromarray(face)
    grey = decode_photo(encode(picture.convert("L"), "JPEG", quality=95), "x.jpg")
    assert grey.shape == face.shape and np.ptp(grey, axis=2).max() == 0
    palette = decode_photo(encode(picture.convert("P", palette=1, colors=256), "PNG"), "x.png")
    assert np.abs(palette.astype(int) - face).mean() < 8
    cmyk = decode_photo(encode(picture.convert("CMYK"), "JPEG", quality=95), "x.jpg")
    assert np.abs(cmyk.astype(int) - face).mean() < 6


def test_what_is_transparent_is_laid_on_grey(face):
    picture = np.dstack([face, np.full(face.shape[:2], 255, np.uint8)])
    picture[:40, :, 3] = 0
    seen = decode_photo(encode(Image.fromarray(picture), "PNG"), "x.png")
    assert (seen[:40] == photo.GROUND).all() and np.array_equal(seen[40:], face[40:])
    half = Image.fromarray(np.full((4, 4, 2), (200, 0), np.uint8), "LA")
    assert (decode_photo(encode(half, "PNG"), "x.png") == photo.GROUND).all()


def test_sixteen_bits_are_scaled_and_not_clipped(face):
    grey = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)
    seen = decode_photo(encode(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"), "x.png")
    assert np.array_equal(seen[..., 0], grey)
    colour = cv2.imencode(".png", face[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    assert np.abs(decode_photo(colour, "x.png").astype(int) - face).max() <= 1


def test_twenty_megapixels_and_a_screenshot():
    large = Image.new("RGB", (5472, 3648), (90, 120, 150))
    assert read_size(encode(large, "JPEG")) == (3648, 5472, 3)
    assert read_size(encode(Image.new("RGBA", (2560, 1440)), "PNG")) == (1440, 2560, 3)


def read_size(data: bytes) -> tuple:
    return decode_photo(data, "x").shape


def bomb() -> bytes:
    """A PNG of 400 megapixels in half a megabyte."""
    return encode(Image.new("1", (20_000, 20_000)), "PNG")


JPEG = encode(Image.effect_noise((64, 64), 50), "JPEG")
PNG = encode(Image.effect_noise((64, 64), 50), "PNG")
WEBP = encode(Image.effect_noise((64, 64), 50).convert("RGB"), "WEBP")
NOT_A_PICTURE = "no picture that can be read here: give a JPEG, PNG or WebP file"
FAULTS = {
    "empty": (b"", "is empty: copy or download it again"),
    "text": (b"not a picture", f"is {NOT_A_PICTURE}"),
    "web page": (b"<!DOCTYPE html><html></html>", f"is {NOT_A_PICTURE}"),
    "pdf": (b"%PDF-1.7\n", "is a PDF: export the page, or take a screenshot"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC or AVIF picture: export it as JPEG"),
    "avif": (b"\0\0\0\x1cftypavif\0\0\0\0mif1avif", "HEIC or AVIF picture: export it as JPEG"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "gif": (encode(Image.new("L", (9, 9)), "GIF"), f"is {NOT_A_PICTURE}"),
    "noise in a JPEG": (JPEG[:200] + bytes(2000), "is damaged or cut off"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_photo_is_refused_by_name(tmp_path, fault):
    data, message = FAULTS[fault]
    path = tmp_path / "Foto von mir.jpg"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="^Foto von mir.jpg ") as error:
        read_photo(path)
    assert message in str(error.value)


def test_a_bomb_is_refused_before_it_is_unpacked():
    data = bomb()
    assert len(data) < 1_000_000
    with pytest.raises(ValueError, match="^x.png unpacks to more than 100 megapixels: not opened"):
        decode_photo(data, "x.png")


@pytest.mark.parametrize("data", [JPEG, PNG, WEBP], ids=["JPEG", "PNG", "WebP"])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_a_file_cut_anywhere_is_refused(data, share):
    with pytest.raises(ValueError, match="^cut.jpg is (damaged or cut off|no picture)"):
        decode_photo(data[: max(int(share * len(data)), 1)], "cut.jpg")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nobody.jpg"):
        read_photo(tmp_path / "nobody.jpg")


# The detector's file


class Server(BaseHTTPRequestHandler):
    answer = b""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.answer)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{httpd.server_port}/"
        monkeypatch.setattr(photo, "DETECTOR_URL", address)
        yield
        httpd.shutdown()


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.delenv("AGE_FACE_DETECTOR", raising=False)
    monkeypatch.setenv("AGE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.mark.parametrize("answer", [b"version https://git-lfs", b"<html>sign in</html>", bytes(9)])
def test_what_is_not_the_detector_is_not_kept(data, server, monkeypatch, answer):
    monkeypatch.setattr(Server, "answer", answer)
    with pytest.raises(ConnectionError, match="is another file .*AGE_FACE_DETECTOR.*--crop"):
        photo.load_detector()
    assert not [path for path in data.iterdir() if path.suffix != ".lock"]


@needs_detector
def test_the_detector_is_fetched_once(data, server, monkeypatch):
    monkeypatch.setattr(Server, "answer", Path(DETECTOR).read_bytes())
    photo.load_detector()
    assert (data / photo.DETECTOR).read_bytes() == Path(DETECTOR).read_bytes()
    monkeypatch.setattr(Server, "answer", b"gone")
    photo._open_detector.cache_clear()
    photo.load_detector()


def test_without_a_network_the_way_out_is_told(data, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(photo, "DETECTOR_URL", "http://127.0.0.1:9/")
    with pytest.raises(ConnectionError, match="could not be downloaded .*AGE_FACE_.*--crop"):
        photo.load_detector()


def test_a_named_detector_that_is_missing_or_another_file(tmp_path, monkeypatch):
    monkeypatch.setenv("AGE_FACE_DETECTOR", str(tmp_path / "yunet.onnx"))
    with pytest.raises(FileNotFoundError, match="AGE_FACE_DETECTOR names .*yunet.onnx.*--crop"):
        photo.load_detector()
    (tmp_path / "yunet.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="yunet.onnx is not the expected .*: it has 43 bytes"):
        photo.load_detector()


# Finding


@needs_detector
def test_faces_come_from_left_to_right(face):
    faces = photo.find_faces(scene(face, 160, (700, 20, 300)))
    assert [round(f.box[0] + f.box[2] / 2, -2) for f in faces] == [100, 400, 800]


@needs_detector
def test_a_plain_wall_shows_no_face():
    assert photo.find_faces(np.full((300, 400, 3), 128, np.uint8)) == []


@needs_detector
@pytest.mark.parametrize(("size", "shape"), [(2400, (2600, 3000)), (400, (3000, 4000)),
                                             (60, (250, 300))])  # fmt: skip
def test_a_face_of_any_size_is_found_where_it_is(face, size, shape):
    faces = photo.find_faces(scene(face, size, (50,), shape))
    assert len(faces) == 1
    middle = (faces[0].landmarks.mean(0) - (50, 100)) / size
    assert np.abs(middle - (0.5, 0.48)).max() < 0.06


@needs_detector
def test_no_detection_ends_in_no_crop_and_the_crop_route_needs_none(face, monkeypatch):
    assert get_crops(np.full((300, 400, 3), 128, np.uint8)) == []
    monkeypatch.setenv("AGE_FACE_DETECTOR", "/nowhere")
    crops = get_crops(face, crop=True)
    assert len(crops) == 1 and crops[0].face is None
    assert np.array_equal(crops[0].chips[0], face)


# Aligning: no detector needed, since the points are known


def landmarks_at(angle: float, side: float, middle: tuple[float, float]) -> np.ndarray:
    turn = np.radians(angle)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return (LANDMARKS - 0.5) @ matrix.T * side + middle


def test_similarity_undoes_turn_scale_and_shift():
    points = landmarks_at(35, 400, (900, 300))
    matrix = similarity(points, LANDMARKS)
    assert np.allclose(points @ matrix[:, :2].T + matrix[:, 2], LANDMARKS)


@pytest.mark.parametrize(("angle", "side"), [(0, 128), (30, 60), (-90, 500), (180, 1600)])
def test_align_brings_back_the_chip(face, angle, side):
    """A chip drawn into a photo at any turn and size comes back as it was, but for resampling."""
    middle = (1100.0, 1050.0)
    forth = cv2.getRotationMatrix2D((0, 0), -angle, side / CHIP_SIZE)
    forth[:, 2] = middle - forth[:, :2] @ np.full(2, CHIP_SIZE / 2 - 0.5) - 0.5
    drawn = cv2.warpAffine(cv2.GaussianBlur(face, (0, 0), 2), forth, (2300, 2200))
    chip = align(drawn, landmarks_at(angle, side, middle))
    inner = slice(12, -12)
    change = np.abs(chip.astype(int) - cv2.GaussianBlur(face, (0, 0), 2))[inner, inner]
    assert change.mean() < (4 if side == 60 else 1.5)


def test_a_fine_pattern_is_averaged_and_not_sampled():
    """Stripes of one pixel in a large photo become grey; plain sampling would give stripes."""
    stripes = np.zeros((1500, 1500, 3), np.uint8)
    stripes[:, ::2] = 255
    chip = align(stripes, landmarks_at(0, 700, (750, 750)))
    assert np.abs(chip.astype(int) - 127).max() < 30


def test_margin_shows_more_of_the_photo(face):
    landmarks = LANDMARKS * CHIP_SIZE
    wide = align(photo.pad(face, 0.5), landmarks + CHIP_SIZE / 2, margin=0.5)
    small = cv2.resize(face, (CHIP_SIZE // 2,) * 2, interpolation=cv2.INTER_AREA)
    assert np.abs(wide[32:96, 32:96].astype(int) - small).mean() < 2


# Judging


def test_a_good_face_passes_and_each_fault_is_named(face):
    points = landmarks_at(10, 300, (450, 300))
    good = Face(np.zeros(4), points, 0.9)
    assert photo.warnings_for(face, good, (600, 900)) == ([], False)

    def judged(chip=face, landmarks=points, shape=(600, 900)):
        return photo.warnings_for(chip, Face(np.zeros(4), landmarks, 0.9), shape)

    assert judged(face // 4)[0][0].startswith("dark: mean brightness")
    assert judged(face // 64)[1]
    assert judged(255 - (255 - face) // 5)[0][0].startswith("bright: mean brightness")
    assert judged(cv2.GaussianBlur(face, (0, 0), 3))[0][0].startswith("blurred: sharpness")
    assert judged(cv2.GaussianBlur(face, (0, 0), 12))[1]
    dim = judged(cv2.GaussianBlur(face, (0, 0), 12) // 8)  # dark is not blurred
    assert [text.partition(":")[0] for text in dim[0]] == ["dark"] and not dim[1]
    assert judged(landmarks=landmarks_at(0, 30, (450, 300))) == (["small: 30 px wide"], False)
    assert judged(landmarks=landmarks_at(0, 9, (450, 300))) == (["too small: 9 px wide"], True)
    away = points + np.array([(0, 0), (0, 0), (70, 0), (0, 0), (0, 0)])
    assert judged(landmarks=away) == (
        ["turned away: eyes, nose and mouth are out of place"], False,
    )  # fmt: skip
    cut = judged(landmarks=landmarks_at(0, 300, (60, 300)))
    assert cut == (["cut off: 31% outside"], False)
    assert judged(landmarks=landmarks_at(0, 300, (0, 300)))[1]


def test_every_limit_is_ordered():
    for name, limit in photo.LIMITS.items():
        if "refuse" in limit:
            low_is_bad = name in ("size", "dark", "sharpness")
            assert (limit["refuse"] < limit["warn"]) == low_is_bad, name


# UTKFace itself


@needs_detector
def test_landmarks_are_those_of_utkface(tmp_path):
    """The constants, measured anew on sixty chips of the archive."""
    import tarfile

    archive = os.environ.get("UTKFACE_ARCHIVE")
    if not archive:
        pytest.skip("needs UTKFACE_ARCHIVE, UTKFace's own archive")
    chips = []
    with tarfile.open(archive) as packed:
        for info in packed:
            if info.name.endswith(".jpg"):
                chips.append(decode_photo(packed.extractfile(info).read(), info.name))
            if len(chips) == 60:
                break
    found = photo.landmarks_of_chips(chips)
    known = found[~np.isnan(found[:, 0, 0])]
    assert len(known) >= 58
    assert np.abs(np.median(known, 0) - LANDMARKS).max() < 0.015
