"""From a photograph to aligned face crops like UTKFace's: reading, finding, aligning, judging."""

from __future__ import annotations

import hashlib
import io
import math
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import requests
from cv2.utils import logging
from filelock import FileLock
from PIL import Image, ImageOps

from utils.faces import quality
from utils.model import write_atomically
from utils.settings import CHIP_SIZE, get_settings, locate

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # MPO, which phones write under .jpg, counts as JPEG
MAX_PIXELS = 100_000_000  # five times a photograph of 20 megapixels
GROUND = 127  # grey level behind what is transparent
# First bytes of what people take for pictures -> what to do about it.
FOREIGN = {
    b"%PDF": "is a PDF: export the page, or take a screenshot of it, as JPEG or PNG",
    b"version https://git-lfs": "is a Git LFS pointer, not the picture: run `git lfs pull`",
}
HEIF = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1", b"avif")

DETECTOR = "face_detection_yunet_2023mar.onnx"  # YuNet of OpenCV's model zoo, MIT licence
# Where Git LFS keeps the file itself; the "raw" address of the repository gives a pointer.
DETECTOR_URL = (
    "https://media.githubusercontent.com/media/opencv/opencv_zoo/main/models/face_detection_yunet/"
    + DETECTOR
)
DETECTOR_SIZE = 232_589  # bytes
DETECTOR_SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
TIMEOUT = (10, 30)  # seconds to connect, and without a byte
CROP_ROUTE = (
    "Photos that are face crops already need no detector: give them as crops (crop=True, or --crop)"
)

# While searching: px of the photo's longer side, and the most that a photo is enlarged. Smaller
# finds faces that fill the photo, larger finds small ones.
SIDES = ((1024, 1), (320, 1), (2048, 2))
MIN_SCORE = 0.7  # of 1; YuNet gives 0.90 or more to 99 % of UTKFace's validation chips
LOOK = 400  # px: side of the second look at a face, where the chip would be LOOK / 2 wide
FACE_HEIGHT = 1.1  # median height of YuNet's box over the chip's side, with padding
# Right eye, left eye, nose, mouth corners (of the person: the right eye is on the picture's left),
# x and y in units of the chip's side. Medians of `landmarks_of_chips`; notebook 9 measures them.
LANDMARKS = np.array([
    (0.2989, 0.2886), (0.6914, 0.2886), (0.4950, 0.5289), (0.3221, 0.6742), (0.6674, 0.6748),
])  # fmt: skip
MIRRORED = [1, 0, 2, 4, 3]  # the same points in the mirror image

# Sides of the crops whose ages are averaged, in sides of the chip: no detector cuts exactly as
# UTKFace's makers did, and two crops of one face differ by most of a year (notebook 9).
VIEWS = (1.0, 0.95, 1.05)

# Measured in notebook 9 on UTKFace's validation chips. Beyond `warn` lie 1 % of them (size: their
# error is a tenth larger); beyond `refuse` their error is twice that of the untouched chips.
LIMITS = {
    "size": {"warn": 32, "refuse": 12},  # px of the photo that become the chip's side
    "dark": {"warn": 58, "refuse": 5},  # mean grey level of the chip, 0-255
    "bright": {"warn": 192, "refuse": 238},
    "sharpness": {"warn": 13.5, "refuse": 2.0},  # variance of the chip's Laplacian
    "pose": {"warn": 0.081},  # `misfit`, in units of the chip's side
    # Share of the chip that the photo does not hold. Notebook 5: hiding 0.36 doubles the error.
    "outside": {"warn": 0.25, "refuse": 0.36},
}


class Face(NamedTuple):
    """A face in a photo, in pixels of the photo."""

    box: np.ndarray  # [4]: x, y, width, height
    landmarks: np.ndarray  # [5, 2]: x and y of the points of LANDMARKS
    score: float  # of the detector, 0 to 1


# Reading


def read_photo(path: str | Path) -> np.ndarray:
    """A photograph as uint8 RGB [h, w, 3], turned as its EXIF orientation says.

    Reads JPEG, PNG, WebP and BMP: colour, grey, CMYK, 16 bits (reduced to 8), palettes. What is
    transparent is laid on grey. Raises ValueError, with the file's name and the way out, where the
    file is empty, damaged, of another kind or larger than MAX_PIXELS, and OSError where it cannot
    be opened.
    """
    path = Path(path)
    return decode_photo(path.read_bytes(), path.name)


