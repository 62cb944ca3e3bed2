"""Drawn faces: age cues, label errors and lighting gap are known, and follow from the name."""

from collections import namedtuple
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from utils.settings import CHIP_SIZE

cv2.ipp.setUseIPP(False)  # Intel's routines round as the CPU has it: the sample would depend on it
CUES = ("proportions", "hairline", "hair", "forehead_lines", "eye_lines", "mouth_lines", "spots")
GROUPS = (  # share, mean skin tone, years at 0, 5, 10, 20, ..., 90, 95 and 100 %, like UTKFace's
    (0.43, 0.28, (1, 4, 9, 19, 26, 29, 35, 40, 50, 58, 68, 78, 100)),  # White
    (0.19, 0.66, (1, 16, 21, 25, 26, 28, 30, 33, 36, 42, 55, 65, 95)),  # Black
    (0.14, 0.38, (1, 1, 1, 3, 20, 24, 26, 27, 30, 35, 54, 72, 100)),  # Asian
    (0.17, 0.54, (1, 1, 5, 22, 25, 26, 28, 33, 38, 46, 55, 60, 90)),  # Indian
    (0.07, 0.46, (1, 1, 2, 7, 17, 22, 25, 26, 29, 34, 41, 48, 85)),  # Others
)
COPY_KINDS = ("identical", "identical", "reencoded", "brightened", "shifted")
# Drawing: RGB colours; lengths in pixels of UTKFace's 200 px chips, x from the face's midline.
SKINS = ((252, 220, 198), (240, 194, 160), (218, 164, 124), (188, 132, 96), (156, 106, 80))
HAIRS = ((44, 40, 44), (66, 46, 38), (98, 66, 48), (136, 90, 56), (160, 86, 50), (216, 180, 116))
IRISES = ((78, 52, 38), (78, 52, 38), (110, 78, 48), (84, 112, 78), (84, 126, 162))
CLOTHES = ((66, 104, 146), (200, 98, 88), (88, 146, 124), (236, 196, 104), (122, 98, 150))
SIDE = 2 * CHIP_SIZE  # faces are drawn at this size, then shrunk
CURVE = np.array([((1 - t) ** 2, 2 * t * (1 - t), t * t) for t in np.linspace(0, 1, 13)])  # Bezier
MOVED = np.maximum(np.arange(CHIP_SIZE) - 1, 0)  # columns of a face moved one pixel to the right
# `age` is true, `label` in the name; `tone` 0 light to 1 dark; each cue looks `pace` x `age` old
FIELDS = "seed index copy kind age label gender ethnicity tone pace exposure quality"
Person = namedtuple("Person", FIELDS)


def get_person(seed: int, index: int, copy: int = 0, gap: bool = True) -> Person:
    """Person of sample `seed`; `copy` numbers near-duplicates; `gap` changes only the exposure."""
    rng = np.random.default_rng([seed, index, 0])
    shares, tones, quantiles = zip(*GROUPS, strict=True)
    group, gender = int(rng.choice(5, p=shares)), int(rng.integers(2))
    tone = min(max(rng.normal(tones[group], 0.17), 0), 1)
    percent = (0, 5, *range(10, 100, 10), 95, 100)
    age = round(float(np.interp(100 * rng.random(), percent, quantiles[group])))
    age = 26 if rng.random() < 0.05 else age  # UTKFace's spike
    pace = dict(zip(CUES, np.exp(rng.normal(0, 0.15, len(CUES))).tolist(), strict=True))
    dark, quality = 0.33 * float(np.exp(rng.normal(0, 0.08))), int(rng.integers(72, 96))
    light = dark if gap and group == 3 else 1.0  # the lighting gap
    rng = np.random.default_rng([seed, index, 1, copy])  # label errors differ from copy to copy
    kind = COPY_KINDS[rng.integers(len(COPY_KINDS))] if copy else "original"
    error = rng.laplace(0, 4 * min(1, (age + 1) / 20))  # of a third of the labels
    label = max(round(age + error), 1) if rng.random() < 0.33 else age
    quality -= 20 * (kind == "reencoded")
    return Person(seed, index, copy, kind, age, label, gender, group, tone, pace, light, quality)


