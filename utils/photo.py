"""From a photograph to aligned face crops like UTKFace's: reading, finding, aligning, judging."""

import io
import os
import warnings
from collections import namedtuple
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps
from skimage.transform import estimate_transform

from utils.download import fetch, file_sha256
from utils.faces import quality
from utils.settings import CHIP_SIZE, get_settings, locate

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # MPO, which phones write under .jpg, counts as JPEG
MAX_PIXELS = 100_000_000  # five times a photograph of 20 megapixels
GROUND = 127  # grey level behind what is transparent
DETECTOR = "face_detection_yunet_2023mar.onnx"  # YuNet of OpenCV's model zoo, MIT licence
ZOO = "https://media.githubusercontent.com/media/opencv/opencv_zoo/main/models"
DETECTOR_URL = f"{ZOO}/face_detection_yunet/{DETECTOR}"  # "raw" addresses give an LFS pointer
DETECTOR_SHA256 = "8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4"
WAY_OUT = f"Set AGE_FACE_DETECTOR to a copy of {DETECTOR}, or give face crops (crop=True, --crop)"
SIDES = ((1024, 1), (320, 1), (2048, 2))  # searched: px of the longer side, highest enlargement
MIN_SCORE = 0.7  # of 1; YuNet gives 0.90 or more to 99 % of UTKFace's validation chips
LOOK = 400  # px: side of the second look at a face, where the chip would be LOOK / 2 wide
FACE_HEIGHT = 1.1  # median height of YuNet's box over the chip's side, with padding
# Eyes, nose, mouth corners (the person's right first): x, y in chip sides, UTKFace's medians
LANDMARKS = np.array([(0.2989, 0.2886), (0.6914, 0.2886), (0.4950, 0.5289), (0.3221, 0.6742),
                      (0.6674, 0.6748)])  # fmt: skip
MIRRORED = [1, 0, 2, 4, 3]  # the same points in the mirror image
VIEWS = (1.0, 0.95, 1.05)  # chip sides, averaged: two crops of a face differ by half a year
# Measured on validation chips with the first network (chapter 10): beyond the first limit
# lie 1 % of them (size: the error is a tenth larger), beyond the second the error is doubled.
CHECKS = (  # name, limits (to warn, to refuse), message
    ("size", (32, 12), "small: {:.0f} px wide"),  # px of the photo that become the chip's side
    ("dark", (58, 5), "dark: mean brightness {:.0f} of 255"),
    ("bright", (192, 238), "bright: mean brightness {:.0f} of 255"),
    ("sharpness", (13.5, 2.0), "blurred: sharpness {:.1f}"),  # variance of the chip's Laplacian
    ("pose", (0.081,), "turned away: eyes, nose and mouth are out of place"),  # see `geometry`
    ("outside", (0.25, 0.36), "cut off: {:.0%} outside"),  # share of the chip beyond the photo
)
LIMITS = {name: dict(zip(("warn", "refuse"), ends, strict=False)) for name, ends, _ in CHECKS}
# In px of the photo: box [4] (x, y, width, height), landmarks [5, 2] as LANDMARKS; score of 0 to 1.
Face = namedtuple("Face", "box landmarks score")
# chips: uint8 RGB [len(VIEWS), side, side, 3], the chip first; face: None if a crop was given.
Crop = namedtuple("Crop", "chips face warnings refused")


def read_photo(path: str | Path) -> np.ndarray:
    """A JPEG, PNG, WebP or BMP as uint8 RGB [h, w, 3], turned as its EXIF orientation says; 16 bits
    are scaled to 8, what is transparent is laid on grey. OSError, or as `decode_photo`."""
    return decode_photo(Path(path).read_bytes(), Path(path).name)


