"""Writes the results into the README and the model card, from figures/results.json, and the table
of faults into the README, from build/faults.json where a test run has left it.

python -m utils.report
"""

from __future__ import annotations

import json
import re

from utils.evaluation import SMALL, show
from utils.settings import CHECKPOINT, ROOT

README, MODEL_CARD = ROOT / "README.md", CHECKPOINT.parent / "README.md"
MEAN = "mean of the ten"  # a row of results["corruption_ratio"]
FAULTS = ROOT / "build" / "faults.json"


def headline(results: dict) -> str:
    """Markdown of the main figures, each with its 95 % interval and number of faces."""
    ratios = results["corruption_ratio"]
    worst = max((name for name in ratios if name != MEAN), key=lambda name: ratios[name]["value"])
    rows = [
        ("**Test MAE (years)**", f"**{show(results['test_mae'])}**"),
        ("Within 5 years (CS@5, %)", show(_percent(results["test_cs5"]), 1)),
        ("Bias (predicted minus labelled, years)", show(results["test_bias"])),
        ("*Predicting the median age for everyone*", show(results["baseline_constant_mae"])),
        ("*MAE that label noise alone would give*", show(results["label_noise_mae"]) + " pairs"),
        ("MAE on the split of CORAL, ages 21-60", show(results["coral_test_mae"])),
        ("Error in bad light or quality, over clean: mean of ten kinds", show(ratios[MEAN])),
        (f"The worst of the ten: {worst}", show(ratios[worst])),
        (
            "Gap between ethnicities at equal age (years)",
            show(results["age_standardised_gap"]["shipped"]),
        ),
        (
            "MAE at equal age of the group that does worst",
            show(results["worst_group_mae"]["shipped"]),
        ),
        (
            "Labels inside the 90 % interval of their face (%)",
            show(_percent(results["interval_coverage"]["conformal"]["0.9"]), 1),
        ),
        (
            "Change of the age when a face is cropped anew, mean of three views (years)",
            show(results["photo_crop"]["three views"]["mean"]),
        ),
        (
            "Training speed on a CPU over the usual notebook loop (ResNet-50, 128 px)",
            show(results["benchmark"]["cpu_ratio"]) + " rounds",
        ),
    ]
    return f"{_table('UTKFace, test split', rows)}\n\n{_training(results['training'])}"


def details(results: dict) -> str:
    """Markdown of the error by group, and under each corruption.

    Groups of fewer than SMALL faces are named as too small instead of being compared.
    """
    rows = []
    for key in ("mae_by_age_band", "mae_by_ethnicity", "mae_by_gender"):
        title = key.removeprefix("mae_by_").replace("_", " ").capitalize()
        for name, figure in results[key].items():
            small = figure["n"] < SMALL
            text = f"too few faces ({figure['n']}) to compare" if small else show(figure)
            rows.append((f"{title}: {name}", text))
    for name, figure in results["age_standardised_mae"].items():
        rows.append((f"Ethnicity at equal age: {name}", show(figure)))
    groups = _table("MAE (years) on the test split", rows)
    spoilt, ratios = results["corruption_mae"], results["corruption_ratio"]
    lines = []
    for name, figures in spoilt.items():
        cells = [f"{figures[str(severity)]['value']:.2f}" for severity in range(1, 6)]
        cells.append(f"{ratios[name]['value']:.2f}" if name in ratios else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    clean = show(results["corruption_clean"]["shipped"])
    return (
        f"{groups}\n\nMAE (years) of spoilt test faces by severity, without flip averaging (clean: "
        f"{clean}):\n\n| corruption | 1 | 2 | 3 | 4 | 5 | severity 3 over clean |\n"
        "|---|---|---|---|---|---|---|\n" + "\n".join(lines)
    )


def _table(title: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"| {title} | value [95 % interval] |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {value} |" for name, value in rows])


def _training(train: dict) -> str:
    device = train["device"].replace(", 1 threads", ", 1 thread")  # as older versions wrote it
    return (
        f"{train['backbone']} at {train['image_size']} px, {train['epochs']} epochs, "
        f"{train['seconds'] / 60:.0f} minutes on {device} "
        f"({train['images_per_second']:.0f} images/s), first weights: {train['origin']}."
    )


def with_block(text: str, block: str, name: str = "the file", kind: str = "results") -> str:
    """`text` with the part between its two results (or other) comments written anew.

    Raises ValueError where the comments are missing.
    """
    place = re.compile(rf"(<!-- {kind}: .*? -->\n).*?(<!-- /{kind} -->)", re.DOTALL)
    if not place.search(text):
        raise ValueError(f"{name} has lost its {kind} block: <!-- {kind}: --> ... ")
    return place.sub(lambda m: f"{m[1]}{block}\n{m[2]}", text)


def reliability(faults: dict[str, dict]) -> str:
    """Markdown of what can go wrong, what the reader gets, and how many tests provoke it.

    Raises ValueError where a test failed or was skipped: the table is of what holds.
    """
    open_ = [what for what, row in faults.items() if row.keys() & {"failed", "skipped"}]
    if open_:
        raise ValueError(f"not written, for tests failed or were skipped: {'; '.join(open_)}")
    rows = [f"| {what} | {row['outcome']} | {row['passed']} |" for what, row in faults.items()]
    tests = sum(row["passed"] for row in faults.values())
    return (
        f"<details><summary><b>{len(faults)} faults, provoked by {tests} tests</b></summary>\n\n"
        "| what goes wrong | what you get | tests |\n|---|---|---|\n"
        + "\n".join(sorted(rows, key=str.lower))
        + "\n\n</details>"
    )


def pages(results: dict) -> dict:
    """The text of the README and of the model card, with these results in their blocks."""
    blocks = {README: headline(results), MODEL_CARD: headline(results) + "\n\n" + details(results)}
    return {p: with_block(p.read_text("utf-8"), block, p.name) for p, block in blocks.items()}


def _percent(figure: dict) -> dict:
    return {key: 100 * value if key != "n" else value for key, value in figure.items()}


if __name__ == "__main__":
    published = json.loads((ROOT / "figures" / "results.json").read_text())
    for page, text in pages(published).items():
        page.write_text(text, "utf-8")
        print(f"{page.relative_to(ROOT)}: results written from figures/results.json")
    if FAULTS.is_file():
        block = reliability(json.loads(FAULTS.read_text("utf-8")))
        README.write_text(with_block(README.read_text("utf-8"), block, README.name, "faults"))
        print(f"{README.name}: table of faults written from build/{FAULTS.name}")
