"""The exported network in ONNX Runtime against PyTorch: milliseconds a face, and the same ages?

    python tests/benchmarks/onnx_speed.py [--rounds 7] [--threads 1]

Both start from uint8 chips in memory and end with age and spread, averaged over both mirror
images, on the CPU with as many threads. They take turns, so that a busy machine slows both; the
figure is the median over rounds. With AGE_PUBLISH=1 the figures go to results.json.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import evaluation
from utils.predict import export_onnx, load_predictor
from utils.settings import get_settings
from utils.synthetic import draw_face, get_person

FACES, BATCHES = 128, (1, 64)


def measure(rounds: int, threads: int) -> dict:
    """Milliseconds a face by batch size and runtime, and the largest difference in years."""
    torch.set_num_threads(threads)
    predictor = load_predictor()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(predictor, path)
        size = path.stat().st_size
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    chips = np.stack([draw_face(get_person(0, i, gap=False))[0] for i in range(FACES)])
    planes = np.ascontiguousarray(chips.transpose(0, 3, 1, 2))

    def by_onnx(batch: int) -> np.ndarray:
        starts = range(0, FACES, batch)
        parts = [session.run(None, {"chips": planes[i : i + batch]}) for i in starts]
        return np.concatenate(parts, 1).T

    def by_torch(batch: int) -> np.ndarray:
        return predictor.chips(chips, batch)[["age", "spread"]].to_numpy()

    ways, seconds = {"onnx": by_onnx, "torch": by_torch}, {}
    for turn in range(rounds + 1):  # the first warms up
        for batch in BATCHES:
            for name, way in ways.items():
                start = time.perf_counter()
                way(batch)
                if turn:
                    seconds.setdefault((name, batch), []).append(time.perf_counter() - start)
    figures = {
        f"{name}_ms_batch_{batch}": 1000 * median(taken) / FACES
        for (name, batch), taken in seconds.items()
    }
    difference = np.abs(by_onnx(64) - by_torch(64)).max()
    return figures | {
        "largest_difference_years": float(difference),
        "bytes": size,
        "faces": FACES,
        "threads": threads,
        "onnxruntime": onnxruntime.__version__,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="ONNX Runtime against PyTorch.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    figures = measure(arguments.rounds, arguments.threads)
    print(json.dumps(figures, indent=1))
    settings = get_settings()
    if settings.publish:
        evaluation.record(settings.figures, onnx=figures)