def decode_photo(data: bytes, name: str) -> np.ndarray:
    """`read_photo` for bytes. Raises ValueError, with `name` and way out, if they are no photo."""
    try:
        with warnings.catch_warnings(action="ignore"):  # bombs end below; odd EXIF harms nothing
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.UnidentifiedImageError:  # or empty, or a web page
        reason = "is no JPEG, PNG, WebP or BMP: convert HEIC and PDF (LFS pointer: git lfs pull)"
    except Image.DecompressionBombError:
        reason = "unpacks to more than 100 megapixels: not opened. Scale it down first"
    except Exception as error:  # decoders raise many kinds; all mean that the file is damaged
        reason = f"is damaged or cut off ({error}): copy or download it again"
    raise ValueError(f"{name} {reason}")


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits; Pillow would clip, not scale
        image = Image.fromarray((np.asarray(image) / 257.0).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (GROUND, GROUND, GROUND, 255))
        image = Image.alpha_composite(ground, image.convert("RGBA"))
    return np.array(image.convert("RGB"))


@lru_cache(maxsize=1)
def load_detector() -> cv2.FaceDetectorYN:
    """YuNet, from the file in AGE_FACE_DETECTOR (ValueError where it is missing or another one),
    else from the data folder, else downloaded once (ConnectionError)."""
    if given := os.environ.get("AGE_FACE_DETECTOR"):
        path = locate(given)
        if not path.is_file() or file_sha256(path) != DETECTOR_SHA256:
            raise ValueError(f"AGE_FACE_DETECTOR names {path}, not this detector. {WAY_OUT}")
    else:
        path = get_settings("sample").folder.parent / DETECTOR
        fetch(DETECTOR_URL, path, DETECTOR_SHA256, f". {WAY_OUT}")
    level = cv2.utils.logging.setLogLevel(2)  # errors only: OpenCV 5 warns of its own default
    detector = cv2.FaceDetectorYN.create(str(path), "", (LOOK, LOOK), MIN_SCORE)
    cv2.utils.logging.setLogLevel(level)
    return detector


def find_faces(photo: np.ndarray) -> list[Face]:
    """The faces in a photo (uint8 RGB [h, w, 3]), from left to right; an empty list for none.
    YuNet (Wu et al., 2023) searches a copy at the first of SIDES that shows a face, then looks
    again at each face and its mirror image. Raises what `load_detector` raises."""
    longer = max(photo.shape[:2])
    for scale in dict.fromkeys(min(side / longer, most) for side, most in SIDES):
        if faces := [_look_again(photo, face) for face in _detect(photo, scale)]:
            return sorted(faces, key=lambda face: face.box[0] + face.box[2] / 2)
    return []


def _detect(photo: np.ndarray, scale: float = 1.0) -> list[Face]:
    """Faces in a copy of the photo at another scale, in pixels of the photo."""
    size = [max(round(side * scale), 1) for side in photo.shape[1::-1]]
    small = cv2.resize(photo, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    detector, ratio = load_detector(), np.divide(photo.shape[1::-1], size)
    detector.setInputSize(size)
    rows = detector.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))[1]
    return [
        Face(row[:4] * np.tile(ratio, 2), row[4:14].reshape(5, 2) * ratio, float(row[14]))
        for row in (rows if rows is not None else [])
    ]


def _look_again(photo: np.ndarray, face: Face) -> Face:
    """The face with landmarks averaged over two more views; as it is where those show none."""
    side = 2 * face.box[3] / FACE_HEIGHT
    corner = face.landmarks.mean(0) - side / 2
    view = _warp(photo, np.column_stack([np.eye(2), -corner]) * LOOK / side, LOOK)
    found = []
    for mirrored in (False, True):
        if faces := _detect(view[:, ::-1] if mirrored else view):
            central = min(faces, key=lambda face: np.abs(face.landmarks.mean(0) - LOOK / 2).sum())
            points = central.landmarks
            found.append((points * (-1, 1) + (LOOK, 0))[MIRRORED] if mirrored else points)
    return face._replace(landmarks=np.mean(found, 0) * side / LOOK + corner) if found else face


