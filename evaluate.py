"""Evaluate and compare checkpoints: accuracy, report, confusion matrix.

    python evaluate.py runs/cifar10-cnn/best.pt
    python evaluate.py runs/cifar10-cnn/best.pt runs/cifar10-vit/best.pt

Prints a table; writes into --out-dir, and to TensorBoard from there:

    metrics.json               accuracy and F1, overall and per class, of each checkpoint
    classification_report.txt  scikit-learn's, a section per checkpoint
    confusion_matrix.png       counts and fractions of each true class, a panel per checkpoint
    learning_curves.png        by epoch and by training time
    comparison.json            with several checkpoints: accuracy, parameters, epochs, time
    class_examples.png, class_counts.png   what is in the data set
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap
from sklearn.metrics import (
    accuracy_score,
    classification_report,
    confusion_matrix,
    precision_recall_fscore_support,
)
from torch.utils.tensorboard import SummaryWriter

from cli import (
    Parser,
    add_data_flags,
    add_device_flags,
    command,
    make_out_dir,
    name_type,
    path_type,
    printable,
    quoted,
    run,
    use_device,
    writing,
)
from figures import (
    MOST_CURVES,
    MOST_MATRICES,
    plot_confusion,
    plot_counts,
    plot_curves,
    plot_examples,
    with_plain_text,
)
from logs import markdown
from models import count_parameters
from prepare import TrainedModel, load_data_for, load_models


def measure(logits: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> dict:
    """Metrics from logits (N, C) and labels (N,), all but the loss as scikit-learn computes them.

    `accuracy` is a fraction, `loss` the mean cross-entropy in nats. `confusion_matrix[i][j]` counts
    the images of class i that were predicted as class j. Averages are over the classes that have
    images; what is undefined for a class, as the recall without images, is None.
    """
    predictions, ids = logits.argmax(1), range(len(classes))

    def f1_of(average, ids):  # precision, recall, F1, support
        return precision_recall_fscore_support(
            labels, predictions, labels=ids, average=average, zero_division=np.nan
        )

    present, keys = labels.unique().tolist(), ("precision", "recall", "f1", "support")
    per_class = {}
    for name, *row in zip(classes, *(column.tolist() for column in f1_of(None, ids)), strict=True):
        scores = {key: None if np.isnan(x) else x for key, x in zip(keys, row, strict=True)}
        per_class[name] = scores if scores["support"] else scores | {"f1": None}
    return {
        "accuracy": accuracy_score(labels, predictions),
        "macro_f1": f1_of("macro", present)[2],
        "weighted_f1": f1_of("weighted", present)[2],
        "loss": torch.nn.functional.cross_entropy(logits, labels).item(),
        "images": len(labels),
        "per_class": per_class,
        "confusion_matrix": confusion_matrix(labels, predictions, labels=ids).tolist(),
    }


def evaluate(model: TrainedModel, split, classes: list[str]) -> tuple[dict, str]:
    """Metrics of one model on a split, and scikit-learn's report as text."""
    started = time.perf_counter()
    logits = model.logits(split, classes)
    seconds = time.perf_counter() - started
    labels, history = split.labels[split.indices].cpu(), model.checkpoint["history"]
    metrics = measure(logits, labels, classes) | {
        "model": model.checkpoint["model_name"],
        "parameters": count_parameters(model.network),
        "epochs": len(history),
        "epoch": model.checkpoint["epoch"],
        "step": model.checkpoint["step"],
        "timing": {"training_seconds": history[-1]["seconds"], "evaluation_seconds": seconds},
    }
    present = labels.unique().tolist()
    report = classification_report(
        labels, logits.argmax(1), labels=present, target_names=[classes[i] for i in present],
        digits=4, zero_division=np.nan,
    )  # fmt: skip
    missing = [name for i, name in enumerate(classes) if i not in present]
    return metrics, report + (f"\nno images of {quoted(missing)}\n" if missing else "")


def interval(values: torch.Tensor) -> tuple[float, float, float]:
    """Mean of (n,), and the ends of its 95% bootstrap interval over images."""
    x = values.double().numpy()
    if x.min() == x.max():
        return (x[0].item(),) * 3
    found = bootstrap((x,), np.mean, method="percentile", n_resamples=2000, random_state=0)
    return (x.mean().item(), *map(float, found.confidence_interval))


# ---------------------------------------------------------------- command line


