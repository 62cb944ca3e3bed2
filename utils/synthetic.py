"""The embedded sample: drawn faces whose age cues, label errors and lighting gap are known.

A face follows from (seed, index) and both stand in its file name, so the truth about a file (true
age, cue pixels) is recomputed from its name: see `get_truth` and `cue_masks`.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
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
# All that groups differ in otherwise: the mean skin tone (0 light, 1 dark), with wide overlap.
SKIN_TONES, SKIN_SPREAD = (0.28, 0.66, 0.38, 0.54, 0.46), 0.17
GAP_GROUP, GAP_EXPOSURE = 3, 0.33  # with gap=True this group has this part of the light
# A label is off with this probability, by a Laplace error of this scale (less below 20 years).
LABEL_ERROR_RATE, LABEL_ERROR_YEARS = 0.33, 4.0
COPY_SHARE = 0.03  # part of the files that show a face for the second or third time
COPY_KINDS = ("identical", "identical", "reencoded", "brightened", "shifted")
MASK_AGES = (1, 25, 95)  # years that a cue takes while its pixels are found
MASK_LEVELS = 6  # change of a pixel, 0-255, that counts

# Drawing: RGB colours; lengths in pixels of UTKFace's 200 px chips, x from the face's midline.
SIDE = 2 * CHIP_SIZE  # faces are drawn at this size, then shrunk
SHAPE = {  # y of parts, half the width: mean of adults, spread, difference of the newborn
    "top": (-5, 2, -5), "eye": (58, 1, 10), "centre": (78, 0, 9), "nose": (101, 2, -1),
    "mouth": (139, 2, -7), "chin": (191, 3, -24), "width": (75, 3, 7),
}  # fmt: skip
SKINS = ((252, 220, 198), (240, 194, 160), (218, 164, 124), (188, 132, 96), (156, 106, 80))
HAIRS = ((44, 40, 44), (66, 46, 38), (98, 66, 48), (136, 90, 56), (160, 86, 50), (216, 180, 116))
IRISES = ((78, 52, 38), (78, 52, 38), (110, 78, 48), (84, 112, 78), (84, 126, 162))
CLOTHES = ((66, 104, 146), (200, 98, 88), (88, 146, 124), (236, 196, 104), (122, 98, 150))
_EPOCH = datetime(2001, 1, 1)
_BEZIER = np.array([((1 - t) ** 2, 2 * t * (1 - t), t * t) for t in np.linspace(0, 1, 13)])


class Person(NamedTuple):
    """Who is in a file; `_replace(age=...)` gives the same person at another age."""

    seed: int
    index: int
    copy: int  # 0, or the number of the near-duplicate
    kind: str  # "original" or one of COPY_KINDS
    age: float  # true age in years
    label: int  # age in the file's name; its error is independent from copy to copy
    gender: int  # 0 male, 1 female, as in UTKFace's names
    ethnicity: int  # 0 White, 1 Black, 2 Asian, 3 Indian, 4 Others
    tone: float  # of the skin, 0 light to 1 dark
    pace: dict[str, float]  # cue -> its apparent age / true age
    exposure: float  # part of the usual light
    quality: int  # of the JPEG file


def get_person(seed: int, index: int, copy: int = 0, gap: bool = True) -> Person:
    """Person `index` of the sample `seed`; `gap` changes nothing but the exposure."""
    rng = np.random.default_rng([seed, index, 0])
    ethnicity, gender = int(rng.choice(5, p=GROUP_SHARES)), int(rng.integers(2))
    tone = min(max(rng.normal(SKIN_TONES[ethnicity], SKIN_SPREAD), 0), 1)
    percent = (0, 5, *range(10, 100, 10), 95, 100)
    age = round(float(np.interp(100 * rng.random(), percent, AGE_QUANTILES[ethnicity])))
    age = 26 if rng.random() < 0.05 else age  # UTKFace's spike
    pace = dict(zip(CUES, np.exp(rng.normal(0, CUE_SPREAD, len(CUES))).tolist(), strict=True))
    dark, quality = GAP_EXPOSURE * float(np.exp(rng.normal(0, 0.08))), int(rng.integers(72, 96))
    exposure = dark if gap and ethnicity == GAP_GROUP else 1.0
    rng = np.random.default_rng([seed, index, 1, copy])
    kind = COPY_KINDS[rng.integers(len(COPY_KINDS))] if copy else "original"
    error = rng.laplace(0, LABEL_ERROR_YEARS * min(1, (age + 1) / 20))
    label = max(round(age + error), 1) if rng.random() < LABEL_ERROR_RATE else age
    quality -= 20 * (kind == "reencoded")
    return Person(
        seed, index, copy, kind, age, label, gender, ethnicity, tone, pace, exposure, quality
    )


def _rise(age: float, start: float, stop: float) -> float:
    """Smooth rise from 0 at `start` years to 1 at `stop` years."""
    t = min(max((age - start) / (stop - start), 0), 1)
    return t * t * (3 - 2 * t)


def _start(person: Person, ages: dict[str, float]) -> SimpleNamespace:
    """Background, pose, proportions and colours. What is drawn at random is so at any age."""
    rng = np.random.default_rng([person.seed, person.index, 2])
    tilt, scale = np.radians(rng.normal(0, 3.5)), 0.92 * np.exp(rng.normal(0, 0.03))
    x, y = rng.normal((97.5, 104), 2.5)
    c, s = scale * np.cos(tilt), scale * np.sin(tilt)
    pose = np.array([[c, s], [-s, c], [x + 104 * s, y - 104 * c]]) * (SIDE / 200)
    young = float(np.exp(-((ages["proportions"] / 9) ** 1.1)))  # 1 at birth, 0 in adults
    shape = {k: rng.normal(mean, sd) + change * young for k, (mean, sd, change) in SHAPE.items()}
    tones = np.linspace(0, 1, len(SKINS))
    skin = np.array(
        [np.interp(person.tone, tones, channel) for channel in zip(*SKINS, strict=True)]
    )
    hair = np.array(HAIRS[rng.integers(len(HAIRS))]) + rng.normal(0, 6)
    hair += (np.array((214, 213, 214)) - hair) * _rise(ages["hair"], 26, 84)
    long = min(max(rng.normal((0.15, 0.55)[person.gender], 0.3), 0), 1)
    down = 145 * long * (1 - np.exp(-ages["hairline"] / 5)) - 26  # ends so far below the centre
    return SimpleNamespace(
        canvas=_background(rng), pose=pose, rng=rng, ages=ages, young=young, **shape,
        skin=skin, hair=hair, down=down,
    )  # fmt: skip


def _background(rng: np.random.Generator) -> np.ndarray:
    """Clouds of colour and things out of focus, uint8 [SIDE, SIDE, 3]."""
    base = 178 + rng.normal(0, 11, 3) + rng.normal(0, 20)
    image = cv2.resize(base + rng.normal(0, 16, (4, 4, 1)) + rng.normal(0, 7, (4, 4, 3)), (64, 64))
    for _ in range(9):
        x, y, size, round_ = (
            rng.uniform((-4, -4, 4, -1), (68, 68, 12, 1)).round().astype(int).tolist()
        )
        colour = (base + rng.normal(0, 30) + rng.normal(0, 9, 3)).tolist()
        if round_:
            cv2.circle(image, (x, y), size, colour, -1)
        else:
            cv2.rectangle(image, (x - size // 2, y - size), (x + size, y + 3 * size), colour, -1)
    image = cv2.GaussianBlur(np.clip(image, 0, 255).astype(np.uint8), (0, 0), 2)
    return cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


def _place(sheet: SimpleNamespace, points) -> np.ndarray:
    """Canvas coordinates in 1/16 px."""
    return ((points @ sheet.pose[:2] + sheet.pose[2]) * 16).round().astype(np.int32)


def _paint(sheet, points: np.ndarray, colour, width: float = 0, both: bool = False) -> None:
    """Fill a polygon, or draw a line of `width` along the points, on one or both sides."""
    colour, pixels = np.atleast_1d(colour).tolist(), max(1, round(width * SIDE / 200))
    for half in (points, points * (-1, 1)) if both else (points,):
        if width:
            place = [_place(sheet, half)]
            cv2.polylines(sheet.canvas, place, False, colour, pixels, cv2.LINE_AA, 4)
        else:
            cv2.fillPoly(sheet.canvas, [_place(sheet, half)], colour, cv2.LINE_AA, 4)


def _glow(sheet, x: float, y: float, radius: float, change) -> None:
    """Add a soft round patch of `change` in RGB."""
    (x, y), reach = (_place(sheet, (x, y)) / 16).tolist(), radius * SIDE / 200
    left, upper = max(int(x - reach), 0), max(int(y - reach), 0)
    patch = sheet.canvas[upper : max(int(y + reach) + 2, 0), left : max(int(x + reach) + 2, 0)]
    dx = np.arange(left, left + patch.shape[1]) - x
    dy = np.arange(upper, upper + patch.shape[0])[:, None] - y
    bump = np.maximum(1 - (dx * dx + dy * dy) / reach**2, 0) ** 2
    patch[:] = np.clip(patch + bump[..., None] * np.asarray(change), 0, 255)


def _arc(x, y, rx, ry, start=0, stop=360, power=2.0) -> np.ndarray:
    """Part of a superellipse, from `start` to `stop` degrees, clockwise from the right."""
    t = np.radians(np.linspace(start, stop, 33))
    points = np.stack([np.cos(t), np.sin(t)], 1)
    if power != 2:
        points = np.sign(points) * np.abs(points) ** (2 / power)
    return points * (rx, ry) + (x, y)


def _oval(sheet, width: float, top: float, bottom: float, power: float) -> np.ndarray:
    """Outline about the head's centre: an ellipse above, a superellipse below."""
    upper = _arc(0, sheet.centre, width, sheet.centre - top, 180, 360)
    return np.concatenate([upper, _arc(0, sheet.centre, width, bottom, 0, 180, power)])


