"""What the numbers of an evaluation say, in words: report.html, and two files of text.

    N images   C classes   p (N, C) probabilities   labels (N,)

The template of the report is also called `report.html`. It gets metrics.json, comparison.json and
the figures, nothing else.
"""

import base64
import csv
import io
import itertools
import os
import platform
import shlex
import sys
from pathlib import Path

import jinja2
import numpy as np
import scipy
import sklearn
import torch
import torchvision
from sklearn.metrics import classification_report

from cli import printable, quoted
from data import Data, Split
from figures import MAX_BARS
from metrics import BINS, METRICS, confused_pairs, holm
from prepare import data_folder


def percent(x: float, digits: int = 1) -> str:
    """A fraction as 12.3%."""
    return f"{x:.{digits}%}"


def points(x: float) -> str:
    """A difference of two fractions, in points without a sign, as 1.2."""
    return f"{100 * abs(x):.1f}"


def signed(x: float, digits: int = 1) -> str:
    """A difference of two fractions, in points with a sign, as +1.2 or −1.2."""
    return f"{100 * x:+.{digits}f}".replace("-", "−")


def p_value(p: float) -> str:
    """For a sentence: "p = 0.03"; very small ones as a bound."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def listed(items: list[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1] if items else ""]))


# ---------------------------------------------------------------- sentences


def summary(metrics: dict[str, dict], compared: dict) -> list[str]:
    """At most ten lines that follow from the numbers, the most important first."""
    pair = compared["pairs"][0] if compared["pairs"] else None  # of those named first
    names = [pair["first"], pair["second"]] if pair else list(metrics)[:2]
    rows = {name: metrics[name] for name in names}
    lines = [_accuracies(metrics, compared["about"])]
    if compared["recipes"]:
        lines.append(_seeds(compared["recipes"]))
    if pair:
        lines += [_better(pair, compared["recipes"]), _classes(pair), _shared(pair)]
    if compared["ensemble"]:
        lines.append(_ensemble(compared["ensemble"], len(metrics)))
    lines += [_confusions(metrics, compared["about"]["classes"]), _confidence(rows)]
    if all("robustness" in row for row in rows.values()):
        lines.append(_robustness(rows))
    return [*lines, _size(rows)]


def _accuracies(rows, about) -> str:
    parts = []
    for name, row in rows.items():
        low, high = map(percent, row["accuracy_interval"])
        parts.append(f"{name} {percent(row['accuracy'])} (95% CI {low} to {high})")
    which = {"val": "validation"}.get(about["split"], about["split"])
    return f"Accuracy on {about['images']:,} {which} images: {listed(parts)}."


def _seeds(recipes) -> str:
    parts = [
        f"{listed(group['checkpoints'])}: {percent(group['mean'], 2)} ± {percent(group['std'], 2)}"
        for group in recipes
    ]
    return f"Runs that differ in the seed alone, mean ± standard deviation: {'; '.join(parts)}."


def _better(pair, recipes) -> str:
    first, second, value = pair["first"], pair["second"], pair["difference"]
    low, high = pair["interval"]
    test = f"McNemar's test: {p_value(pair['mcnemar_p'])}"
    if pair["mcnemar_p"] >= 0.05 or low <= 0 <= high:
        return (
            f"The difference is not significant: {first} minus {second} is {signed(value)} "
            f"percentage points (95% CI {signed(low)} to {signed(high)}; {test})."
        )
    better, worse = (first, second) if value > 0 else (second, first)
    low, high = sorted(abs(x) for x in (low, high))
    seeded = [x for group in recipes for x in group["checkpoints"]]
    tell = "for that, see the means" if {first, second} <= {*seeded} else "train with several seeds"
    return (
        f"{better} is better than {worse} by {points(value)} percentage points (95% CI "
        f"{points(low)} to {points(high)}; {test}). The interval covers the choice of test images, "
        f"not the variation between seeds ({tell})."
    )


def _classes(pair) -> str:
    """Where the difference is largest, among classes that pass a test made for many classes."""
    rows = pair["per_class"]
    differ = holm({name: row["mcnemar_p"] for name, row in rows.items()})
    parts = []
    for model, sign in ((pair["first"], 1), (pair["second"], -1)):
        ahead = [name for name in differ if sign * rows[name]["difference"] > 0]
        ahead.sort(key=lambda name: (-abs(rows[name]["difference"]), name))
        where = [f"{name} (+{points(rows[name]['difference'])})" for name in ahead[:3]]
        where += [f"{len(ahead) - 3} more"] * (len(ahead) > 3)
        parts.append(f"{model} has significantly higher recall of {listed(where) or 'no class'}")
    if not differ:
        return "No class shows a significant difference (McNemar's test, Holm's correction, 5%)."
    listed_parts = "; ".join(parts)
    return f"By class, in percentage points: {listed_parts} (McNemar's test, Holm's correction)."


def _shared(pair) -> str:
    N = sum(pair["right"].values())
    both, first, second, neither = (percent(n / N) for n in pair["right"].values())
    return (
        f"Both are right on {both} of the images, {pair['first']} alone on {first}, "
        f"{pair['second']} alone on {second}, neither on {neither}. They predict the same class on "
        f"{percent(pair['agreement'])}."
    )


def _ensemble(ensemble, count) -> str:
    low, high = map(signed, ensemble["interval"])
    return (
        f"The mean of the {count} networks' probabilities has an accuracy of "
        f"{percent(ensemble['accuracy'])}: {signed(ensemble['difference'])} percentage points (95% "
        f"CI {low} to {high}) compared with the best of them on these images, {ensemble['best']}."
    )


def _confusions(rows, classes) -> str:
    parts = []
    for name, row in rows.items():
        if pairs := confused_pairs(row["confusion_matrix"], classes, most=None):
            most = sum(pairs[0]["images"])
            same = [x["classes"] for x in pairs if sum(x["images"]) == most]
            tie = f" (as often: {len(same) - 1} more)" if len(same) > 1 else ""
            parts.append(f"{name} confuses {listed(same[0])} most, in {most} images{tie}")
    return f"{'; '.join(parts)}." if parts else "There is no mistake."


def _confidence(rows) -> str:
    parts, sure = [], []
    for name, row in rows.items():
        gap = row["confidence"] - row["accuracy"]
        text = f"{name} {signed(gap)} percentage points (ECE {percent(row['ece'])}"
        if row["temperature"]:
            text += f"; {percent(row['temperature']['ece'])} with a fitted temperature"
        parts.append(text + ")")
        sure.append(f"{name} {percent(row['coverage']['80%'])}")
    return (
        f"Mean confidence minus accuracy: {listed(parts)}. Accuracy on the 80% most confident "
        f"predictions: {listed(sure)}."
    )


def _robustness(rows) -> str:
    parts, first = [], next(iter(rows.values()))["robustness"]
    for name, row in rows.items():
        found = row["robustness"]
        parts.append(
            f"{name} {percent(found['corruption_mean'])} (unchanged: {percent(found['clean'])})"
        )
    return (
        f"Accuracy on {first['images']:,} of the images, corrupted (mean of "
        f"{len(first['corruptions'])} kinds and five severities): {listed(parts)}."
    )


def _size(rows) -> str:
    parts = [
        f"{name} has {row['parameters']:,} parameters and {row['multiply_adds'] / 1e6:.0f} million "
        "multiply-adds per image"
        for name, row in rows.items()
    ]
    return f"{listed(parts)}."


# ---------------------------------------------------------------- text


def text_report(p: np.ndarray, labels: np.ndarray, classes: list[str]) -> str:
    """scikit-learn's report."""
    present = np.unique(labels).tolist()
    text = classification_report(
        labels, p.argmax(1), labels=present, target_names=[classes[i] for i in present],
        digits=4, zero_division=np.nan,
    )  # fmt: skip
    missing = [name for i, name in enumerate(classes) if i not in present]
    return text + (f"\nno images of {quoted(missing)}\n" if missing else "")


