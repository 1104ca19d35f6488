"""Evaluate and compare checkpoints: accuracy, report, confusion matrix.

    python evaluate.py runs/cifar10-cnn/best.pt
    python evaluate.py runs/cifar10-cnn/best.pt runs/cifar10-vit/best.pt

Prints a table; writes into --out-dir, and to TensorBoard from there:

    metrics.json               accuracy and F1, overall and per class, of each checkpoint
    classification_report.txt  scikit-learn's, a section per checkpoint
    confusion_matrix.png       counts, and shares of each true class, a panel per checkpoint
    learning_curves.png        by epoch and by training time
    comparison.json            with several checkpoints: accuracy, parameters, epochs, time
    class_examples.png, class_counts.png   what the data set holds
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import (
    accuracy_score,
    classification_report,
    confusion_matrix,
    precision_recall_fscore_support,
)
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from batches import Batches, evaluation_batch_size
from checkpoint import load_data_of, load_models
from cli import (
    Parser,
    add_data_flags,
    add_device_flag,
    choose_device,
    command,
    make_out_dir,
    path_type,
    run,
)
from data import Data, Split
from figures import short
from models import count_parameters


@torch.inference_mode()
def predict(model, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 (N, C) and labels (N,) over all `batches`, on the CPU; one forward each."""
    logits, labels = [], []
    for x, y in tqdm(batches, "predicting", leave=False, disable=None):
        logits.append(model(x).float().cpu())
        labels.append(y.cpu())
    return torch.cat(logits), torch.cat(labels)