def decode_photo(data: bytes, name: str) -> np.ndarray:
    """`read_photo` for the bytes of a file; `name` is for messages."""
    if not data:
        raise ValueError(f"{name} is empty: copy or download it again")
    for start, advice in FOREIGN.items():
        if data.startswith(start):
            raise ValueError(f"{name} {advice}")
    if data[4:8] == b"ftyp" and data[8:12] in HEIF:
        raise ValueError(f"{name} is a HEIC or AVIF picture: export it as JPEG or PNG")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bomb is refused below; odd EXIF harms nothing
            Image.init()  # or Pillow knows some of its formats only
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError as error:
        raise ValueError(
            f"{name} is no picture that can be read here: give a JPEG, PNG or WebP file"
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{name} unpacks to more than {MAX_PIXELS / 1e6:.0f} megapixels: not opened. "
            "Scale it down first"
        ) from error
    except Exception as error:  # decoders raise many kinds; all mean that the file is damaged
        raise ValueError(
            f"{name} is damaged or cut off ({error}): copy or download it again"
        ) from error


def uploads(value: dict | tuple) -> list[tuple[str, bytes]]:
    """Name and bytes of each file in the value of an ipywidgets FileUpload, of version 7 or 8."""
    if isinstance(value, dict):  # version 7, which Colab has: file name -> its content
        return [(name, bytes(file["content"])) for name, file in value.items()]
    return [(file["name"], bytes(file["content"])) for file in value]


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits; Pillow would clip, not scale
        grey = np.asarray(image).astype(np.float64) / 257
        return np.repeat(np.clip(grey.round(), 0, 255).astype(np.uint8)[..., None], 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, (GROUND, GROUND, GROUND, 255))
        image = Image.alpha_composite(ground, image)
    return np.array(image.convert("RGB"))


# Finding


def find_faces(photo: np.ndarray) -> list[Face]:
    """The faces in a photo (uint8 RGB [h, w, 3]), from left to right; an empty list for none.

    YuNet (Wu et al., Machine Intelligence Research, 2023) searches a copy at the first of SIDES
    that shows a face, then looks again at each face and its mirror image at the size at which
    LANDMARKS were measured. Raises what `load_detector` raises.
    """
    longer = max(photo.shape[:2])
    for scale in dict.fromkeys(min(side / longer, most) for side, most in SIDES):
        faces = [_look_again(photo, face) for face in _detect(photo, scale)]
        if faces:
            return sorted(faces, key=lambda face: face.box[0] + face.box[2] / 2)
    return []


def _detect(photo: np.ndarray, scale: float = 1.0) -> list[Face]:
    """Faces in a copy of the photo at another scale, in pixels of the photo."""
    size = [max(round(side * scale), 1) for side in photo.shape[1::-1]]
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    small = photo if scale == 1 else cv2.resize(photo, size, interpolation=way)
    detector = load_detector()
    detector.setInputSize(size)
    rows = detector.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))[1]
    ratio = np.divide(photo.shape[1::-1], size)
    return [
        Face(row[:4] * np.tile(ratio, 2), row[4:14].reshape(5, 2) * ratio, float(row[14]))
        for row in (rows if rows is not None else [])
    ]


def _look_again(photo: np.ndarray, face: Face) -> Face:
    """The face with landmarks averaged over two more views; as it is where those show none."""
    side = 2 * face.box[3] / FACE_HEIGHT
    corner = face.landmarks.mean(0) - side / 2
    to_view = np.array([[1, 0, -corner[0]], [0, 1, -corner[1]]]) * LOOK / side
    view = _warp(photo, to_view, LOOK)
    found = []
    for mirrored in (False, True):
        faces = _detect(view[:, ::-1] if mirrored else view)
        if faces:
            nearest = min(faces, key=lambda f: np.abs(f.landmarks.mean(0) - LOOK / 2).sum())
            points = nearest.landmarks
            if mirrored:
                points = np.stack([LOOK - points[:, 0], points[:, 1]], 1)[MIRRORED]
            found.append(points)
    if not found:
        return face
    return face._replace(landmarks=np.mean(found, 0) * side / LOOK + corner)


def load_detector() -> cv2.FaceDetectorYN:
    """YuNet, from the file in AGE_FACE_DETECTOR, else from the data folder, else downloaded once.

    Raises FileNotFoundError where AGE_FACE_DETECTOR names no file, ValueError where a file is not
    the expected one (an LFS pointer, a web page, another version), and ConnectionError where it
    cannot be downloaded; each message tells the way out.
    """
    given = os.environ.get("AGE_FACE_DETECTOR")
    path = locate(given) if given else get_settings("sample").folder.parent / DETECTOR
    return _open_detector(path, bool(given))


