"""The embedded sample: drawn faces whose age cues, label noise and lighting gap are known.

A face follows from (seed, index) alone, and both stand in its file name, so that the truth about
a file (person, true age, cue pixels) can be recomputed from its name: `get_truth`, `cue_masks`.
"""

from __future__ import annotations

import os
import re
import shutil
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from utils.settings import CHIP_SIZE

# Each cue has an apparent age of its own: the true age times a personal pace.
CUES = ("proportions", "hairline", "hair", "forehead_lines", "eye_lines", "mouth_lines", "spots")
CUE_SPREAD = 0.15  # standard deviation of the pace's logarithm
# Groups in the order of UTKFace's codes (White, Black, Asian, Indian, Others) and sized like its.
GROUP_SHARES = (0.43, 0.19, 0.14, 0.17, 0.07)
AGE_QUANTILES = (  # years at 0, 5, 10, 20, ..., 90, 95 and 100 % of each group, like UTKFace's
    (1, 4, 9, 19, 26, 29, 35, 40, 50, 58, 68, 78, 100),
    (1, 16, 21, 25, 26, 28, 30, 33, 36, 42, 55, 65, 95),
    (1, 1, 1, 3, 20, 24, 26, 27, 30, 35, 54, 72, 100),
    (1, 1, 5, 22, 25, 26, 28, 33, 38, 46, 55, 60, 90),
    (1, 1, 2, 7, 17, 22, 25, 26, 29, 34, 41, 48, 85),
)
# What groups differ in: the mean skin tone (0 light, 1 dark), with wide overlap. Nothing else.
SKIN_TONES = (0.28, 0.66, 0.38, 0.54, 0.46)
SKIN_SPREAD = 0.17
GAP_GROUP = 3  # group photographed in less light where gap=True ...
GAP_EXPOSURE = 0.35  # ... namely with this part of it
# A label is off with this probability, by a Laplace error of this scale (less in children).
LABEL_ERROR_RATE = 0.33
LABEL_ERROR_YEARS = 4.0
COPY_SHARE = 0.03  # part of the files that show a face for the second or third time
COPY_KINDS = ("identical", "identical", "reencoded", "brightened", "shifted")
MASK_AGES = (1, 25, 95)  # years that a cue takes while its pixels are found
MASK_LEVELS = 6  # change of a pixel, 0-255, that counts
SIDE = 2 * CHIP_SIZE  # faces are drawn at this size, then shrunk
SKINS = ((252, 220, 198), (240, 194, 160), (218, 164, 124), (188, 132, 96), (156, 106, 80))
HAIRS = ((44, 40, 44), (66, 46, 38), (98, 66, 48), (136, 90, 56), (160, 86, 50), (216, 180, 116))
IRISES = ((78, 52, 38), (78, 52, 38), (110, 78, 48), (84, 112, 78), (84, 126, 162))
CLOTHES = ((66, 104, 146), (200, 98, 88), (88, 146, 124), (236, 196, 104), (122, 98, 150))
_EPOCH = datetime(2001, 1, 1)
_STEPS = np.linspace(0, 1, 33)
_BEZIER = np.array([((1 - t) ** 2, 2 * t * (1 - t), t * t) for t in np.linspace(0, 1, 13)])


class Person(NamedTuple):
    """One drawn person; `_replace(age=...)` gives the same person at another age."""

    seed: int
    index: int
    age: float  # true age in years
    gender: int  # 0 male, 1 female, as in UTKFace's names
    ethnicity: int  # 0 White, 1 Black, 2 Asian, 3 Indian, 4 Others
    tone: float  # of the skin, 0 light to 1 dark
    pace: dict[str, float]  # cue -> its apparent age / true age
    exposure: float  # part of the usual light