def measure(logits: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> dict:
    """Metrics from logits (N, C) and labels (N,), all but the loss as scikit-learn computes them.

    `accuracy` is a fraction, `loss` the mean cross-entropy in nats; `confusion_matrix[i][j]` counts
    the images of class i that were taken for class j.
    """
    predictions, ids = logits.argmax(1), range(len(classes))

    def f1_of(average):  # precision, recall, F1, support
        return precision_recall_fscore_support(
            labels, predictions, labels=ids, average=average, zero_division=0
        )

    per_class = zip(*(column.tolist() for column in f1_of(None)), strict=True)
    keys = ("precision", "recall", "f1", "support")
    return {
        "accuracy": accuracy_score(labels, predictions),
        "macro_f1": f1_of("macro")[2],
        "weighted_f1": f1_of("weighted")[2],
        "loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "images": len(labels),
        "per_class": {
            name: dict(zip(keys, row, strict=True))
            for name, row in zip(classes, per_class, strict=True)
        },
        "confusion_matrix": confusion_matrix(labels, predictions, labels=ids).tolist(),
    }


# ---------------------------------------------------------------- figures


def tilted(names: list[str]) -> dict:
    """How to write names below an axis: long ones slanting."""
    if max(map(len, names)) <= 3:
        return {}
    return {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}


def plot_confusion(metrics: dict[str, dict], classes: list[str]) -> Figure:
    """A panel per model: each cell says how many images, and what share of its true class."""
    C = len(classes)
    side = max(4.0, 0.66 * C) if C <= 25 else 12.0
    figure = Figure(figsize=((side + 1.6) * len(metrics), side + 1.5), layout="compressed")
    for axes, (name, scores) in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics.items(), strict=True
    ):
        counts = np.array(scores["confusion_matrix"])
        shares = counts / counts.sum(1, keepdims=True).clip(1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        ticks = list(map(short, classes))
        axes.set_xticks(range(C), ticks, **tilted(ticks))
        axes.set_yticks(range(C), ticks)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(f"{name}: {scores['accuracy']:.2%} of {scores['images']:,} images correct")
        axes.set_xticks(np.arange(C - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(C - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="0.9", linewidth=0.8)
        axes.tick_params(which="minor", length=0)
        for i, j in np.argwhere(counts) if C <= 25 else ():
            color = "white" if shares[i, j] > 0.5 else "black"
            text = {"ha": "center", "color": color}
            axes.text(j, i - 0.04, f"{counts[i, j]}", va="bottom", fontsize=9, **text)
            axes.text(j, i + 0.06, f"{shares[i, j]:.1%}", va="top", fontsize=7, **text)
    return figure


def plot_curves(histories: dict[str, list[dict]]) -> Figure:
    """Accuracy and loss of trainings, by epoch and by training time; validation is solid."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    grid = figure.subplots(2, 2, sharey="row", sharex="col")
    for row, quantity in zip(grid, ("accuracy", "loss"), strict=True):
        for axes, unit in zip(row, ("epoch", "minutes of training"), strict=True):
            for color, (name, history) in enumerate(histories.items()):
                x = [r["epoch"] if unit == "epoch" else r["seconds"] / 60 for r in history]
                for part, style in (("val", "-"), ("train", "--")):
                    y = [r[f"{part}_{quantity}"] for r in history]
                    if None not in y:
                        label = f"{name}, {'validation' if part == 'val' else 'training'}"
                        marker = "o" if len(y) < 40 else None
                        axes.plot(
                            x, y, style, color=f"C{color}", label=label, marker=marker, markersize=3
                        )
            axes.grid(alpha=0.3)
            if quantity == "loss":
                axes.set_xlabel(unit)
        row[0].set_ylabel(quantity)
    grid[0, 0].yaxis.set_major_formatter("{x:.0%}")
    grid[1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0, 0].legend()
    return figure


def plot_examples(split: Split, classes: list[str]) -> Figure:
    """The first image of each class in a split."""
    columns = min(len(classes), 10)
    rows = -(-len(classes) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.8 * rows), layout="constrained")
    labels = split.labels[split.indices]
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for label, (axes, name) in enumerate(zip(panels, classes, strict=False)):
        where = (labels == label).nonzero()[:1, 0]
        if len(where):
            axes.imshow(split.rows(where)[0][0].permute(1, 2, 0).numpy(), interpolation="nearest")
        axes.set_title(short(name, 14), fontsize=11)
    return figure


def plot_counts(data: Data) -> Figure:
    """Images per class in each split."""
    figure = Figure(figsize=(max(6.0, 0.9 * len(data.classes)), 4), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(data.classes))
    for i, part in enumerate(("train", "val", "test")):
        split = getattr(data, part)
        if not len(split):
            continue
        counts = torch.bincount(split.labels[split.indices], minlength=len(data.classes)).numpy()
        bars = axes.bar(place + (i - 1) * 0.28, counts, 0.28, label=f"{part}: {len(split):,}")
        axes.bar_label(bars, fontsize=7, rotation=90 if len(data.classes) > 5 else 0, padding=2)
    ticks = list(map(short, data.classes))
    axes.set_xticks(place, ticks, **tilted(ticks))
    axes.set_ylabel("images")
    axes.margins(y=0.15)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.13), ncols=3, frameon=False)
    return figure


# ---------------------------------------------------------------- command line


def table(rows: list[list[str]]) -> str:
    """Rows of text as columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT",
                        help="files that train_cnn.py or train_vit.py wrote")  # fmt: skip
    add_data_flags(parser, remembered=True)
    parser.add_argument("--split", choices=("test", "val"), default="test", help="which images")
    parser.add_argument("--out-dir", type=path_type, default=Path("runs/evaluation"), metavar="DIR",
                        help="where the results go; earlier ones there are replaced")  # fmt: skip
    add_device_flag(parser)
    args = parser.parse_args(argv)

    device = choose_device(args.device)
    paths = list(dict.fromkeys(args.checkpoints))
    models = load_models(paths, device)
    checkpoints = {name: checkpoint for name, (_, checkpoint) in models.items()}
    data = load_data_of(checkpoints, args.dataset, args.data_dir, args.split)
    split = getattr(data, args.split)
    if not len(split):
        parser.error(
            "--split val: these checkpoints were trained without validation; use --split test"
        )
    make_out_dir(args.out_dir)
    print(
        f"{data.name}: {len(split):,} {args.split} images of {len(data.classes)} classes"
        + (f"; {data.note}" if data.note else "")
    )

    metrics, reports = {}, []
    for name, (model, checkpoint) in models.items():
        statistics = {"mean": checkpoint["mean"], "std": checkpoint["std"]}
        batches = Batches(split, evaluation_batch_size(split), **statistics, device=device)
        started = time.perf_counter()
        logits, labels = predict(model, batches)
        seconds = time.perf_counter() - started
        order = [checkpoint["classes"].index(c) for c in data.classes]  # classes match by name
        logits = logits[:, order]
        history = checkpoint["history"]
        metrics[name] = measure(logits, labels, data.classes) | {
            "model": checkpoint["model_name"],
            "parameters": count_parameters(model),
            "split": args.split,
            "epochs": len(history),
            "epoch": checkpoint["epoch"],
            "timing": {"training_seconds": history[-1]["seconds"], "evaluation_seconds": seconds},
        }
        report = classification_report(
            labels, logits.argmax(1), labels=range(len(data.classes)), target_names=data.classes,
            digits=4, zero_division=0,
        )  # fmt: skip
        reports.append(f"{name}\n\n{report}")

    rows = [["", "accuracy", "macro F1", "weighted F1", "parameters", "epochs", "training"]]
    for name, m in metrics.items():
        minutes = m["timing"]["training_seconds"] / 60
        rows.append(
            [name, f"{m['accuracy']:.2%}", f"{m['macro_f1']:.4f}", f"{m['weighted_f1']:.4f}",
             f"{m['parameters']:,}", f"{m['epochs']}", f"{minutes:.1f} min"]
        )  # fmt: skip
    print(table(rows))

    figures = {
        "confusion_matrix": plot_confusion(metrics, data.classes),
        "learning_curves": plot_curves({n: c["history"] for n, c in checkpoints.items()}),
        "class_examples": plot_examples(split, data.classes),
        "class_counts": plot_counts(data),
    }
    written = {
        "metrics.json": json.dumps(dict(zip(paths, metrics.values(), strict=True)), indent=2),
        "classification_report.txt": "\n\n".join(reports),
    }
    if len(metrics) > 1:
        keys = ("model", "accuracy", "macro_f1", "weighted_f1", "parameters", "epochs", "timing")
        comparison = [
            {"checkpoint": path, **{key: m[key] for key in keys}}
            for path, m in zip(paths, metrics.values(), strict=True)
        ]
        written["comparison.json"] = json.dumps(comparison, indent=2)
    for old in [args.out_dir / "comparison.json", *args.out_dir.glob("events.out.*.evaluation")]:
        old.unlink(missing_ok=True)
    for name, text in written.items():
        (args.out_dir / name).write_text(text + "\n", encoding="utf-8")
    with SummaryWriter(args.out_dir, filename_suffix=".evaluation") as log:
        for name, figure in figures.items():
            figure.savefig(args.out_dir / f"{name}.png", dpi=120)
            log.add_figure(f"evaluation/{name}", figure)
        for name, m in metrics.items():
            for key in ("accuracy", "macro_f1", "weighted_f1"):
                log.add_scalar(f"{args.split} {key}/{name}", m[key], m["epoch"])
        log.add_text("classification report", "\n\n".join(f"```\n{r}\n```" for r in reports))
    print(f"written to {args.out_dir}: {', '.join([*written, *(f'{f}.png' for f in figures)])}")


if __name__ == "__main__":
    run(main)