def _curve(start, pull, stop) -> np.ndarray:
    """Quadratic Bezier curve."""
    return _BEZIER @ np.array((start, pull, stop))


def _back_hair(sheet) -> None:
    if (down := sheet.down) > 0:
        wide, high = sheet.width + min(13, down / 3), sheet.top - min(6, down / 5)
        _paint(sheet, _oval(sheet, wide, high, down, 3.5), sheet.hair - 18)


def _body(sheet) -> None:
    rng, low, neck = sheet.rng, sheet.chin + 10, 42 - 10 * sheet.young
    cloth = np.array(CLOTHES[rng.integers(len(CLOTHES))]) + rng.normal(0, 12, 3)
    _paint(sheet, _arc(0, low + 62, 112 - 16 * sheet.young, 58, 180, 360, 2.6), cloth)
    _paint(sheet, _arc(0, 120, neck, low - 118, power=9), sheet.skin - 30)
    _paint(sheet, _arc(0, low - 2, neck - 1, rng.uniform(8, 16), 0, 180), sheet.skin - 30)


def _head(sheet) -> None:
    rng, skin = sheet.rng, sheet.skin
    _paint(sheet, _arc(sheet.width - 1, sheet.eye + 16, 10, 17), skin - 14, both=True)
    jaw, light = min(max(rng.normal(2.15, 0.15), 1.9), 2.5), (rng.normal(0, 10), sheet.centre)
    outline = _oval(sheet, sheet.width, sheet.top, sheet.chin - sheet.centre, jaw)
    for step in np.linspace(0, 1, 9):  # lighter towards the middle
        _paint(sheet, outline + 0.4 * step * (light - outline), skin - 16 + 22 * step)
    for x in (-46, 46):
        _glow(sheet, x, sheet.mouth - 18, 26, np.array((12, -10, -8)) * (0.6 + 1.2 * sheet.young))
    _glow(sheet, 0, sheet.nose - 8, 13, (9, 8, 8))