def describe(args, argv, data: Data, split: Split, trained_on: dict) -> dict:
    """Where the numbers come from. trained_on: the data set of the checkpoints."""
    packages = (torch, torchvision, np, scipy, sklearn)
    versions = {"python": platform.python_version()}
    versions |= {package.__name__: package.__version__ for package in packages}
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
    hardware += torch.backends.cpu.get_cpu_capability()
    if args.device != "cpu" and torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    return {
        "command": "python evaluate.py "
        + printable(shlex.join(sys.argv[1:] if argv is None else argv)),
        "data": data.name,
        "data_dir": printable(data_folder(args.data_dir, data.name, trained_on)),
        "split": args.split,
        "images": len(split),
        "classes": data.classes,
        "note": printable(data.note),
        "caveats": [printable(caveat) for caveat in data.caveats],
        "versions": versions,
        "hardware": hardware,
    }


def image_names(split: Split, rows) -> list[str]:
    """The files of the images at `rows` of a split, or their positions in it."""
    if split.files:
        return [printable(split.files[i]) for i in split.indices[rows].tolist()]
    return [str(i) for i in torch.arange(len(split))[rows].tolist()]


def predictions_csv(names: list[str], p: list[np.ndarray], split: Split, classes: list[str]) -> str:
    """A row per image: file or number, true class, each network's class and probability."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [[f"{name}: predicted", f"{name}: probability"] for name in names]
    writer.writerow(["image", "true", *itertools.chain(*columns)])
    images = image_names(split, slice(None))
    answers = [(x.argmax(1).tolist(), x.max(1).tolist()) for x in p]
    for i, (image, label) in enumerate(zip(images, split.labels[split.indices], strict=True)):
        found = [[classes[guess[i]], f"{surety[i]:.6f}"] for guess, surety in answers]
        writer.writerow([image, classes[label], *itertools.chain(*found)])
    return text.getvalue()


# ---------------------------------------------------------------- the page


def render(metrics: dict[str, dict], compared: dict, pictures: dict[str, bytes]) -> str:
    """The page, from metrics.json, comparison.json and PNG files by name. Names are escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "signed": signed, "listed": listed}
    classes = compared["about"]["classes"]
    pairs = {
        name: confused_pairs(row["confusion_matrix"], classes) for name, row in metrics.items()
    }
    return environment.get_template("report.html").render(
        metrics=metrics,
        compared=compared,
        about=compared["about"],
        summary=summary(metrics, compared),
        scores=METRICS,
        bins=BINS,
        pairs=pairs,
        few=len(classes) <= MAX_BARS,
        pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
    )
