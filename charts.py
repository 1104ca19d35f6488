"""Figures of an evaluation: confusion matrices, curves, confidence, differences, robustness, data.

C classes. A checkpoint has the same colour in all figures.
"""

import io
import itertools

import numpy as np
import torch

from data import Data, Split
from figures import MAX_BARS, MAX_NAMES, Figure, MaxNLocator, PercentFormatter, name_axis, shorten

MAX_EXAMPLES = 50  # classes with an image
MAX_MATRICES, MAX_CURVES = 6, 10  # checkpoints; matplotlib has ten colours
MIN_IMAGES = 10  # images that a point of the reliability diagram stands for


def as_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120 if figure.get_figwidth() < 14 else 90)
    return buffer.getvalue()


def plot_confusion(metrics: dict[str, dict], classes: list[str]) -> Figure:
    """A panel per model; a cell has the number of images and their fraction of the true class."""
    metrics = dict(itertools.islice(metrics.items(), MAX_MATRICES))
    C, few = len(classes), len(classes) <= MAX_BARS
    side = max(4.0, 0.66 * C) if few else 12.0 if len(metrics) == 1 else 8.0
    columns = min(len(metrics), 3)
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=((side + 1.6) * columns, (side + 1.6) * rows), layout="compressed")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    names = shorten(list(metrics), int(7 * side))
    for axes, name, scores in zip(panels, names, metrics.values(), strict=False):
        counts = np.array(scores["confusion_matrix"])
        shares = counts / counts.sum(1, keepdims=True).clip(1)
        drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        name_axis(axes.xaxis, classes, tilt=True)
        name_axis(axes.yaxis, classes, ["" if n else " (no images)" for n in counts.sum(1)])
        correct = f"{scores['accuracy']:.2%} of {scores['images']:,} images correct"
        axes.set(xlabel="predicted", ylabel="true", title=f"{name}\n{correct}")
        if len(classes) <= MAX_NAMES:
            axes.set_xticks(np.arange(C - 1) + 0.5, minor=True)
            axes.set_yticks(np.arange(C - 1) + 0.5, minor=True)
            axes.grid(which="minor", color="0.9", linewidth=0.8)
            axes.tick_params(which="minor", length=0)
        for i, j in np.argwhere(counts) if few else ():
            color = "white" if shares[i, j] > 0.5 else "black"
            text = {"ha": "center", "color": color}
            axes.text(j, i - 0.04, f"{counts[i, j]}", va="bottom", fontsize=9, **text)
            axes.text(j, i + 0.06, f"{shares[i, j]:.1%}", va="top", fontsize=7, **text)
        if not few:
            figure.colorbar(drawn, ax=axes, shrink=0.8, label="fraction of the true class")
    return figure