def _spots(sheet) -> None:
    change = np.array((-26, -32, -34)) * _rise(sheet.ages["spots"], 14, 90)
    for k in range(10):
        x, y, radius = sheet.rng.uniform((28, 0, 5), (66, 1, 9))
        x, y = (0.62 * x, sheet.eye - 44 + 20 * y) if k < 3 else (x, sheet.eye + 26 + 40 * y)
        _glow(sheet, x * (-1) ** k, y, radius, change)


def _lines(sheet) -> None:
    """Lines of age, nose, ears and lids: darker by as many levels on any skin."""
    eye, nose, mouth, young = sheet.eye, sheet.nose, sheet.mouth, sheet.young
    ink = SimpleNamespace(canvas=np.zeros((SIDE, SIDE), np.uint8), pose=sheet.pose)
    tip = sheet.width - 6
    brow, eyes, cheeks = (56 * _rise(sheet.ages[cue], 8, 84) for cue in CUES[3:6])
    lines = [  # points, darkness, width
        (_curve((26, eye + 15), (42, eye + 25), (54, eye + 14)), eyes, 2.2),
        (_curve((17, nose), (38, nose + 10), (43, mouth + 4)), cheeks, 2.6),
        (_curve((37, mouth + 11), (40, mouth + 17), (34, mouth + 25)), 0.7 * cheeks, 2.2),
        (_arc(0, nose, 11 - 4 * young, 6, 15, 165), 46, 2.4),
        (_arc(sheet.width + 2, eye + 15, 4, 9, -120, 100), 30, 2),
        (_arc(39.5, eye - 4, 15, 10 + 4 * young, 205, 335), 26, 1.6),
    ]
    for k in range(3):
        half, bend = sheet.rng.normal((44 - 5 * k, -7), (4, 3))
        y, z = eye - 26 - 8.5 * k, eye + 5 * k - 4
        lines.append((_curve((-half, y), (0, y + bend), (half, y)), brow, 2.2))
        foot = _curve((tip - 12, z), (tip - 6, z + 2 * k - 2), (tip, z + 7 * k - 6))
        lines.append((foot, eyes, 2))
    for points, darkness, width in lines:
        _paint(ink, points, darkness, width, both=True)
    ink = cv2.GaussianBlur(ink.canvas, (0, 0), 1.0)
    cv2.subtract(sheet.canvas, cv2.merge([ink] * 3), dst=sheet.canvas)