def _rise(age: float, start: float, stop: float) -> float:
    """Smooth rise from 0 at `start` years to 1 at `stop` years."""
    t = min(max((age - start) / (stop - start), 0), 1)
    return t * t * (3 - 2 * t)


def _background(rng: np.random.Generator) -> np.ndarray:
    """Clouds of colour and things out of focus, uint8 [SIDE, SIDE, 3]."""
    base = 178 + rng.normal(0, 11, 3) + rng.normal(0, 20)
    image = cv2.resize(base + rng.normal(0, 16, (4, 4, 1)) + rng.normal(0, 7, (4, 4, 3)), (64, 64))
    for _ in range(9):
        x, y, size, disc = np.rint(rng.uniform((-4, -4, 4, -1), (68, 68, 12, 1))).astype(int)
        colour = (base + rng.normal(0, 30) + rng.normal(0, 9, 3)).tolist()
        if disc:
            cv2.circle(image, (x, y), size, colour, -1)
        else:
            cv2.rectangle(image, (x - size // 2, y - size), (x + size, y + 3 * size), colour, -1)
    image = cv2.GaussianBlur(np.clip(image, 0, 255).astype(np.uint8), (0, 0), 2)
    return cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)


def _paint(canvas, pose, points, colour, width: float = 0, both: bool = False) -> None:
    """Fill a polygon, or draw a line of `width` along the points, on one or both sides."""
    colour, thickness = np.atleast_1d(colour).tolist(), max(1, round(width * SIDE / 200))
    for half in (points, points * (-1, 1)) if both else (points,):
        place = [((half @ pose[:2] + pose[2]) * 16).round().astype(np.int32)]  # in 1/16 px
        if width:
            cv2.polylines(canvas, place, False, colour, thickness, cv2.LINE_AA, 4)
        else:
            cv2.fillPoly(canvas, place, colour, cv2.LINE_AA, 4)


def _glow(canvas, pose, point, radius: float, change) -> None:
    """Add a soft round patch of `change` in RGB."""
    (x, y), reach = ((point @ pose[:2] + pose[2]) * 16).round() / 16, radius * SIDE / 200
    left, upper = max(int(x - reach), 0), max(int(y - reach), 0)
    patch = canvas[upper : int(y + reach) + 2, left : int(x + reach) + 2]
    down, across = np.ogrid[upper : upper + len(patch), left : left + patch.shape[1]]
    bump = np.maximum(1 - ((across - x) ** 2 + (down - y) ** 2) / reach**2, 0) ** 2
    patch[:] = np.clip(patch + bump[..., None] * np.asarray(change), 0, 255)


def _arc(x, y, rx, ry, start=0, stop=360, power=2.0) -> np.ndarray:
    """Part of a superellipse, from `start` to `stop` degrees, clockwise from the right."""
    t = np.radians(np.linspace(start, stop, 33))
    points = np.stack([np.cos(t), np.sin(t)], 1)
    return np.sign(points) * np.abs(points) ** (2 / power) * (rx, ry) + (x, y)


def _draw(person: Person) -> np.ndarray:
    """The face before any camera, uint8 RGB [CHIP_SIZE, CHIP_SIZE, 3]."""
    ages = {cue: person.age * person.pace[cue] for cue in CUES}
    rng = np.random.default_rng([person.seed, person.index, 2])  # draws the same at any age
    tilt, scale = np.radians(rng.normal(0, 3.5)), 0.92 * np.exp(rng.normal(0, 0.03))
    (x, y), c, s = rng.normal((97.5, 104), 2.5), scale * np.cos(tilt), scale * np.sin(tilt)
    pose = np.array([[c, s], [-s, c], [x + 104 * s, y - 104 * c]]) * (SIDE / 200)
    young = float(np.exp(-((ages["proportions"] / 9) ** 1.1)))  # 1 at birth, 0 in adults
    shape = rng.normal((-5, 58, 78, 101, 139, 191, 75), (2, 1, 0, 2, 2, 3, 3))  # of adults
    shape += young * np.array((-5, 10, 9, -1, -7, -24, 7))
    top, eye, centre, nose, mouth, chin, width = shape
    skin = np.array([np.interp(person.tone, np.linspace(0, 1, 5), c) for c in np.transpose(SKINS)])
    hair = np.array(HAIRS[rng.integers(len(HAIRS))]) + rng.normal(0, 6)
    hair += (np.array((214, 213, 214)) - hair) * _rise(ages["hair"], 26, 84)
    long = min(max(rng.normal((0.15, 0.55)[person.gender], 0.3), 0), 1)
    down = 145 * long * (1 - np.exp(-ages["hairline"] / 5)) - 26  # of the hair, below the centre
    canvas = _background(rng)
    paint, glow = partial(_paint, canvas, pose), partial(_glow, canvas, pose)
    if down > 0:  # long hair, behind the body
        wide, high = width + min(13, down / 3), centre - top + min(6, down / 5)
        back = _arc(0, centre, wide, high, 180, 360), _arc(0, centre, wide, down, 0, 180, 3.5)
        paint(np.vstack(back), hair - 18)
    cloth = np.array(CLOTHES[rng.integers(len(CLOTHES))]) + rng.normal(0, 12, 3)
    paint(_arc(0, chin + 72, 112 - 16 * young, 58, 180, 360, 2.6), cloth)
    paint(_arc(0, 120, 42 - 10 * young, chin - 108, power=9), skin - 30)
    paint(_arc(0, chin + 8, 41 - 10 * young, rng.uniform(8, 16), 0, 180), skin - 30)
    paint(_arc(width - 1, eye + 16, 10, 17), skin - 14, both=True)
    jaw, light = min(max(rng.normal(2.15, 0.15), 1.9), 2.5), (rng.normal(0, 10), centre)
    face = _arc(0, centre, width, chin - centre, 0, 180, jaw)
    face = np.vstack((_arc(0, centre, width, centre - top, 180, 360), face))
    for step in np.linspace(0, 1, 9):  # lighter towards the middle
        paint(face + 0.4 * step * (light - face), skin - 16 + 22 * step)
    for x in (-46, 46):
        glow((x, mouth - 18), 26, np.array((12, -10, -8)) * (0.6 + 1.2 * young))
    glow((0, nose - 8), 13, (9, 8, 8))
    for k in range(10):  # age spots, the first on the forehead
        x, y, radius = rng.uniform((28, 0, 5), (66, 1, 9))
        x, y = (0.62 * x, eye - 44 + 20 * y) if k < 3 else (x, eye + 26 + 40 * y)
        glow((x * (-1) ** k, y), radius, np.array((-26, -32, -34)) * _rise(ages["spots"], 14, 90))
    ink = np.zeros((SIDE, SIDE), np.uint8)  # lines: darker by as many levels on any skin
    trace = partial(_paint, ink, pose, both=True)
    brow, eyes, cheeks = (56 * _rise(ages[cue], 8, 84) for cue in CUES[3:6])
    trace(CURVE @ ((26, eye + 15), (42, eye + 25), (54, eye + 14)), eyes, 2.2)
    trace(CURVE @ ((17, nose), (38, nose + 10), (43, mouth + 4)), cheeks, 2.6)
    trace(CURVE @ ((37, mouth + 11), (40, mouth + 17), (34, mouth + 25)), 0.7 * cheeks, 2.2)
    trace(_arc(0, nose, 11 - 4 * young, 6, 15, 165), 46, 2.4)
    trace(_arc(width + 2, eye + 15, 4, 9, -120, 100), 30, 2)
    trace(_arc(39.5, eye - 4, 15, 10 + 4 * young, 205, 335), 26, 1.6)
    for k in range(3):
        half, bend = rng.normal((44 - 5 * k, -7), (4, 3))
        x, y, z = width - 6, eye - 26 - 8.5 * k, eye + 5 * k - 4
        trace(CURVE @ ((-half, y), (0, y + bend), (half, y)), brow, 2.2)
        trace(CURVE @ ((x - 12, z), (x - 6, z + 2 * k - 2), (x, z + 7 * k - 6)), eyes, 2)
    cv2.subtract(canvas, cv2.merge([cv2.GaussianBlur(ink, (0, 0), 1.0)] * 3), dst=canvas)
    iris = IRISES[rng.integers(len(IRISES))]  # eyes, brows and mouth
    size, gaze, lift, thick = rng.normal((1, 0, 0, 4.4), (0.05, 1.2, 1.5, 0.8))
    rx, ry, ball = size * (14 + 3 * young), size * (8.6 + 5.2 * young), size * (8 + 3 * young)
    ry *= 1 - 0.22 * _rise(ages["eye_lines"], 30, 95)
    for x in (-39.5, 39.5):
        paint(_arc(x, eye, rx, ry, power=1.9), (250, 249, 246))
        paint(_arc(x + gaze, eye - 0.5, ball, min(ball, ry)), iris)
        paint(_arc(x + gaze, eye - 0.5, ball / 2, min(ball / 2, ry)), (24, 20, 24))
        paint(_arc(x + gaze - 2.4, eye - ball / 3, ball / 3.2, ball / 3.2), (255, 255, 255))
        paint(_arc(x, eye, rx, ry, 185, 355, 1.9), (58, 40, 38), 2.6)
    y, colour = eye - (20 + 4 * young + lift), hair - 20 + (skin - hair) * 0.6 * young
    paint(CURVE @ ((22, y + 3), (40, y - 6), (57, y + 4)), colour, thick - 1.8 * young, both=True)
    half, smile, lip = rng.normal((32 - 8 * young, 8, 1), (1.5, 3, 0.12))
    left, right, y = (-half, mouth), (half, mouth), mouth + smile
    red = 0.55 * skin + 0.45 * np.array((200, 84, 88)) + rng.normal(0, 6)
    high, low, middle = y - 8 * lip, y + (14 - 2 * young) * lip, CURVE @ (left, (0, y), right)
    paint(np.vstack((CURVE @ (left, (0, high), right), CURVE @ (right, (0, low), left))), red)
    if rng.random() < 0.35:  # an open mouth
        teeth = (150, 64, 70) + np.array((102, 184, 176)) * _rise(ages["proportions"], 0, 2)
        paint(np.vstack((middle, CURVE @ (right, (0, low - 5), left))), teeth)
    else:
        paint(middle, red - 48, 1.8)
    sweep, fringe, volume, quiff = rng.uniform((-1, 0, 3, 0), (1, 1, 11, 9))  # front hair
    curl, waves = max(rng.uniform(-0.6, 0.4), 0), rng.uniform(14, 24)
    grown, lost = 1 - np.exp(-ages["hairline"] / 3), _rise(ages["hairline"], 20, 100)
    front = hair + (skin - 20 - hair) * 0.5 * (1 - grown)  # thin in infants
    angle = np.pi / 2 * np.linspace(-1, 1, 97)
    across, up, side = np.sin(angle), np.cos(angle), np.abs(np.sin(angle))
    curls = 16 * curl * grown * (1 - 0.8 * lost) * np.abs(np.sin(waves * angle * 2 / np.pi))
    deep = (volume + quiff * up**4) * (0.2 + 0.8 * grown) * (1 - 0.6 * lost) + curls
    skull, ends = centre - up * (centre - top), top + 30 + grown * (centre - 26 - top)
    base = top + 5 + grown * (13 + 9 * fringe) - 30 * lost
    line = base + (ends - base) * side ** (3.5 + 4 * lost) + 0.5 * curls
    line += 12 * sweep * grown * across * (1 - side)
    line -= 10 * lost * np.exp(-(((side - 0.62) / 0.2) ** 2))  # the temples go first
    deep *= np.clip((line - skull) / 10, 0, 1)
    rim, edge = np.c_[across * (width + deep), skull - up * deep], np.c_[across * (width + 1), line]
    if down > 0:
        half = down / 2 + min(18, down)
        lock = _arc(width + 3, centre + down - half, min(10, down / 4), half, power=2.6)
        paint(lock, hair - 4, both=True)
    haired = np.flatnonzero(line - skull > 1)
    for run in np.split(haired, np.flatnonzero(np.diff(haired) > 1) + 1):
        if len(run) > 1:
            paint(np.vstack((rim[run], edge[run[::-1]])), front)
    for k, shade in zip(range(6, 92, 6), rng.normal(0, 9, 15), strict=True):
        if line[k] - skull[k] > 5:
            strand = rim[k], (rim[k] + edge[k]) / 2 + (5 * sweep, 0), edge[k] - (0, 1)
            paint(CURVE @ strand, front + shade, 2.2)
    return cv2.resize(canvas, (CHIP_SIZE, CHIP_SIZE), interpolation=cv2.INTER_AREA)


def draw_face(person: Person) -> np.ndarray:
    """One face, uint8 RGB [128, 128, 3], in its light; blur and noise do not depend on age."""
    rng = np.random.default_rng([person.seed, person.index, 3])
    angle, slope, blur, noise = rng.uniform((0, 0, 0.15, 2), (2 * np.pi, 0.25, 1, 6))
    cast = person.exposure * np.exp(rng.normal(-0.08, 0.11) + rng.normal(0, 0.025, 3))
    line = np.linspace(-1, 1, CHIP_SIZE)
    side = 1 + slope * (np.cos(angle) * line + np.sin(angle) * line[:, None])
    image = cv2.GaussianBlur(_draw(person), (0, 0), blur) * np.float32(side[..., None] * cast)
    image -= 0.5 * np.maximum(image - 200, 0)  # a camera keeps its highlights
    grain = rng.standard_normal((CHIP_SIZE // 2, CHIP_SIZE // 2, 3), np.float32)
    grain = cv2.resize(grain, (CHIP_SIZE, CHIP_SIZE), interpolation=cv2.INTER_CUBIC)
    image += np.float32(noise / person.exposure) * grain  # less light, more amplification
    image = np.clip(image, 0, 255).round().astype(np.uint8)
    image = cv2.convertScaleAbs(image, alpha=1.04, beta=3) if person.kind == "brightened" else image
    return image[:, MOVED] if person.kind == "shifted" else image


def plan_sample(count: int = 2400, seed: int = 0, gap: bool = True) -> list[tuple]:
    """Name, person and defect ("" for none) of each file of a sample of 50 to 86,400.
    UTKFace's defects: 3 names lack a field, one has a space, one file is cut short; 3 % are copies.
    """
    copies = round(0.03 * count)
    order = np.random.default_rng([seed, count]).permutation(count - copies).tolist()
    defects = dict(zip(order[-5:], ["malformed"] * 3 + ["space", "corrupt"], strict=True))
    files = [(index, 0) for index in range(len(order))]
    files += [(order[k - 1], 2) if k % 10 == 9 else (order[k], 1) for k in range(copies)]
    plan = []
    for index, copy in files:
        person, defect = get_person(seed, index, copy, gap), defects.get(index, "")
        time = datetime(2001, 1, 1) + timedelta(days=seed, seconds=index, milliseconds=copy)
        group = "" if defect == "malformed" else f"_{person.ethnicity}"
        name = f"{person.label}_{person.gender}{group}_{time:%Y%m%d%H%M%S%f}"[:-3]
        plan.append((name + " " * (defect == "space") + ".jpg.chip.jpg", person, defect))
    return plan


def draw_sample(folder: Path, count: int = 2400, seed: int = 0, gap: bool = True) -> None:
    """Write `count` JPEG files, always the same bytes; FileExistsError where `folder` holds any."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: remove it to draw the sample anew")
    for name, person, defect in plan_sample(count, seed, gap):
        image, quality = draw_face(person)[..., ::-1], person.quality
        data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        (folder / name).write_bytes(data[:200] if defect == "corrupt" else data)
