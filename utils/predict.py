"""Ages for photos: in Python, from the command line (--help), as an ONNX file, as a page."""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from utils.evaluation import calibrate, interval
from utils.model import AgeRegressor, load_weights
from utils.photo import VIEWS, Crop, decode_photo, get_crops, read_photo
from utils.settings import CHECKPOINT, CHIP_SIZE, write_atomically
from utils.training import predict

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")  # what is taken from a folder
COLUMNS = ["file", "face", "x", "y", "width", "height", "age", "low", "high", "warnings", "error"]
NO_FACE = "no face found: if the photo is a face crop already, give it as one (crop=True, --crop)"
PAGE = dict(title="How old do they look?", live=True, flagging_mode="never",
            description="Apparent ages, 90 % intervals, left to right. No proof of anyone's age.",
            delete_cache=(60, 600))  # of uploads: after ten minutes, and at the end  # fmt: skip
WIDTHS = ["14%", "14%", "14%", "14%", "44%"]  # of the columns
LOCAL = dict(server_name="127.0.0.1", share=False, run_history=False, footer_links=[],
             inbrowser=True, show_error=True)  # fmt: skip


class AgePredictor:
    """Ages by a checkpoint; without `intervals`, low and high are NaN. Raises as `load_weights`."""

    def __init__(self, checkpoint: str | Path = CHECKPOINT) -> None:
        self.model, self.facts = load_weights(Path(checkpoint))
        self.intervals = self.facts.get("intervals")
        self.calibration = self.facts.get("calibration", {"edges": [0], "years": [0.0]})

    def chips(self, chips: np.ndarray, views: int = 1) -> pd.DataFrame:
        """age, low, high and spread in years of chips (uint8 RGB [N, CHIP_SIZE, CHIP_SIZE, 3]):
        a row is the mean over `views` chips that follow each other, and their mirror images."""
        rows, read = np.arange(len(chips)), self.model.ages_and_spreads
        answers = predict(self.model, chips, rows, flip=True, read=read).astype(float)
        age, spread = answers.reshape(-1, views, 2).mean(1).T
        age = calibrate(age, self.calibration)
        low, high = interval(age, spread, self.intervals) if self.intervals else (np.nan, np.nan)
        return pd.DataFrame({"age": age, "low": low, "high": high, "spread": spread})

    def photo(self, photo: np.ndarray, crop: bool = False) -> pd.DataFrame:
        """COLUMNS for each face that `get_crops` finds in a photo (uint8 RGB [h, w, 3])."""
        return self.crops([("", number, c) for number, c in enumerate(get_crops(photo, crop), 1)])

    def crops(self, found: Sequence[tuple[str, int, Crop]]) -> pd.DataFrame:
        """COLUMNS for (file, number of the face, crop): boxes in px; no age of a refused crop."""
        chips = np.array([crop.chips for _, _, crop in found], np.uint8)
        ages = self.chips(chips.reshape(-1, CHIP_SIZE, CHIP_SIZE, 3), len(VIEWS)).to_numpy()
        rows = []
        for (file, number, crop), (*answer, _) in zip(found, ages, strict=True):
            box = crop.face.box.round().astype(int) if crop.face else [None] * 4
            text = "; ".join([*crop.warnings, "no answer"] if crop.refused else crop.warnings)
            answer = [np.nan] * 3 if crop.refused else answer
            rows.append([file, number, *box, *answer, text, ""])
        return pd.DataFrame(rows, columns=COLUMNS)

    def files(self, paths: Iterable[Path], crop: bool = False) -> Iterator[pd.DataFrame]:
        """COLUMNS for each file, `error` where it has no answer. Raises as `load_detector`."""
        for path in paths:
            name = str(path).encode("utf-8", "replace").decode()  # an old zip's may be no UTF-8
            try:
                photo, reason = decode_photo(path.read_bytes(), Path(name).name), NO_FACE
            except (OSError, ValueError) as error:
                photo, reason = None, getattr(error, "strerror", None) or str(error)
            table = [] if photo is None else self.photo(photo, crop)
            if len(table) == 0:
                table = pd.DataFrame([{"warnings": "", "error": reason}], columns=COLUMNS)
            yield table.assign(file=name)


class _Graph(torch.nn.Module):  # uint8 chips [N, 3, CHIP_SIZE, CHIP_SIZE] to age and spread [N]
    def __init__(self, model: AgeRegressor, edges: list, years: list) -> None:
        super().__init__()
        self.edges, self.years = torch.tensor(edges[1:]), torch.tensor(years)
        eye, shape = torch.eye(CHIP_SIZE)[None, None], (model.image_size, CHIP_SIZE)
        matrix = torch.nn.functional.interpolate(eye, shape, mode="bilinear", antialias=True)
        self.model, self.matrix = model, matrix[0, 0]  # resizes alike in every runtime

    def forward(self, chips: torch.Tensor) -> tuple[torch.Tensor, ...]:
        images = (self.matrix @ (chips.float() / 255) @ self.matrix.T).clamp(0, 1)
        outputs = self.model.outputs(torch.cat([images, images.flip(3)]))
        age, spread = self.model.ages_and_spreads(outputs).unflatten(0, (2, -1)).mean(0).unbind(1)
        bands = (age.unsqueeze(1) >= self.edges).sum(1)
        return (age + self.years[bands]).clamp(min=0), spread