def _eyes(sheet) -> None:
    rng, y, young = sheet.rng, sheet.eye, sheet.young
    iris = IRISES[rng.integers(len(IRISES))]
    size, gaze, lift, thick = rng.normal((1, 0, 0, 4.4), (0.05, 1.2, 1.5, 0.8))
    rx, ry, ball = size * (14 + 3 * young), size * (8.6 + 5.2 * young), size * (8 + 3 * young)
    ry *= 1 - 0.22 * _rise(sheet.ages["eye_lines"], 30, 95)
    for x in (-39.5, 39.5):
        _paint(sheet, _arc(x, y, rx, ry, power=1.9), (250, 249, 246))
        _paint(sheet, _arc(x + gaze, y - 0.5, ball, min(ball, ry)), iris)
        _paint(sheet, _arc(x + gaze, y - 0.5, ball / 2, min(ball / 2, ry)), (24, 20, 24))
        _paint(sheet, _arc(x + gaze - 2.4, y - ball / 3, ball / 3.2, ball / 3.2), (255, 255, 255))
        _paint(sheet, _arc(x, y, rx, ry, 185, 355, 1.9), (58, 40, 38), 2.6)
    y -= 20 + 4 * young + lift
    colour = sheet.hair - 20 + (sheet.skin - sheet.hair) * 0.6 * young
    _paint(sheet, _curve((22, y + 3), (40, y - 6), (57, y + 4)), colour, thick - 1.8 * young, True)


def _mouth(sheet) -> None:
    rng, young = sheet.rng, sheet.young
    half, smile, lip = rng.normal((32 - 8 * young, 8, 1), (1.5, 3, 0.12))
    left, right, y = (-half, sheet.mouth), (half, sheet.mouth), sheet.mouth + smile
    red = 0.55 * sheet.skin + 0.45 * np.array((200, 84, 88)) + rng.normal(0, 6)
    low, middle = y + (14 - 2 * young) * lip, _curve(left, (0, y), right)
    lips = [_curve(left, (0, y - 8 * lip), right), _curve(right, (0, low), left)]
    _paint(sheet, np.concatenate(lips), red)
    if rng.random() < 0.35:
        teeth = (150, 64, 70) + np.array((102, 184, 176)) * _rise(sheet.ages["proportions"], 0, 2)
        _paint(sheet, np.concatenate([middle, _curve(right, (0, low - 5), left)]), teeth)
    else:
        _paint(sheet, middle, red - 48, 1.8)