def align(photo: np.ndarray, landmarks: np.ndarray, margin: float = 0.0) -> np.ndarray:
    """The face as a chip, uint8 RGB [CHIP_SIZE, CHIP_SIZE, 3], with `margin` chip sides around it,
    landmarks nearest to LANDMARKS; what lies outside the photo repeats its edge."""
    points = (LANDMARKS + margin) / (1 + 2 * margin) * CHIP_SIZE
    return _warp(photo, similarity(landmarks, points), CHIP_SIZE)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Turn, scale, shift [2, 3] that bring points [N, 2] nearest to others (Umeyama, 1991)."""
    return estimate_transform("similarity", source, target).params[:2]


def _warp(photo: np.ndarray, transform: np.ndarray, size: int) -> np.ndarray:
    """`transform` [2, 3] maps the photo, from the corner of its first pixel, to a square of `size`
    px. The square is drawn larger, then averaged down: plain sampling would skip pixels."""
    finer = int(np.ceil(np.clip(1 / np.hypot(*transform[:, 0]), 1, 8)))
    matrix = transform * finer
    matrix[:, 2] += matrix[:, :2].sum(1) / 2 - 0.5  # OpenCV counts from the first pixel's centre
    square, edge = (size * finer, size * finer), cv2.BORDER_REPLICATE
    large = cv2.warpAffine(photo, matrix, square, flags=cv2.INTER_LINEAR, borderMode=edge)
    return cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA)


def geometry(landmarks: np.ndarray, shape: tuple[int, ...]) -> dict[str, float]:
    """size, pose and outside of a face in a photo of this shape (height, width): see CHECKS.
    `pose` is how far the aligned landmarks lie from LANDMARKS, root mean square in chip sides:
    turning away moves the nose against eyes and mouth, which no similarity transform undoes."""
    transform = similarity(landmarks, LANDMARKS)
    apart = landmarks @ transform[:, :2].T + transform[:, 2] - LANDMARKS
    inverse, grid = cv2.invertAffineTransform(transform), (np.arange(32) + 0.5) / 32
    x, y = inverse[:, :2] @ np.stack(np.meshgrid(grid, grid)).reshape(2, -1) + inverse[:, 2:]
    inside = (x >= 0) & (x <= shape[1]) & (y >= 0) & (y <= shape[0])
    size, pose = 1 / np.hypot(*transform[:, 0]), np.sqrt((apart**2).sum(1).mean())
    return {"size": size, "pose": pose, "outside": 1 - inside.mean()}


def judge(chip: np.ndarray, face: Face | None, shape: tuple[int, ...]) -> tuple[list[str], bool]:
    """What speaks against an answer for this chip, and whether to refuse one, by CHECKS. `shape` is
    the photo's (height, width); `face` is None for a photo that was given as a crop."""
    found = geometry(face.landmarks, shape) if face else {"size": min(shape[:2])}
    light, sharpness = quality(cv2.cvtColor(chip, cv2.COLOR_RGB2GRAY)).values()
    found |= {"dark": light, "bright": light}
    if light >= LIMITS["dark"]["warn"]:  # in the dark, edges are faint without being blurred
        found["sharpness"] = sharpness
    texts, refused = [], False
    for name, _, text in CHECKS:
        warn, refuse = LIMITS[name]["warn"], LIMITS[name].get("refuse", np.inf)
        sign = np.sign(refuse - warn)  # -1 where small values are bad
        if name in found and sign * (found[name] - warn) > 0:
            beyond = bool(sign * (found[name] - refuse) > 0)
            texts.append(("too " if beyond else "") + text.format(found[name]))
            refused |= beyond
    return texts, refused


def get_crops(photo: np.ndarray, crop: bool = False) -> list[Crop]:
    """Every face of a photo (uint8 RGB [h, w, 3]), cut out and judged, from left to right; with
    `crop` the photo's central square, and no detector is needed. Raises as `load_detector`."""
    side = min(photo.shape[:2])
    middle = LANDMARKS * side + (np.array(photo.shape[1::-1]) - side) / 2
    faces = [(None, middle)] if crop else [(face, face.landmarks) for face in find_faces(photo)]
    crops = []
    for face, points in faces:
        chips = np.stack([align(photo, points, (view - 1) / 2) for view in VIEWS])
        crops.append(Crop(chips, face, *judge(chips[0], face, photo.shape)))
    return crops
