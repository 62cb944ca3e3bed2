"""Ages for photos: in Python, from the command line, and as an ONNX file for other programs.

python -m utils.predict FACE.jpg FOLDER ... [--crop] [--format csv|json] [--output FILE]
python -m utils.predict --export model.onnx
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from utils.augment import resize
from utils.intervals import interval
from utils.model import AgeRegressor, load_weights, write_atomically
from utils.photo import Crop, get_crops, read_photo
from utils.settings import CHECKPOINT, CHIP_SIZE

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # what is taken from a folder
BATCH = 64  # faces
COLUMNS = ["file", "face", "x", "y", "width", "height", "age", "low", "high", "warnings", "error"]
NO_FACE = "no face found: if the photo is a face crop already, give it as one (crop=True, --crop)"


class AgePredictor:
    """Ages with their intervals, by the weights in a checkpoint.

    `intervals` is the table of `utils.intervals.conformal` that the checkpoint carries, or None:
    then `low` and `high` are NaN. Raises what `utils.model.load_weights` raises.
    """

    def __init__(self, checkpoint: str | Path = CHECKPOINT) -> None:
        self.model, self.facts = load_weights(Path(checkpoint))
        self.intervals = self.facts.get("intervals")

    def chips(self, chips: np.ndarray, batch_size: int = BATCH) -> pd.DataFrame:
        """age, low, high and spread in years of chips (uint8 RGB [N, CHIP_SIZE, CHIP_SIZE, 3]).

        Each is the mean over the chip and its mirror image.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = self.model.to(device, memory_format=torch.channels_last).eval()
        answers = [np.empty((0, 2))]
        with torch.inference_mode():
            for start in range(0, len(chips), batch_size):
                part = np.ascontiguousarray(chips[start : start + batch_size])
                batch = torch.from_numpy(part).permute(0, 3, 1, 2)
                images = resize(batch.to(device), model.image_size)
                answers.append(_both_sides(model, images).double().cpu().numpy())
        answers = np.concatenate(answers)
        return self._with_intervals(answers)

    def ages(self, crops: Sequence[Crop]) -> pd.DataFrame:
        """The same for crops of photos: the mean over a crop's views, whatever its warnings."""
        if not crops:
            return self._with_intervals(np.empty((0, 2)))
        chips = np.concatenate([crop.chips for crop in crops])
        answers = self.chips(chips)[["age", "spread"]].to_numpy()
        return self._with_intervals(answers.reshape(len(crops), -1, 2).mean(1))

    def _with_intervals(self, answers: np.ndarray) -> pd.DataFrame:
        table = pd.DataFrame(answers, columns=["age", "spread"])
        table["low"] = table["high"] = np.nan
        if self.intervals and len(table):
            table["low"], table["high"] = interval(table["age"], table["spread"], self.intervals)
        return table[["age", "low", "high", "spread"]]

    def photo(self, photo: np.ndarray, crop: bool = False) -> pd.DataFrame:
        """A row for each face of a photo (uint8 RGB [h, w, 3]), from left to right: COLUMNS.

        No row where no face is found. With `crop` the photo is a face crop already. Raises what
        `utils.photo.find_faces` raises.
        """
        return self.crops([("", number, c) for number, c in enumerate(get_crops(photo, crop), 1)])

    def crops(self, found: Sequence[tuple[str, int, Crop]]) -> pd.DataFrame:
        """COLUMNS for (file, number of the face, crop): boxes in px, ages in years.

        Age and spread are means over the views of a crop; NaN where the crop is refused.
        """
        ages = self.ages([crop for _, _, crop in found])
        ages.loc[[crop.refused for _, _, crop in found]] = np.nan
        rows = []
        for file, number, crop in found:
            box = np.full(4, np.nan) if crop.face is None else np.round(crop.face.box)
            text = "; ".join(crop.warnings) + "; no answer" * crop.refused
            rows.append([file, number, *box, text, ""])
        columns = [name for name in COLUMNS if name not in ages]
        return pd.DataFrame(rows, columns=columns).join(ages)[COLUMNS]

    def files(self, paths: Iterable[Path], crop: bool = False) -> Iterator[pd.DataFrame]:
        """COLUMNS for the faces of many files, in batches; a file that fails is a row with `error`.

        Raises what `utils.photo.load_detector` raises: without a detector no file can succeed.
        """
        waiting, failed = [], []
        for path in paths:
            try:
                photo = read_photo(path)
            except (OSError, ValueError) as error:
                failed.append((str(path), _reason(error)))
                continue
            crops = get_crops(photo, crop)
            waiting += [(str(path), number, c) for number, c in enumerate(crops, 1)]
            failed += [] if crops else [(str(path), NO_FACE)]
            if len(waiting) + len(failed) >= BATCH:
                yield self._batch(waiting, failed)
                waiting, failed = [], []
        if waiting or failed:
            yield self._batch(waiting, failed)

    def _batch(self, waiting: list, failed: list[tuple[str, str]]) -> pd.DataFrame:
        bad = pd.DataFrame(failed, columns=["file", "error"])
        parts = [self.crops(waiting)] * bool(waiting) + [bad] * bool(failed)
        return pd.concat(parts, ignore_index=True).reindex(columns=COLUMNS)