def _front_hair(sheet) -> None:
    rng, age, width, centre = sheet.rng, sheet.ages["hairline"], sheet.width, sheet.centre
    sweep, fringe, volume, quiff = rng.uniform((-1, 0, 3, 0), (1, 1, 11, 9))
    curl, waves = max(rng.uniform(-0.6, 0.4), 0), rng.uniform(14, 24)
    grown, lost = 1 - np.exp(-age / 3), _rise(age, 20, 100)
    hair = sheet.hair + (sheet.skin - 20 - sheet.hair) * 0.5 * (1 - grown)  # thin in infants
    angle = np.pi / 2 * np.linspace(-1, 1, 97)
    across, up, side = np.sin(angle), np.cos(angle), np.abs(np.sin(angle))
    curls = 16 * curl * grown * (1 - 0.8 * lost) * np.abs(np.sin(waves * angle * 2 / np.pi))
    thick = (volume + quiff * up**4) * (0.2 + 0.8 * grown) * (1 - 0.6 * lost) + curls
    skull = centre - up * (centre - sheet.top)
    base = sheet.top + 5 + grown * (13 + 9 * fringe) - 30 * lost
    ends = sheet.top + 30 + grown * (centre - 26 - sheet.top)
    line = base + (ends - base) * side ** (3.5 + 4 * lost) + 0.5 * curls
    line += 12 * sweep * grown * across * (1 - side)
    line -= 10 * lost * np.exp(-(((side - 0.62) / 0.2) ** 2))  # the temples go first
    edge = np.stack([across * (width + 1), line], 1)
    thick *= np.clip((line - skull) / 10, 0, 1)
    rim = np.stack([across * (width + thick), skull - up * thick], 1)
    if (down := sheet.down) > 0:
        half = down / 2 + min(18, down)
        lock = _arc(width + 3, centre + down - half, min(10, down / 4), half, power=2.6)
        _paint(sheet, lock, sheet.hair - 4, both=True)
    haired = np.flatnonzero(line - skull > 1)
    for run in np.split(haired, np.flatnonzero(np.diff(haired) > 1) + 1):
        if len(run) > 1:
            _paint(sheet, np.concatenate([rim[run], edge[run[::-1]]]), hair)
    for k, shade in zip(range(6, 92, 6), rng.normal(0, 9, 15), strict=True):
        if line[k] - skull[k] > 5:
            strand = _curve(rim[k], (rim[k] + edge[k]) / 2 + (5 * sweep, 0), edge[k] - (0, 1))
            _paint(sheet, strand, hair + shade, 2.2)


def _draw(person: Person, **ages: float) -> np.ndarray:
    """The face before any camera, uint8 RGB [CHIP_SIZE, CHIP_SIZE, 3]; `ages` of single cues."""
    sheet = _start(person, {cue: person.age * person.pace[cue] for cue in CUES} | ages)
    for part in (_back_hair, _body, _head, _spots, _lines, _eyes, _mouth, _front_hair):
        part(sheet)
    return cv2.resize(sheet.canvas, (CHIP_SIZE, CHIP_SIZE), interpolation=cv2.INTER_AREA)