def plot_curves(histories: dict[str, list[dict]], best: dict[str, int]) -> Figure:
    """Accuracy and loss of training runs, by epoch and by training time; validation is solid.

    best: the epoch of each run that was best on validation, which is marked.
    """
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.subplots(2, 2, sharey="row", sharex="col")
    histories = dict(itertools.islice(histories.items(), MAX_CURVES))
    names = shorten(list(histories), 40)
    for row, quantity in zip(grid, ("accuracy", "loss"), strict=True):
        for axes, unit in zip(row, ("epoch", "minutes of training"), strict=True):
            for color, (key, history) in enumerate(histories.items()):
                x = [r["epoch"] if unit == "epoch" else r["seconds"] / 60 for r in history]
                for part, style in (("val", "-"), ("train", "--")):
                    y = [r[f"{part}_{quantity}"] for r in history]
                    if None in y:
                        continue
                    # The name is last: matplotlib leaves out a label that begins with _.
                    label = f"{'validation' if part == 'val' else 'training'}, {names[color]}"
                    axes.plot(x, y, style, color=f"C{color}", label=label)
                    epochs = [r["epoch"] for r in history]
                    if part == "val" and best[key] in epochs:
                        i = epochs.index(best[key])
                        axes.plot(x[i], y[i], "*", color=f"C{color}", markersize=12)
            axes.grid(alpha=0.3)
            axes.set_title(f"{quantity} by {unit}")
            if quantity == "loss":
                axes.set_xlabel(unit)
        row[0].set_ylabel(quantity)
    grid[0, 0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    grid[1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle("Training; a star is the epoch that was best on validation")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def plot_confidence(metrics: dict[str, dict]) -> Figure:
    """Accuracy by confidence, beside accuracy by the fraction of images that are answered."""
    metrics = dict(itertools.islice(metrics.items(), MAX_CURVES))
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    panels = figure.subplot_mosaic([["up", "right"], ["down", "right"]], height_ratios=(3, 1))
    calibration, counts, coverage = panels["up"], panels["down"], panels["right"]
    names = shorten(list(metrics), 40)
    calibration.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="confidence = accuracy")
    for color, (name, scores) in enumerate(zip(names, metrics.values(), strict=True)):
        bins, look = scores["reliability"], {"color": f"C{color}"}
        drawn = [bin for bin in bins if bin["images"] >= MIN_IMAGES]
        x, y = ([bin[key] for bin in drawn] for key in ("confidence", "accuracy"))
        label = f"ECE {scores['ece']:.1%}, {name}"
        calibration.plot(x, y, "o-", markersize=4, clip_on=False, label=label, **look)
        edges = [*(bin["low"] for bin in bins), 1]
        counts.stairs([bin["images"] / scores["images"] for bin in bins], edges, **look)
        x = [int(share[:-1]) / 100 for share in scores["coverage"]]
        coverage.plot(x, list(scores["coverage"].values()), label=name, **look)
    title = f"Reliability (bins with {MIN_IMAGES} images or more)"
    calibration.set(ylim=(0, 1), ylabel="accuracy", title=title)
    counts.set(xlabel="confidence (probability of the predicted class)", ylabel="images")
    coverage.set_title("Accuracy on the most confident images")
    coverage.set(xlabel="fraction of images, the most confident first", ylabel="accuracy")
    coverage.set_ylim(top=1 + 0.03 * (1 - coverage.get_ylim()[0]))
    for axes in (calibration, counts, coverage):
        axes.set_xlim(0, 1)
        axes.grid(alpha=0.3)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=None if axes is coverage else 0))
    figure.legend(*calibration.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def plot_difference(pair: dict, names: list[str], classes: list[str]) -> Figure:
    """By how much the first is better per class, and where its confusion matrix has more.

    pair: of comparison.json; names: of all checkpoints, for the colours. Of many classes, those
    that differ most.
    """
    few = len(classes) <= MAX_BARS
    rows = sorted(pair["per_class"].items(), key=lambda row: -abs(row[1]["difference"]))
    chosen = {name for name, _ in rows[:MAX_BARS]}
    rows = [(name, row) for name, row in pair["per_class"].items() if name in chosen]
    figure = Figure(
        figsize=(13 if few else 7, max(3.6, 0.42 * len(rows) + 2)), layout="constrained"
    )
    panels = figure.subplots(1, 1 + few, squeeze=False)[0]
    axes, y = panels[0], np.arange(len(rows))
    value = np.array([row["difference"] for _, row in rows])
    ends = np.array([row["interval"] for _, row in rows])
    both = [names.index(pair[key]) for key in ("first", "second")]
    colors = [f"C{both[int(x < 0)] % 10}" for x in value]
    axes.barh(y, value, color=colors, alpha=0.6)
    axes.hlines(y, *ends.T, color="0.25")
    axes.axvline(0, color="0.25", linewidth=1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.invert_yaxis()
    name_axis(axes.yaxis, [name for name, _ in rows])
    short = shorten([pair["first"], pair["second"]], 24)
    axes.set_xlabel(f"{short[0]} minus {short[1]}")
    which = "" if len(rows) == len(pair["per_class"]) else f", the {len(rows)} that differ most"
    axes.set_title(f"Accuracy by true class{which}\n(lines: 95% intervals)")
    axes.grid(alpha=0.3, axis="x")
    if few:
        counts = np.array(pair["confusion_difference"])
        most = max(1, abs(counts).max())
        panels[1].imshow(counts, cmap="RdBu", vmin=-most, vmax=most)
        for i, j in np.argwhere(counts):
            look = {"fontsize": 8, "color": "white" if abs(counts[i, j]) > 0.6 * most else "black"}
            text = f"{counts[i, j]:+d}".replace("-", "−")
            panels[1].text(j, i, text, ha="center", va="center", **look)
        name_axis(panels[1].xaxis, classes, tilt=True)
        name_axis(panels[1].yaxis, classes)
        title = f"Images: {short[0]} minus {short[1]}\n(on the diagonal they are right)"
        panels[1].set(xlabel="predicted", ylabel="true", title=title)
    return figure


def plot_robustness(metrics: dict[str, dict]) -> Figure:
    """Accuracy on corrupted and shifted images, a panel for each kind."""
    metrics = dict(itertools.islice(metrics.items(), MAX_CURVES))
    first = next(iter(metrics.values()))["robustness"]
    kinds = [*first["corruptions"], "shift"]
    columns = 4
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(11, 2.7 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    names = shorten(list(metrics), 40)
    for axes, kind in zip(panels, kinds, strict=False):
        for color, (name, scores) in enumerate(zip(names, metrics.values(), strict=True)):
            found = scores["robustness"]
            changed = found["corruptions"].get(kind, found["shifts"][1:])
            y = [found["clean"], *changed]
            look = {"color": f"C{color}", "label": f"accuracy, {name}"}
            axes.plot(range(len(y)), y, "o-", markersize=3, **look)
        axes.set(title=kind, xlabel="pixels" if kind == "shift" else "severity")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, 1)
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    figure.suptitle(f"Accuracy on {first['images']:,} images, corrupted or shifted")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def plot_examples(split: Split, classes: list[str]) -> Figure:
    """The first image of each class in a split, of the first classes if there are many."""
    drawn = shorten(classes, 14)[:MAX_EXAMPLES]
    columns = min(len(drawn), 10)
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.8 * rows + 0.3), layout="constrained")
    if len(drawn) < len(classes):
        figure.suptitle(f"the first {len(drawn)} of {len(classes)} classes")
    labels = split.labels[split.indices]
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for label, (axes, name) in enumerate(zip(panels, drawn, strict=False)):
        where = (labels == label).nonzero()[:1, 0]
        if len(where):
            axes.imshow(split.rows(where)[0][0].permute(1, 2, 0).numpy(), interpolation="nearest")
        else:
            axes.text(0.5, 0.5, "no images", ha="center", va="center")
        axes.set_title(name)
    return figure


def plot_counts(data: Data) -> Figure:
    """Images per class in each split."""
    C = len(data.classes)
    figure = Figure(figsize=(min(max(6.0, 0.9 * C), 22.5), 4), layout="constrained")
    axes, x = figure.subplots(), np.arange(C)
    parts = [part for part in ("train", "val", "test") if len(getattr(data, part))]
    for i, part in enumerate(parts):
        split = getattr(data, part)
        counts = torch.bincount(split.labels[split.indices], minlength=C).numpy()
        label = f"{part}: {len(split):,}"
        if len(data.classes) > MAX_BARS:
            axes.plot(x, counts, ".", markersize=4, label=label)
        else:
            bars = axes.bar(x + (i - (len(parts) - 1) / 2) * 0.28, counts, 0.28, label=label)
            axes.bar_label(bars, fontsize=7, rotation=90 if C > 5 else 0, padding=2)
    name_axis(axes.xaxis, data.classes, tilt=True)
    axes.set_ylabel("images")
    axes.margins(x=0.5 / C, y=0.15)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=3)
    return figure