def load_predictor(checkpoint: str | Path = CHECKPOINT) -> AgePredictor:
    """The predictor of the published weights, or of another file of `utils.model.save_weights`."""
    return AgePredictor(checkpoint)


def _reason(error: Exception) -> str:
    return f"{error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)


def _both_sides(model: AgeRegressor, images: torch.Tensor) -> torch.Tensor:
    """Age and spread [B, 2] in years, averaged over images [B, 3, s, s] and their mirror images."""
    views = (images, images.flip(3))
    return sum(model.ages_and_spreads(model.outputs(view)) for view in views) / 2


class _Graph(nn.Module):
    """uint8 chips [N, 3, CHIP_SIZE, CHIP_SIZE] to age and spread [N] in years."""

    def __init__(self, model: AgeRegressor) -> None:
        super().__init__()
        self.model = model
        # Resizing is linear: as a matrix it means the same to every runtime.
        size, eye = model.image_size, torch.eye(CHIP_SIZE)[None, None]
        shape = (size, CHIP_SIZE)
        matrix = F.interpolate(eye, shape, mode="bilinear", antialias=True, align_corners=False)
        self.register_buffer("matrix", matrix[0, 0])

    def forward(self, chips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = (self.matrix @ (chips.float() / 255) @ self.matrix.T).clamp(0, 1)
        answers = _both_sides(self.model, images)
        return answers[:, 0], answers[:, 1]


def export_onnx(predictor: AgePredictor, path: str | Path) -> None:
    """Write the network as one ONNX file that needs nothing of this course.

    Input `chips`: uint8 RGB [N, 3, 128, 128]. Outputs `age` and `spread`: float32 [N], in years,
    averaged over the chip and its mirror image. The file's metadata carry the table of intervals
    ("intervals", JSON) and the place of eyes and mouth in a chip ("crop").
    """
    graph, chips = _Graph(predictor.model).eval(), torch.zeros(2, 3, CHIP_SIZE, CHIP_SIZE)
    program = torch.onnx.export(
        graph,
        (chips.to(torch.uint8),),
        input_names=["chips"],
        output_names=["age", "spread"],
        dynamic_shapes=({0: torch.export.Dim("faces")},),
        dynamo=True,
        verbose=False,
    )
    program.model.metadata_props["crop"] = predictor.facts["crop"]
    program.model.metadata_props["intervals"] = json.dumps(predictor.intervals)
    write_atomically(Path(path), lambda file: program.save(file, external_data=False))


def list_files(names: Sequence[str]) -> list[Path]:
    """Files as they are named; a folder stands for the pictures in it and below, by name."""
    files = []
    for path in map(Path, names):
        if path.is_dir():
            below = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            files += [p for p in below if p.is_file() and not p.name.startswith(".")]
        else:
            files.append(path)
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a row for each face; returns the exit code, 1 where a file has no answer."""
    parser = argparse.ArgumentParser("python -m utils.predict", description="Ages for photos.")
    parser.add_argument("photos", nargs="*", metavar="PHOTO_OR_FOLDER")
    parser.add_argument("--crop", action="store_true", help="the photos are face crops already")
    parser.add_argument("--format", choices=("csv", "json"), default="csv")
    parser.add_argument("--output", type=Path, help="file to write; else the screen")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--export", type=Path, metavar="FILE.onnx", help="export the network")
    options = parser.parse_args(arguments)
    if not options.photos and not options.export:
        parser.error("name photos or folders, or --export FILE.onnx")
    try:
        predictor = load_predictor(options.checkpoint)
        if options.export:
            export_onnx(predictor, options.export)
            print(f"{options.export} written", file=sys.stderr)
        if not options.photos:
            return 0
        if predictor.intervals is None:
            print(f"{options.checkpoint.name} holds no intervals: ages only", file=sys.stderr)
        files = list_files(options.photos)
        tables = []
        for table in predictor.files(files, options.crop):
            tables.append(table)
            for row in table[table["error"].fillna("") != ""].itertuples():
                print(f"{row.file}: {row.error}", file=sys.stderr)
        if not files:
            raise ValueError(f"no picture in {', '.join(options.photos)}")
        table = pd.concat(tables, ignore_index=True)
        _write(table, options.format, options.output)
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    return int((table["error"].fillna("") != "").any())


def _write(table: pd.DataFrame, format_: str, output: Path | None) -> None:
    table = table.assign(
        **{name: table[name].astype(float).round().astype("Int64") for name in COLUMNS[1:6]},
        **{name: table[name].astype(float).round(1) for name in ("age", "low", "high")},
        **{name: table[name].fillna("") for name in ("warnings", "error")},
    )
    if format_ == "csv":
        text = table.to_csv(index=False, lineterminator="\n")
    else:
        text = table.to_json(orient="records", indent=1, force_ascii=False) + "\n"
    if output:
        write_atomically(output, lambda file: file.write_text(text, "utf-8"))
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    sys.exit(main())