class Sheet(NamedTuple):
    """A face in the making. Lengths are in pixels of UTKFace's 200 px chips, x from the midline."""

    person: Person
    ages: dict[str, float]  # cue -> apparent age in years
    canvas: np.ndarray  # uint8 RGB [SIDE, SIDE, 3]
    pose: np.ndarray  # [3, 2]: (x, y, 1) in chip units to canvas pixels
    skin: np.ndarray  # RGB
    hair: np.ndarray  # RGB
    rng: np.random.Generator  # same number of draws at any age, so that a person can grow older
    length: float  # y where the hair ends; less than `centre` for short hair
    young: float  # 1 at birth, falls to 0 in adults
    top: float  # y of the skull
    centre: float  # y of the widest part
    chin: float  # y
    width: float  # half the head's width
    eye: float  # y
    nose: float  # y
    mouth: float  # y


def get_person(seed: int, index: int, gap: bool = True) -> Person:
    """Person number `index` of the sample `seed`; `gap` changes the exposure and nothing else."""
    rng = np.random.default_rng([seed, index, 0])
    ethnicity, gender = int(rng.choice(5, p=GROUP_SHARES)), int(rng.integers(2))
    tone = float(np.clip(rng.normal(SKIN_TONES[ethnicity], SKIN_SPREAD), 0, 1))
    percent = (0, 5, *range(10, 100, 10), 95, 100)
    age = round(float(np.interp(100 * rng.random(), percent, AGE_QUANTILES[ethnicity])))
    age = 26 if rng.random() < 0.05 else age  # UTKFace's spike
    pace = dict(zip(CUES, np.exp(rng.normal(0, CUE_SPREAD, len(CUES))).tolist(), strict=True))
    dark = GAP_EXPOSURE * float(np.exp(rng.normal(0, 0.15)))
    exposure = dark if gap and ethnicity == GAP_GROUP else 1.0
    return Person(seed, index, age, gender, ethnicity, tone, pace, exposure)


def _rise(age: float, start: float, stop: float) -> float:
    """Smooth rise from 0 at `start` years to 1 at `stop` years."""
    t = min(max((age - start) / (stop - start), 0), 1)
    return t * t * (3 - 2 * t)


def _start(person: Person, ages: dict[str, float]) -> Sheet:
    rng = np.random.default_rng([person.seed, person.index, 1])
    tilt, scale = np.radians(rng.normal(0, 3.5)), 0.9 * np.exp(rng.normal(0, 0.03))
    x, y = rng.normal((97.5, 108), 2.5)
    c, s = scale * np.cos(tilt), scale * np.sin(tilt)
    pose = np.array([[c, s], [-s, c], [x + 104 * s, y - 104 * c]]) * (SIDE / 200)
    tones = np.linspace(0, 1, len(SKINS))
    skin = np.array(
        [np.interp(person.tone, tones, channel) for channel in zip(*SKINS, strict=True)]
    )
    hair = np.array(HAIRS[rng.integers(len(HAIRS))]) + rng.normal(0, 6)
    hair += (np.array((214, 213, 214)) - hair) * _rise(ages["hair"], 26, 84)
    long = min(max(rng.normal((0.15, 0.55)[person.gender], 0.3), 0), 1)
    young = float(np.exp(-((ages["proportions"] / 9) ** 1.1)))
    top, chin, width, eye, nose, mouth = rng.normal(0, 1, 6)
    return Sheet(
        person,
        ages,
        _background(rng),
        pose,
        skin,
        hair,
        rng,
        length=70 + 145 * long * (1 - np.exp(-ages["hairline"] / 5)),
        young=young,
        top=-8 + 2 * top - 5 * young,
        centre=78 + 9 * young,
        chin=191 + 3 * chin - 24 * young,
        width=75 + 3 * width + 7 * young,
        eye=58 + eye + 10 * young,
        nose=101 + 2 * nose - young,
        mouth=136 + 2 * mouth - 5 * young,
    )


