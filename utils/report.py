"""Writes the README's results table from figures/results.json (`python -m utils.report`)."""

from __future__ import annotations

import json
import re

from utils.evaluation import SMALL, show
from utils.settings import ROOT

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- results: .*? -->\n).*?(<!-- /results -->)", re.DOTALL)


def results_table(results: dict) -> str:
    """Markdown of the published figures, each with its 95 % interval and number of faces.

    Groups of fewer than SMALL faces are named as too small instead of being compared.
    """
    train = results["training"]
    rows = [
        ("**Test MAE (years)**", f"**{show(results['test_mae'])}**"),
        ("Within 5 years (CS@5, %)", show(_percent(results["test_cs5"]), 1)),
        ("Bias (predicted minus labelled, years)", show(results["test_bias"])),
        ("*Predicting the median age for everyone*", show(results["baseline_constant_mae"])),
        ("*MAE that label noise alone would give*", show(results["label_noise_mae"]) + " pairs"),
    ]
    for title, key in (
        ("Aged", "mae_by_age_band"),
        ("", "mae_by_ethnicity"),
        ("", "mae_by_gender"),
    ):
        for name, figure in results[key].items():
            small = figure["n"] < SMALL
            text = f"too few faces ({figure['n']}) to compare" if small else show(figure)
            rows.append((f"MAE: {title} {name}".replace("  ", " "), text))
    table = "\n".join(["| UTKFace, test split | value [95 % interval] |", "|---|---|"]
                      + [f"| {name} | {value} |" for name, value in rows])  # fmt: skip
    return (
        f"{table}\n\n"
        f"{train['backbone']} at {train['image_size']} px, {train['epochs']} epochs, "
        f"{train['seconds'] / 60:.0f} minutes on {train['device']} "
        f"({train['images_per_second']:.0f} images/s), first weights: {train['origin']}."
    )


def readme_with(results: dict, text: str) -> str:
    """The README's text with its results block written anew.

    Raises ValueError where the block's two comment lines are missing.
    """
    if not BLOCK.search(text):
        raise ValueError(f"{README.name} has lost its results block: <!-- results: --> ... ")
    return BLOCK.sub(lambda m: f"{m[1]}{results_table(results)}\n{m[2]}", text)


def _percent(figure: dict) -> dict:
    return {key: 100 * value if key != "n" else value for key, value in figure.items()}


if __name__ == "__main__":
    published = json.loads((ROOT / "figures" / "results.json").read_text())
    README.write_text(readme_with(published, README.read_text("utf-8")), "utf-8")
    print(f"{README.name}: results written from figures/results.json")
