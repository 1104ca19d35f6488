"""What the numbers of an evaluation say, in words: report.html, and two files of text.

    N images   C classes   p (N, C) probabilities   labels (N,)

The template of the report is also called `report.html`. It gets metrics.json, comparison.json and
the figures, nothing else.
"""

import base64
import csv
import io
import itertools
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image
from sklearn.metrics import classification_report

from cli import printable, quoted
from data import Split
from metrics import BINS, METRICS, confused_pairs

MOST_BYTES = 2_100_000  # of pictures; in base64 these are 2.8 MB


def percent(x: float, digits: int = 1) -> str:
    """A fraction as 12.3%."""
    return f"{x:.{digits}%}"


def points(x: float) -> str:
    """A difference of two fractions, in points without a sign, as 1.2."""
    return f"{100 * abs(x):.1f}"


def p_value(p: float) -> str:
    """For a sentence: "p = 0.03"; very small ones as a bound."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def listed(items: list[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join(filter(None, [", ".join(items[:-1]), items[-1] if items else ""]))


# ---------------------------------------------------------------- sentences


def summary(metrics: dict[str, dict], compared: dict) -> list[str]:
    """At most ten sentences that follow from the numbers, the most important first."""
    ranked = sorted(metrics, key=lambda name: -metrics[name]["accuracy"])
    pair = min(
        compared["pairs"],
        key=lambda pair: ranked.index(pair["first"]) + ranked.index(pair["second"]),
        default=None,
    )
    names = [x for x in ranked if not pair or x in (pair["first"], pair["second"])][:2]
    lines = [_accuracies(metrics, names, compared["about"])]
    lines += [
        f"{listed(group['checkpoints'])} are trainings of one recipe: "
        f"{percent(group['mean'], 2)} ± {percent(group['std'], 2)} (mean and standard deviation)."
        for group in compared["recipes"][:2]
    ]
    if pair:
        lines += [*_better(pair), _classes(pair), _shared(pair)]
    if compared["ensemble"]:
        lines.append(_ensemble(compared["ensemble"], metrics))
    lines += [_confusions(metrics, names, compared["about"]["classes"])]
    lines += [_confidence(metrics, names), _coverage(metrics, names)]
    if all("robustness" in metrics[name] for name in names):
        lines.append(_robustness(metrics, names))
    lines.append(_size(metrics, names))
    return [line for line in lines if line][:10]


def _accuracies(metrics, names, about) -> str:
    parts = [
        f"{name} gets {percent(metrics[name]['accuracy'])} right (95%: "
        f"{percent(metrics[name]['accuracy_interval'][0])} to "
        f"{percent(metrics[name]['accuracy_interval'][1])})"
        for name in names
    ]
    return f"Of {about['images']:,} {about['split']} images {listed(parts)}."


def _better(pair) -> list[str]:
    first, second, value = pair["first"], pair["second"], pair["difference"]
    low, high = sorted(abs(x) for x in pair["interval"])
    if pair["mcnemar_p"] >= 0.05 or pair["interval"][0] <= 0 <= pair["interval"][1]:
        ends = " to ".join(f"{100 * x:+.1f}" for x in pair["interval"]).replace("-", "−")
        return [
            f"No difference is shown: {first} less {second} is {100 * value:+.1f} points "
            f"(95%: {ends}; McNemar's test: {p_value(pair['mcnemar_p'])}).".replace("-", "−")
        ]
    better, worse = (first, second) if value > 0 else (second, first)
    return [
        f"{better} is better than {worse} by {points(value)} points (95%: {points(low)} to "
        f"{points(high)}; McNemar's test: {p_value(pair['mcnemar_p'])}).",
        "So these two checkpoints differ by more than luck in the choice of images. Whether their "
        "recipes do, only trainings with several seeds can tell.",
    ]


def _classes(pair) -> str:
    """Where the difference is largest, among classes whose interval leaves out 0."""
    rows = {
        name: row["difference"]
        for name, row in pair["per_class"].items()
        if row["interval"][0] > 0 or row["interval"][1] < 0
    }
    parts = []
    for model, sign in ((pair["first"], 1), (pair["second"], -1)):
        ahead = sorted(
            (name for name in rows if sign * rows[name] > 0), key=lambda n: -sign * rows[n]
        )
        if ahead:
            where = listed([f"{name} ({points(rows[name])} points)" for name in ahead[:3]])
            parts.append(f"{model} is ahead most on {where}")
    if not parts:
        return "No single class shows a difference."
    return f"By class, {'; '.join(parts)}." + (
        "" if len(parts) == 2 else " The other is ahead on no class beyond its interval."
    )


def _shared(pair) -> str:
    N = sum(pair["right"].values())
    both, first, second, neither = (percent(n / N) for n in pair["right"].values())
    return (
        f"Both are right on {both} of the images, {pair['first']} alone on {first}, "
        f"{pair['second']} alone on {second}, none on {neither}. They give the same answer on "
        f"{percent(pair['agreement'])}."
    )


def _ensemble(ensemble, metrics) -> str:
    low, high = (f"{100 * x:+.1f}".replace("-", "−") for x in ensemble["interval"])
    change = f"{100 * ensemble['difference']:+.1f}".replace("-", "−")
    return (
        f"The mean of the {len(metrics)} networks' probabilities gets "
        f"{percent(ensemble['accuracy'])} right, {change} points (95%: {low} to {high}) from "
        f"{ensemble['best']} alone."
    )


def _confusions(metrics, names, classes) -> str:
    parts = []
    for name in names:
        if pairs := confused_pairs(metrics[name]["confusion_matrix"], classes, 1):
            one, two = pairs[0]["classes"]
            parts.append(f"{name} confuses {one} and {two} most ({sum(pairs[0]['images'])} images)")
    return f"{'; '.join(parts)}." if parts else "There is no mistake."


def _confidence(metrics, names) -> str:
    parts = []
    for name in names:
        row = metrics[name]
        mean = sum(b["images"] * b["confidence"] for b in row["reliability"] if b["images"])
        gap = mean / row["images"] - row["accuracy"]
        how = "too sure" if gap > 0 else "not sure enough"
        text = f"{name} is {how} by {points(gap)} points on average (ECE {percent(row['ece'])}"
        if row["temperature"]:
            text += f"; {percent(row['temperature']['ece'])} with a fitted temperature"
        parts.append(text + ")")
    return f"Confidence: {listed(parts)}."


def _coverage(metrics, names) -> str:
    parts = [f"{name} {percent(metrics[name]['coverage']['80%'])}" for name in names]
    return f"Of the 80% of images with the highest confidence, right are: {listed(parts)}."


def _robustness(metrics, names) -> str:
    parts = [
        f"{name} falls from {percent(metrics[name]['robustness']['clean'])} to "
        f"{percent(metrics[name]['robustness']['corruption_mean'])}"
        for name in names
    ]
    return f"On corrupted images (mean of six kinds and five severities) {listed(parts)}."


def _size(metrics, names) -> str:
    parts = [
        f"{name} has {metrics[name]['parameters']:,} parameters and "
        f"{metrics[name]['multiply_adds'] / 1e6:.0f} million multiply-adds per image"
        for name in names
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


def predictions_csv(names: list[str], p: list[np.ndarray], split: Split, classes: list[str]) -> str:
    """A row per image: file or position, true class, each network's class and probability."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [[f"{name}: predicted", f"{name}: probability"] for name in names]
    writer.writerow(["image", "true", *itertools.chain(*columns)])
    images = [split.files[i] for i in split.indices] if split.files else range(len(split))
    answers = [(x.argmax(1).tolist(), x.max(1).tolist()) for x in p]
    for i, (image, label) in enumerate(zip(images, split.labels[split.indices], strict=True)):
        found = [[classes[guess[i]], f"{surety[i]:.6f}"] for guess, surety in answers]
        writer.writerow([printable(image), classes[label], *itertools.chain(*found)])
    return text.getvalue()


# ---------------------------------------------------------------- the page


def with_few_colors(png: bytes) -> bytes:
    """The picture in 256 colours, about a third of the size."""
    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(file, "PNG", optimize=True)
    return file.getvalue()


def render(metrics: dict[str, dict], compared: dict, pictures: dict[str, bytes]) -> str:
    """The page. Names from disk are escaped.

    Args:
        metrics: what metrics.json holds, by the checkpoints' names.
        compared: what comparison.json holds.
        pictures: PNG files by name.
    """
    if sum(map(len, pictures.values())) > MOST_BYTES:
        pictures = {name: with_few_colors(png) for name, png in pictures.items()}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "points": points, "p_value": p_value}
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
        pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
    )