def _background(rng: np.random.Generator) -> np.ndarray:
    """Clouds of colour and things out of focus, uint8 [SIDE, SIDE, 3]."""
    base = 178 + rng.normal(0, 11, 3) + rng.normal(0, 20)
    image = cv2.resize(base + rng.normal(0, 16, (4, 4, 1)) + rng.normal(0, 7, (4, 4, 3)), (64, 64))
    for _ in range(9):
        x, y, size = (round(v) for v in rng.uniform((-4, -4, 4), (68, 68, 12)))
        colour = (base + rng.normal(0, 30) + rng.normal(0, 9, 3)).tolist()
        if rng.random() < 0.5:
            cv2.circle(image, (x, y), size, colour, -1)
        else:
            cv2.rectangle(image, (x - size // 2, y - size), (x + size, y + 3 * size), colour, -1)
    image = cv2.GaussianBlur(np.clip(image, 0, 255).astype(np.uint8), (0, 0), 2)
    return cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


def _place(sheet: Sheet, points) -> np.ndarray:
    """Canvas coordinates in 1/16 px."""
    return ((points @ sheet.pose[:2] + sheet.pose[2]) * 16).round().astype(np.int32)


def _paint(sheet: Sheet, points, colour, width: float = 0, canvas: np.ndarray | None = None):
    """Fill a polygon, or draw a line of `width` along the points."""
    canvas, colour = sheet.canvas if canvas is None else canvas, np.atleast_1d(colour).tolist()
    if width:
        pixels = max(1, round(width * SIDE / 200))
        cv2.polylines(canvas, [_place(sheet, points)], False, colour, pixels, cv2.LINE_AA, 4)
    else:
        cv2.fillPoly(canvas, [_place(sheet, points)], colour, cv2.LINE_AA, 4)


def _glow(sheet: Sheet, x: float, y: float, radius: float, change) -> None:
    """Add a soft round patch of `change` in RGB."""
    x, y = (_place(sheet, (x, y)) / 16).tolist()
    reach = radius * SIDE / 200
    left, upper = max(int(x - reach), 0), max(int(y - reach), 0)
    patch = sheet.canvas[upper : max(int(y + reach) + 2, 0), left : max(int(x + reach) + 2, 0)]
    dx = np.arange(left, left + patch.shape[1]) - x
    dy = np.arange(upper, upper + patch.shape[0])[:, None] - y
    bump = np.maximum(1 - (dx * dx + dy * dy) / reach**2, 0) ** 2
    patch[:] = np.clip(patch + bump[..., None] * np.asarray(change), 0, 255)


def _arc(x, y, rx, ry, start=0, stop=360, power=2.0) -> np.ndarray:
    """Part of a superellipse, from `start` to `stop` degrees, clockwise from the right."""
    t = np.radians(start + (stop - start) * _STEPS)
    points = np.stack([np.cos(t), np.sin(t)], 1)
    if power != 2:
        points = np.sign(points) * np.abs(points) ** (2 / power)
    return points * (rx, ry) + (x, y)


def _curve(start, pull, stop) -> np.ndarray:
    """Quadratic Bezier curve."""
    return _BEZIER @ np.array((start, pull, stop))


def _both(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return points, points * (-1, 1)


def _back_hair(sheet: Sheet) -> None:
    down = sheet.length - sheet.centre
    if down > 0:
        rx = sheet.width + min(13, down / 3)
        up = _arc(0, sheet.centre, rx, sheet.centre - sheet.top + min(6, down / 5), 180, 360)
        low = _arc(0, sheet.centre, rx, down, 0, 180, 3.5)
        _paint(sheet, np.concatenate([up, low]), sheet.hair - 18)


def _body(sheet: Sheet) -> None:
    rng, low = sheet.rng, sheet.chin + 10
    cloth = np.array(CLOTHES[rng.integers(len(CLOTHES))]) + rng.normal(0, 12, 3)
    neck, collar = 40 - 10 * sheet.young, rng.uniform(8, 16)
    _paint(sheet, _arc(0, low + 62, 112 - 16 * sheet.young, 58, 180, 360, 2.6), cloth)
    column = np.array([(-neck, 120), (neck, 120), (neck + 4, low + 2), (-neck - 4, low + 2)])
    for part in (column, _arc(0, low - 2, neck + 5, collar, 0, 180)):
        _paint(sheet, part, sheet.skin - 30)


def _head(sheet: Sheet) -> None:
    rng = sheet.rng
    jaw = min(max(rng.normal(2.15, 0.15), 1.9), 2.5)
    for ear in _both(_arc(sheet.width - 1, sheet.eye + 16, 10, 17)):
        _paint(sheet, ear, sheet.skin - 14)
    up = _arc(0, sheet.centre, sheet.width, sheet.centre - sheet.top, 180, 360)
    down = _arc(0, sheet.centre, sheet.width, sheet.chin - sheet.centre, 0, 180, jaw)
    outline, light = np.concatenate([up, down]), np.array((rng.normal(0, 10), sheet.centre))
    for step in np.linspace(0, 1, 9):  # lighter towards the middle
        _paint(sheet, outline + 0.4 * step * (light - outline), sheet.skin - 16 + 22 * step)
    blush = np.array((12, -10, -8)) * (0.6 + 1.2 * sheet.young)
    for side in (-1, 1):
        _glow(sheet, side * 46, sheet.mouth - 18, 26, blush)
    _glow(sheet, 0, sheet.nose - 8, 13, (9, 8, 8))


def _spots(sheet: Sheet) -> None:
    change = np.array((-26, -32, -34)) * _rise(sheet.ages["spots"], 14, 90)
    for k in range(10):
        x, y, radius = sheet.rng.uniform((28, 0, 5), (66, 1, 9))
        x, y = (0.62 * x, sheet.eye - 44 + 20 * y) if k < 3 else (x, sheet.eye + 26 + 40 * y)
        _glow(sheet, x * (-1) ** k, y, radius, change)


def _lines(sheet: Sheet) -> None:
    """Lines of age, and those of nose and ears: darker by as many levels on any skin."""
    rng, eye, nose, mouth = sheet.rng, sheet.eye, sheet.nose, sheet.mouth
    ink = np.zeros((SIDE, SIDE), np.uint8)
    forehead, eyes, cheeks = (
        56 * _rise(sheet.ages[cue], 8, 84) for cue in ("forehead_lines", "eye_lines", "mouth_lines")
    )
    for k in range(3):
        half, bend, shift = rng.normal((44 - 5 * k, -7, 0), (4, 3, 3))
        y = eye - 29 - 8.5 * k
        line = _curve((shift - half, y + 3), (shift, y + bend), (shift + half, y + 3))
        _paint(sheet, line, forehead, 2.2, ink)
    for k in (-1, 0, 1):
        foot = _curve((58, eye + 1 + 5 * k), (64, eye + 1 + 7 * k), (70, eye + 2 + 12 * k))
        for line in _both(foot):
            _paint(sheet, line, eyes, 2, ink)
    for bag in _both(_curve((26, eye + 15), (42, eye + 25), (54, eye + 14))):
        _paint(sheet, bag, eyes, 2.2, ink)
    for fold in _both(_curve((17, nose), (38, nose + 10), (43, mouth + 4))):
        _paint(sheet, fold, cheeks, 2.6, ink)
    for fold in _both(_curve((37, mouth + 11), (40, mouth + 17), (34, mouth + 25))):
        _paint(sheet, fold, 0.7 * cheeks, 2.2, ink)
    _paint(sheet, _arc(0, nose, 11 - 4 * sheet.young, 6, 15, 165), 46, 2.4, ink)
    for ear in _both(_arc(sheet.width + 2, sheet.eye + 15, 4, 9, -120, 100)):
        _paint(sheet, ear, 30, 2, ink)
    for lid in _both(_arc(39.5, eye - 4, 15, 10 + 4 * sheet.young, 205, 335)):
        _paint(sheet, lid, 26, 1.6, ink)
    ink = cv2.GaussianBlur(ink, (0, 0), 1.0)
    cv2.subtract(sheet.canvas, cv2.merge([ink] * 3), dst=sheet.canvas)


def _eyes(sheet: Sheet) -> None:
    rng, eye, young = sheet.rng, sheet.eye, sheet.young
    iris = np.array(IRISES[rng.integers(len(IRISES))])
    size, gaze, lift, thick = rng.normal((1, 0, 0, 4.4), (0.05, 1.2, 1.5, 0.8))
    rx, ry = size * (14 + 3 * young), size * (8.6 + 5.2 * young)
    ry *= 1 - 0.22 * _rise(sheet.ages["eye_lines"], 30, 95)
    ball = size * (8 + 3 * young)
    for x in (-39.5, 39.5):
        _paint(sheet, _arc(x, eye, rx, ry, power=1.9), (250, 249, 246))
        _paint(sheet, _arc(x + gaze, eye - 0.5, ball, min(ball, ry)), iris)
        _paint(sheet, _arc(x + gaze, eye - 0.5, ball / 2, min(ball / 2, ry)), (24, 20, 24))
        _paint(sheet, _arc(x + gaze - 2.4, eye - ball / 3, ball / 3.2, ball / 3.2), (255, 255, 255))
        _paint(sheet, _arc(x, eye, rx, ry, 185, 355, 1.9), (58, 40, 38), 2.6)
    y = eye - 20 - 4 * young - lift
    colour = sheet.hair - 20 + (sheet.skin - sheet.hair) * 0.6 * young
    for brow in _both(_curve((22, y + 3), (40, y - 6), (57, y + 4))):
        _paint(sheet, brow, colour, thick - 1.8 * young)


def _mouth(sheet: Sheet) -> None:
    rng = sheet.rng
    half, smile, lip = rng.normal((32 - 8 * sheet.young, 8, 1), (1.5, 3, 0.12))
    left, right, y = (-half, sheet.mouth), (half, sheet.mouth), sheet.mouth + smile
    red = 0.55 * sheet.skin + 0.45 * np.array((200, 84, 88)) + rng.normal(0, 6)
    low = y + (14 - 2 * sheet.young) * lip
    upper, lower = _curve(left, (0, y - 8 * lip), right), _curve(right, (0, low), left)
    _paint(sheet, np.concatenate([upper, lower]), red)
    middle = _curve(left, (0, y), right)
    if rng.random() < 0.35:
        gape = np.concatenate([middle, _curve(right, (0, low - 5), left)])
        toothed = min(max(sheet.ages["proportions"] - 0.5, 0), 1)
        _paint(sheet, gape, (150, 64, 70) + np.array((102, 184, 176)) * toothed)
    else:
        _paint(sheet, middle, red - 48, 1.8)


def _front_hair(sheet: Sheet) -> None:
    rng, age, width, centre = sheet.rng, sheet.ages["hairline"], sheet.width, sheet.centre
    sweep, fringe, volume, quiff, curl, waves = rng.uniform(
        (-1, 0, 3, 0, 0, 14), (1, 1, 11, 9, 1, 24)
    )
    grown, lost = 1 - np.exp(-age / 3), _rise(age, 20, 100)
    hair = sheet.hair + (sheet.skin - 20 - sheet.hair) * 0.5 * (1 - grown)  # thin in infants
    u = np.linspace(-1, 1, 97)
    across, up = np.sin(np.pi * u / 2), np.cos(np.pi * u / 2)
    side = np.abs(across)
    curl = max(curl - 0.6, 0) * 16 * grown * (1 - 0.8 * lost) * np.abs(np.sin(u * waves))
    thick = (volume + quiff * up**4) * (0.2 + 0.8 * grown) * (1 - 0.6 * lost) + curl
    skull = centre - up * (centre - sheet.top)
    rim = np.stack([across * (width + thick), skull - up * thick], 1)
    base = sheet.top + 5 + grown * (13 + 9 * fringe) - 30 * lost
    ends = sheet.top + 30 + grown * (centre + 4 - sheet.top - 30)
    line = (
        base + (ends - base) * side ** (3.5 + 4 * lost) + 12 * sweep * grown * across * (1 - side)
    )
    line += 0.5 * curl - 10 * lost * np.exp(-(((side - 0.62) / 0.2) ** 2))
    edge = np.stack([across * (width + 1), line], 1)
    down = sheet.length - centre
    if down > 0:
        height = down / 2 + min(18, down)
        lock = _arc(width + 3, centre + down - height, min(10, down / 4), height, power=2.6)
        for lock in _both(lock):
            _paint(sheet, lock, sheet.hair - 4)
    haired = np.flatnonzero(line - skull > 1)
    for run in np.split(haired, np.flatnonzero(np.diff(haired) > 1) + 1):
        if len(run) > 1:
            _paint(sheet, np.concatenate([rim[run], edge[run[::-1]]]), hair)
    for k, shade in zip(range(6, 92, 6), rng.normal(0, 9, 15), strict=True):
        if line[k] - skull[k] > 5:
            strand = _curve(rim[k], (rim[k] + edge[k]) / 2 + (5 * sweep, 0), edge[k] - (0, 1))
            _paint(sheet, strand, hair + shade, 2.2)


def _draw(person: Person, ages: dict[str, float]) -> np.ndarray:
    """The face before any camera, uint8 RGB [CHIP_SIZE, CHIP_SIZE, 3]."""
    sheet = _start(person, ages)
    for part in (_back_hair, _body, _head, _spots, _lines, _eyes, _mouth, _front_hair):
        part(sheet)
    return cv2.resize(sheet.canvas, (CHIP_SIZE, CHIP_SIZE), interpolation=cv2.INTER_AREA)


def _photograph(person: Person, drawing: np.ndarray) -> np.ndarray:
    """Light, side light, colour cast, blur and sensor noise, none of which depends on age."""
    rng = np.random.default_rng([person.seed, person.index, 2])
    angle, slope, blur, noise = rng.uniform((0, 0, 0.15, 2), (2 * np.pi, 0.25, 1, 6))
    cast = person.exposure * np.exp(rng.normal(-0.08, 0.11) + rng.normal(0, 0.025, 3))
    line = np.linspace(-1, 1, CHIP_SIZE)
    side = 1 + slope * (np.cos(angle) * line + np.sin(angle) * line[:, None])
    image = cv2.GaussianBlur(drawing, (0, 0), blur).astype(np.float32)
    image *= (side[..., None] * cast).astype(np.float32)
    image -= 0.5 * np.maximum(image - 200, 0)  # a camera keeps its highlights
    image += np.float32(noise) * rng.standard_normal(image.shape, np.float32)
    return np.clip(image, 0, 255).round().astype(np.uint8)


def _ages(person: Person) -> dict[str, float]:
    return {cue: person.age * person.pace[cue] for cue in CUES}


def _masks(person: Person) -> dict[str, np.ndarray]:
    masks = {}
    for cue in CUES:
        drawings = [_draw(person, {**_ages(person), cue: age}) for age in MASK_AGES]
        masks[cue] = (np.max(drawings, 0) - np.min(drawings, 0)).max(2) >= MASK_LEVELS
    return masks


def draw_face(person: Person) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One photographed face, and which of its pixels depend on each age cue.

    Returns uint8 RGB [128, 128, 3], before JPEG, and for each of CUES bool [128, 128]: marked is
    where the drawing changes by MASK_LEVELS or more while this cue alone takes the MASK_AGES, all
    else staying as it is. So a child's forehead is marked as well: its being smooth tells its age.
    """
    return _photograph(person, _draw(person, _ages(person))), _masks(person)


def get_truth(file_name: str, gap: bool = True) -> tuple[Person, int]:
    """The person in a file of the sample, true age included, and the copy's number (0: original).

    They stand in the name's date-time: days since 2001 are the sample's seed, seconds of the day
    the person's index, milliseconds the copy's number.

    Raises ValueError for a name that `draw_sample` does not give.
    """
    match = re.search(r"_(\d{17}) ?\.jpg\.chip\.jpg$", file_name)
    if match is None:
        raise ValueError(f"{file_name!r} is not a file name of the drawn sample")
    since = datetime.strptime(match[1] + "000", "%Y%m%d%H%M%S%f") - _EPOCH
    return get_person(since.days, since.seconds, gap), since.microseconds // 1000


def cue_masks(file_name: str) -> dict[str, np.ndarray]:
    """Masks as in `draw_face`, for a file of the sample; the same with and without the gap."""
    person, copy = get_truth(file_name)
    shifted = _version(person, copy).kind == "shifted"
    return {cue: _shift(mask) if shifted else mask for cue, mask in _masks(person).items()}


class Version(NamedTuple):
    """What sets a file apart from other files of the same face."""

    label: int  # age in the file's name, years
    kind: str  # "original" or one of COPY_KINDS
    quality: int  # JPEG quality


def _version(person: Person, copy: int) -> Version:
    """Each file has a label of its own, so label errors of copies are independent."""
    rng = np.random.default_rng([person.seed, person.index, 3, copy])
    kind = COPY_KINDS[rng.integers(len(COPY_KINDS))] if copy else "original"
    scale = LABEL_ERROR_YEARS * min(1, (person.age + 1) / 20)
    error, wrong = rng.laplace(0, scale), rng.random() < LABEL_ERROR_RATE
    label = min(max(round(person.age + error * wrong), 1), 110)
    quality = int(rng.integers(72, 96))
    return Version(label, kind, _version(person, 0).quality if kind == "identical" else quality)


def _shift(pixels: np.ndarray) -> np.ndarray:
    """Moved one pixel to the right."""
    return np.concatenate([pixels[:, :1], pixels[:, :-1]], 1)


def _encode(person: Person, version: Version) -> bytes:
    pixels = _photograph(person, _draw(person, _ages(person)))
    if version.kind == "brightened":
        pixels = cv2.convertScaleAbs(pixels, alpha=1.04, beta=3)
    elif version.kind == "shifted":
        pixels = _shift(pixels)
    quality = [cv2.IMWRITE_JPEG_QUALITY, version.quality]
    return cv2.imencode(".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), quality)[1].tobytes()


def plan_sample(count: int = 2400, seed: int = 0) -> list[tuple[str, int, int, str]]:
    """Files of a sample: name, person's index, copy's number, and defect ("" for none).

    Defects are those of UTKFace: three names that lack a field, a readable name with a space, and
    a file cut short. COPY_SHARE of the files are copies; every tenth copy is a person's second.

    Raises ValueError where `count` is too small for the defects or too large for the names.
    """
    if not 50 <= count <= 86_400:
        raise ValueError(f"count is {count}: a sample has 50 to 86,400 files")
    copies = np.arange(round(COPY_SHARE * count))
    order = np.random.default_rng([seed, count]).permutation(count - len(copies)).tolist()
    second = copies % 10 == 9
    files = [(index, 0) for index in range(len(order))]
    files += [(order[k], 1 + int(s)) for k, s in zip(copies - second, second, strict=True)]
    kinds = ["malformed"] * 3 + ["space", "corrupt"]
    defects = dict(zip(order[-len(kinds) :], kinds, strict=True))
    plan = []
    for index, copy in files:
        person, defect = get_person(seed, index), defects.get(index, "")
        time = _EPOCH + timedelta(days=seed, seconds=index, milliseconds=copy)
        codes = [_version(person, copy).label, person.gender, person.ethnicity]
        stem = "_".join(map(str, codes[:2] if defect == "malformed" else codes))
        stem += time.strftime("_%Y%m%d%H%M%S%f")[:-3] + (" " if defect == "space" else "")
        plan.append((stem + ".jpg.chip.jpg", index, copy, defect))
    return plan


def draw_sample(folder: Path, count: int = 2400, seed: int = 0, gap: bool = True) -> None:
    """Write the sample's `count` JPEG files: the same bytes for the same count, seed and gap.

    They are drawn into a folder beside `folder` that takes its name once all are there, so a
    killed run leaves nothing that passes for a sample. Raises FileExistsError where `folder`
    holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: remove it to draw the sample anew")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        for name, index, copy, defect in plan_sample(count, seed):
            person = get_person(seed, index, gap)
            data = _encode(person, _version(person, copy))
            (partial / name).write_bytes(data[:200] if defect == "corrupt" else data)
        if folder.exists():
            folder.rmdir()
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