@lru_cache(maxsize=2)
def _open_detector(path: Path, given: bool) -> cv2.FaceDetectorYN:
    if given and not path.is_file():
        raise FileNotFoundError(
            f"AGE_FACE_DETECTOR names {path}, and there is no such file. {CROP_ROUTE}"
        )
    if not path.is_file():
        _fetch_detector(path)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != DETECTOR_SHA256:
        raise ValueError(
            f"{path.name} is not the expected detector: it has {len(data):,} bytes (expected: "
            f"{DETECTOR_SIZE:,}) or another content. Delete it, and it is fetched again; or set "
            f"AGE_FACE_DETECTOR to {DETECTOR} from OpenCV's model zoo. {CROP_ROUTE}"
        )
    level = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_ERROR)  # OpenCV 5 warns about its own default target
    try:
        return cv2.FaceDetectorYN.create(str(path), "", (LOOK, LOOK), MIN_SCORE)
    finally:
        logging.setLogLevel(level)


def _fetch_detector(path: Path) -> None:
    """Download the detector to `path`, whole and verified or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        if path.is_file():  # another process was faster
            return
        way_out = (
            f"Set AGE_FACE_DETECTOR to a copy of {DETECTOR} (OpenCV's model zoo), or run again "
            f"with a network. {CROP_ROUTE}"
        )
        try:
            with requests.get(DETECTOR_URL, timeout=TIMEOUT, stream=True) as response:
                response.raise_for_status()
                data = response.raw.read(DETECTOR_SIZE + 1, decode_content=True)
        except (requests.RequestException, OSError) as error:
            raise ConnectionError(
                f"the face detector could not be downloaded ({type(error).__name__}). {way_out}"
            ) from error
        if hashlib.sha256(data).hexdigest() != DETECTOR_SHA256:
            raise ConnectionError(
                f"what came instead of the face detector is another file (sha256). {way_out}"
            )
        write_atomically(path, lambda file: file.write_bytes(data))


# Aligning


def align(photo: np.ndarray, landmarks: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """The face as a chip, uint8 RGB [CHIP_SIZE, CHIP_SIZE, 3].

    A similarity transform (turn, scale, shift; Umeyama, 1991) brings the landmarks nearest to
    LANDMARKS. `margin` widens the crop on each side by this part of the chip's side. What lies
    outside the photo repeats its edge.
    """
    points = (LANDMARKS + margin) / (1 + 2 * margin) * CHIP_SIZE
    return _warp(photo, similarity(landmarks, points), CHIP_SIZE)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The turn, scale and shift [2, 3] that bring points [N, 2] nearest to others."""
    from_mean, to_mean = source.mean(0), target.mean(0)
    a, b = source - from_mean, target - to_mean
    size = (a * a).sum()
    cos, sin = (a * b).sum() / size, (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum() / size
    turn = np.array([[cos, -sin], [sin, cos]])
    return np.column_stack([turn, to_mean - turn @ from_mean])


def _warp(photo: np.ndarray, transform: np.ndarray, size: int) -> np.ndarray:
    """`transform` [2, 3] maps the photo's coordinates to a square of `size` px, area by area.

    Coordinates count from the corner of the first pixel. The square is drawn larger, so that no
    pixel of the photo is stepped over, then averaged down: plain sampling would alias.
    """
    finer = math.ceil(np.clip(1 / np.hypot(*transform[:, 0]), 1, 8))
    matrix = transform * finer
    matrix[:, 2] += matrix[:, :2].sum(1) / 2 - 0.5  # OpenCV counts from the first pixel's centre
    side = size * finer
    large = cv2.warpAffine(
        photo, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA)


def pad(chip: np.ndarray, margin: float) -> np.ndarray:
    """A looser photo of a chip [h, w, 3]: wider on each side by this part, its edge repeated."""
    width = round(len(chip) * margin)
    return cv2.copyMakeBorder(chip, *[width] * 4, cv2.BORDER_REPLICATE)


def landmarks_of_chips(chips: list[np.ndarray]) -> np.ndarray:
    """Landmarks [N, 5, 2] in units of the chip's side, NaN where no face is found.

    Each chip is padded by half its side, so that the detector sees a face with space about it as
    in a photo: without, it sets the nose and mouth higher. Of several faces the most central.
    """
    found = np.full((len(chips), 5, 2), np.nan)
    for place, chip in enumerate(chips):
        faces = find_faces(pad(chip, 0.5))
        if faces:
            face = central(faces, (2 * len(chip), 2 * len(chip)))
            found[place] = face.landmarks / len(chip) - 0.5
    return found


def central(faces: list[Face], shape: tuple[int, ...]) -> Face:
    """The face nearest to the middle of a photo of this shape (height, width)."""
    middle = np.array(shape[1::-1]) / 2
    return min(faces, key=lambda face: np.hypot(*(face.landmarks.mean(0) - middle)))


# Judging


def misfit(landmarks: np.ndarray) -> float:
    """How far the aligned landmarks lie from LANDMARKS: root mean square, in chip sides.

    A head that turns away or up moves the nose against eyes and mouth, which no similarity
    transform can undo.
    """
    transform = similarity(landmarks, LANDMARKS)
    moved = landmarks @ transform[:, :2].T + transform[:, 2]
    return float(np.sqrt(((moved - LANDMARKS) ** 2).sum(1).mean()))


def outside(landmarks: np.ndarray, shape: tuple[int, ...]) -> float:
    """Share of the aligned chip that a photo of this shape (height, width) does not hold."""
    inverse = cv2.invertAffineTransform(similarity(landmarks, LANDMARKS))
    grid = (np.arange(32) + 0.5) / 32
    x, y = inverse[:, :2] @ np.stack(np.meshgrid(grid, grid)).reshape(2, -1) + inverse[:, 2:]
    return float(1 - ((x >= 0) & (x <= shape[1]) & (y >= 0) & (y <= shape[0])).mean())


def chip_side(landmarks: np.ndarray) -> float:
    """Pixels of the photo that become the aligned chip's side."""
    return float(1 / np.hypot(*similarity(landmarks, LANDMARKS)[:, 0]))


def measures(chip: np.ndarray, face: Face | None, shape: tuple[int, ...]) -> dict[str, float]:
    """What `warnings_for` judges: of the chip, of the face's geometry, and of the photo's shape."""
    seen = quality(cv2.cvtColor(chip, cv2.COLOR_RGB2GRAY))
    found = {"brightness": seen["brightness"], "sharpness": seen["sharpness"]}
    if face is None:  # a crop: all of the photo's central square
        return found | {"size": float(min(shape[:2]))}
    return found | {
        "size": chip_side(face.landmarks),
        "pose": misfit(face.landmarks),
        "outside": outside(face.landmarks, shape),
    }


def warnings_for(
    chip: np.ndarray, face: Face | None, shape: tuple[int, ...]
) -> tuple[list[str], bool]:
    """What speaks against an answer for this chip, and whether to refuse one.

    `shape` is the photo's (height, width); `face` is None for a photo that was given as a crop.
    LIMITS holds the thresholds and tells where they come from.
    """
    found = measures(chip, face, shape)
    light = found["brightness"]
    rules = [  # limit, value, is a small value bad, message
        ("size", found["size"], True, f"small: {found['size']:.0f} px wide"),
        ("dark", light, True, f"dark: mean brightness {light:.0f} of 255"),
        ("bright", light, False, f"bright: mean brightness {light:.0f} of 255"),
    ]
    if light >= LIMITS["dark"]["warn"]:  # in the dark, edges are faint without being blurred
        sharp = found["sharpness"]
        rules.append(("sharpness", sharp, True, f"blurred: sharpness {sharp:.1f}"))
    if face is not None:
        rules += [
            ("pose", found["pose"], False, "turned away: eyes, nose and mouth are out of place"),
            ("outside", found["outside"], False, f"cut off: {found['outside']:.0%} outside"),
        ]
    texts, refused = [], False
    for name, value, low_is_bad, text in rules:
        sign = 1 if low_is_bad else -1
        if sign * value < sign * LIMITS[name]["warn"]:
            beyond = "refuse" in LIMITS[name] and sign * value < sign * LIMITS[name]["refuse"]
            texts.append(f"too {text}" if beyond else text)
            refused |= beyond
    return texts, refused


class Crop(NamedTuple):
    """A face cut out of a photo and judged."""

    chips: np.ndarray  # uint8 RGB [len(VIEWS), CHIP_SIZE, CHIP_SIZE, 3]; the first is the chip
    face: Face | None  # None: the photo was given as a crop
    warnings: list[str]
    refused: bool  # too bad for an answer


def get_crops(photo: np.ndarray, crop: bool = False) -> list[Crop]:
    """Every face of a photo (uint8 RGB [h, w, 3]), cut out and judged, from left to right.

    With `crop` the photo is a face crop already: its central square is the chip, and no detector
    is needed. Raises what `find_faces` raises.
    """
    if crop:
        height, width = photo.shape[:2]
        side = min(height, width)
        corner = np.array([width - side, height - side]) / 2
        return [_cut(photo, LANDMARKS * side + corner, None)]
    return [_cut(photo, face.landmarks, face) for face in find_faces(photo)]


def _cut(photo: np.ndarray, landmarks: np.ndarray, face: Face | None) -> Crop:
    chips = np.stack([align(photo, landmarks, (side - 1) / 2) for side in VIEWS])
    return Crop(chips, face, *warnings_for(chips[0], face, photo.shape))