def table(rows: list[list[str]]) -> str:
    """Rows of text as columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def print_table(metrics: dict[str, dict]) -> None:
    """A row per model."""
    rows = [["", "accuracy", "macro F1", "weighted F1", "parameters", "epochs", "training"]]
    for name, m in metrics.items():
        minutes = m["timing"]["training_seconds"] / 60
        rows.append([
            name, f"{m['accuracy']:.2%}", f"{m['macro_f1']:.4f}", f"{m['weighted_f1']:.4f}",
            f"{m['parameters']:,}", f"{m['epochs']}", f"{minutes:.1f} min",
        ])  # fmt: skip
    print(table(rows))


def write_files(out_dir: Path, paths: list[str], metrics: list[dict], reports: str) -> list[str]:
    """Write the text files; return their names. An old comparison is removed."""
    files = {
        "metrics.json": json.dumps(dict(zip(paths, metrics, strict=True)), indent=2),
        "classification_report.txt": reports,
    }
    if len(metrics) > 1:
        keys = ("model", "accuracy", "macro_f1", "weighted_f1", "parameters", "epochs", "timing")
        comparison = [
            {"checkpoint": path, **{key: m[key] for key in keys}}
            for path, m in zip(paths, metrics, strict=True)
        ]
        files["comparison.json"] = json.dumps(comparison, indent=2)
    with writing(out_dir / "comparison.json"):
        (out_dir / "comparison.json").unlink(missing_ok=True)
    for name, text in files.items():
        with writing(out_dir / name):
            (out_dir / name).write_text(text + "\n", encoding="utf-8")
    return list(files)


def write_figures(out_dir: Path, figures: dict, metrics: dict[str, dict], reports: list) -> None:
    """Write PNGs, and the same figures and numbers for TensorBoard."""
    for name, figure in figures.items():
        with writing(out_dir / f"{name}.png"):
            figure.savefig(out_dir / f"{name}.png", dpi=120)
    with writing(out_dir):
        for old in out_dir.glob("events.out.*.evaluation"):
            old.unlink()
        log = SummaryWriter(out_dir, filename_suffix=".evaluation")
        step = max(m["step"] for m in metrics.values())
        for name, figure in figures.items():
            log.add_figure(f"evaluation/{name}", figure, step)
        keys = ("split", "accuracy", "macro_f1", "weighted_f1", "parameters", "step")
        rows = [(printable(name), *(m[key] for key in keys)) for name, m in metrics.items()]
        log.add_text("evaluation/scores", markdown(["checkpoint", *keys], rows), step)
        blocks = [f"```\n{report.replace('```', '')}\n```" for report in reports]
        log.add_text("evaluation/classification report", "\n\n".join(blocks), step)
        log.close()


@command
@with_plain_text
def main(argv=None):
    # 1. Check.
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=name_type, metavar="CHECKPOINT",
                        help="files that train_cnn.py or train_vit.py wrote")  # fmt: skip
    add_data_flags(parser, from_checkpoint=True)
    parser.add_argument("--split", choices=("test", "val"), default="test", help="which images")
    parser.add_argument("--out-dir", type=path_type, default=Path("runs/evaluation"), metavar="DIR",
                        help="for the results; earlier ones are replaced")  # fmt: skip
    add_device_flags(parser)
    args = parser.parse_args(argv)
    models = load_models(args.checkpoints, use_device(args))
    dataset = args.dataset or models[0].checkpoint["dataset"]["name"]
    make_out_dir(args.out_dir, args.data_dir if dataset == "folder" else None)

    # 2. Gather.
    data = load_data_for(models, args.dataset, args.data_dir, args.split)
    split = getattr(data, args.split)
    if not len(split):
        parser.error(
            f"--split {args.split}: there are no such images (with --val-fraction 0 there is no "
            "validation); use the other split"
        )
    print(
        f"{data.name}: {len(split):,} {args.split} images of {len(data.classes)} classes"
        + (f"; {data.note}" if data.note else "")
    )

    # 3. Compute.
    metrics, reports = {}, []
    for model in models:
        metrics[model.name], report = evaluate(model, split, data.classes)
        metrics[model.name]["split"] = args.split
        reports.append(f"{model.name}\n\n{report}")

    # 4. Draw.
    for figure, most in (("confusion_matrix", MOST_MATRICES), ("learning_curves", MOST_CURVES)):
        if len(models) > most:
            print(f"{figure}.png shows the first {most} of {len(models)} checkpoints")
    figures = {
        "confusion_matrix": plot_confusion(metrics, data.classes),
        "learning_curves": plot_curves({m.name: m.checkpoint["history"] for m in models}),
        "class_examples": plot_examples(split, data.classes),
        "class_counts": plot_counts(data),
    }

    # 5. Write.
    paths = [model.path for model in models]
    files = write_files(args.out_dir, paths, list(metrics.values()), "\n\n".join(reports))
    print_table(metrics)
    write_figures(args.out_dir, figures, metrics, reports)
    print(f"written to {args.out_dir}: {', '.join([*files, *(f'{f}.png' for f in figures)])}")


if __name__ == "__main__":
    run(main)