def export_onnx(predictor: AgePredictor, path: str | Path) -> None:
    """Write one ONNX file: `chips` (uint8 RGB [N, 3, 128, 128]) to `age`, `spread` (float32 [N] in
    years, mean over chip and mirror image). Metadata: "intervals" (JSON or null), "crop"."""
    graph = _Graph(predictor.model.cpu(), **predictor.calibration).eval()
    chips = torch.zeros(2, 3, CHIP_SIZE, CHIP_SIZE, dtype=torch.uint8)
    names = dict(input_names=["chips"], output_names=["age", "spread"], verbose=False)
    program = torch.onnx.export(graph, (chips,), **names, dynamic_shapes=[{0: "faces"}])
    program.model.metadata_props["crop"] = predictor.facts["crop"]
    program.model.metadata_props["intervals"] = json.dumps(predictor.intervals)
    write_atomically(Path(path), lambda file: program.save(file, external_data=False))


def demo() -> None:
    """Serve a page for photos to this machine alone, until Ctrl-C. ImportError without Gradio."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    import gradio as gr

    from utils import explain, plots

    predictor, shown = AgePredictor(), ["face", "age", "low", "high", "warnings"]

    def answer(path: str | None, crop: bool) -> tuple:
        if not (crops := path and get_crops(photo := read_photo(path), crop)):
            return path, [[NO_FACE]] if path else None, None
        table = predictor.crops([("", number, crop) for number, crop in enumerate(crops, 1)])
        for box in table[["x", "y", "width", "height"]].dropna().to_numpy(int):
            cv2.rectangle(photo, box, (255, 200, 0), max(photo.shape) // 200 + 1)
        chips, titles = np.stack([crop.chips[0] for crop in crops]), [*map(str, table["face"])]
        maps = explain.age_maps(predictor.model, chips, range(len(chips)))
        figure = plots.show_maps(chips, maps, titles, None)
        figure.set_size_inches(6, 3)
        return photo, table[shown].round(1), figure

    photo = gr.Image(sources=["upload", "webcam"], type="filepath", image_mode=None, label="Photo")
    faces = gr.Image(label="Faces", format="jpeg", height=400, buttons=["fullscreen"])
    ages = gr.Dataframe(headers=shown, label="Years", wrap=True, column_widths=WIDTHS)
    inputs = [photo, gr.Checkbox(label="The photo is a face crop already")]
    gr.Interface(answer, inputs, [faces, ages, gr.Plot(label="Maps")], **PAGE).launch(**LOCAL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a row for each face; returns 1 where a file has no answer, 130 after Ctrl-C, else 0."""
    parser = argparse.ArgumentParser("python -m utils.predict", description="Ages for photos.")
    parser.add_argument("photos", nargs="*", type=Path, metavar="PHOTO_OR_FOLDER")
    parser.add_argument("--crop", action="store_true", help="the photos are face crops already")
    parser.add_argument("--format", choices=("csv", "json"), default="csv")
    parser.add_argument("--output", type=Path, help="file to write; else the screen")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--export", type=Path, metavar="FILE.onnx", help="export the network")
    parser.add_argument("--demo", action="store_true", help="open a page for photos in a browser")
    options = parser.parse_args(arguments)
    if not (options.photos or options.export or options.demo):
        parser.error("name photos or folders, --export FILE.onnx, or --demo")
    texts, files, code, done = [], [], 0, 0
    write = texts.append if options.output else sys.stdout.write
    try:
        if options.demo:
            demo()
            return 0
        predictor = AgePredictor(options.checkpoint)
        if options.export:
            export_onnx(predictor, options.export)
        for path in options.photos:
            below = sorted(p for p in path.rglob("[!.]*") if p.suffix.lower() in SUFFIXES)
            files += [p for p in below if p.is_file()] if path.is_dir() else [path]
        if options.photos and not files:
            raise ValueError(f"no picture in {', '.join(map(str, options.photos))}")
        bar = tqdm(files, disable=not files or not options.output and sys.stdout.isatty() or None)
        try:
            for table in predictor.files(bar, options.crop):
                if error := table["error"][0]:
                    tqdm.write(f"{table['file'][0]}: {error}", sys.stderr)
                    code = 1
                if options.format == "csv":
                    write(table.round(1).to_csv(index=False, header=not done, lineterminator="\n"))
                else:
                    text = table.round(1).to_json(orient="records", indent=1, force_ascii=False)
                    write(("," if done else "[") + text[1:-2])
                done += 1
        except KeyboardInterrupt:
            tqdm.write(f"Stopped: {done:,} of {len(files):,} photos are done", sys.stderr)
            code = 130
        write("\n]\n" if done and options.format == "json" else "")
        if done and options.output:
            write_atomically(options.output, lambda file: file.write_text("".join(texts), "utf-8"))
    except ImportError as error:
        sys.exit(f"Error: {error}: make demo installs it")
    except (OSError, ValueError) as error:
        sys.exit(f"Error: {error}")
    return code


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # where the screen has fewer letters
    sys.exit(main())