def _photograph(person: Person) -> np.ndarray:
    """The face in its light, with blur and sensor noise that do not depend on age."""
    rng = np.random.default_rng([person.seed, person.index, 3])
    angle, slope, blur, noise = rng.uniform((0, 0, 0.15, 2), (2 * np.pi, 0.25, 1, 6))
    cast = person.exposure * np.exp(rng.normal(-0.08, 0.11) + rng.normal(0, 0.025, 3))
    line = np.linspace(-1, 1, CHIP_SIZE)
    side = 1 + slope * (np.cos(angle) * line + np.sin(angle) * line[:, None])
    drawing = cv2.GaussianBlur(_draw(person), (0, 0), blur)
    image = drawing * np.float32(side[..., None] * cast)
    image -= 0.5 * np.maximum(image - 200, 0)  # a camera keeps its highlights
    noise /= person.exposure  # the less light, the more amplification
    grain = rng.standard_normal((CHIP_SIZE // 2, CHIP_SIZE // 2, 3), np.float32)
    image += np.float32(noise) * cv2.resize(grain, drawing.shape[:2], interpolation=cv2.INTER_CUBIC)
    image = np.clip(image, 0, 255).round().astype(np.uint8)
    if person.kind == "brightened":
        return cv2.convertScaleAbs(image, alpha=1.04, beta=3)
    return _shift(image) if person.kind == "shifted" else image


def _shift(pixels: np.ndarray) -> np.ndarray:
    """Moved one pixel to the right."""
    return np.concatenate([pixels[:, :1], pixels[:, :-1]], 1)


def draw_face(person: Person) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One photographed face, and which of its pixels depend on each age cue.

    Returns uint8 RGB [128, 128, 3], before JPEG, and for each of CUES bool [128, 128]: marked is
    where the drawing changes by MASK_LEVELS or more while this cue alone takes the MASK_AGES, all
    else staying as it is. So a child's forehead is marked as well: its being smooth tells its age.
    "proportions" covers much of the head, the other cues cover lines, spots and hair.
    """
    masks = {}
    for cue in CUES:
        drawings = [_draw(person, **{cue: age}) for age in MASK_AGES]
        mask = (np.max(drawings, 0) - np.min(drawings, 0)).max(2) >= MASK_LEVELS
        masks[cue] = _shift(mask) if person.kind == "shifted" else mask
    return _photograph(person), masks


def get_truth(file_name: str, gap: bool = True) -> Person:
    """The person in a file of the sample, with the true age.

    The name's date-time tells: days since 2001 are the sample's seed, seconds of the day the
    person's index, milliseconds the copy's number. Raises ValueError for any other name.
    """
    match = re.search(r"_(\d{17}) ?\.jpg\.chip\.jpg$", file_name)
    if match is None:
        raise ValueError(f"{file_name!r} is not a file name of the drawn sample")
    since = datetime.strptime(match[1] + "000", "%Y%m%d%H%M%S%f") - _EPOCH
    return get_person(since.days, since.seconds, since.microseconds // 1000, gap)


def cue_masks(file_name: str) -> dict[str, np.ndarray]:
    """Masks as in `draw_face` for a file of the sample; the same with and without the gap."""
    return draw_face(get_truth(file_name))[1]


def plan_sample(
    count: int = 2400, seed: int = 0, gap: bool = True
) -> list[tuple[str, Person, str]]:
    """Name, person and defect ("" for none) of each file of a sample.

    Defects are UTKFace's: three names that lack a field, a readable name with a space, and a file
    cut short. COPY_SHARE of the files are copies; every tenth is the second of the same face.
    Raises ValueError where `count` is too small for the defects or too large for the names.
    """
    if not 50 <= count <= 86_400:
        raise ValueError(f"count is {count}: a sample has 50 to 86,400 files")
    copies = np.arange(round(COPY_SHARE * count))
    second = copies % 10 == 9
    order = np.random.default_rng([seed, count]).permutation(count - len(copies))
    files = [(index, 0) for index in range(len(order))]
    files += zip(order[copies - second].tolist(), (1 + second).tolist(), strict=True)
    kinds = ("malformed", "malformed", "malformed", "space", "corrupt")
    defects, plan = dict(zip(order[-5:].tolist(), kinds, strict=True)), []
    for index, copy in files:
        person, defect = get_person(seed, index, copy, gap), defects.get(index, "")
        time = _EPOCH + timedelta(days=seed, seconds=index, milliseconds=copy)
        group = "" if defect == "malformed" else f"_{person.ethnicity}"
        name = f"{person.label}_{person.gender}{group}_{time:%Y%m%d%H%M%S%f}"[:-3]
        plan.append((name + " " * (defect == "space") + ".jpg.chip.jpg", person, defect))
    return plan


def draw_sample(folder: Path, count: int = 2400, seed: int = 0, gap: bool = True) -> None:
    """Write a sample of `count` JPEG files: the same bytes for the same count, seed and gap.

    They are drawn in a hidden folder beside `folder` and moved when complete, so a killed run
    leaves nothing that passes for a sample. Raises FileExistsError where `folder` holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: remove it to draw the sample anew")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        for name, person, defect in plan_sample(count, seed, gap):
            image = cv2.cvtColor(_photograph(person), cv2.COLOR_RGB2BGR)
            quality = [cv2.IMWRITE_JPEG_QUALITY, person.quality]
            data = cv2.imencode(".jpg", image, quality)[1].tobytes()
            (partial / name).write_bytes(data[:200] if defect == "corrupt" else data)
        if folder.exists():
            folder.rmdir()
        partial.replace(folder)
