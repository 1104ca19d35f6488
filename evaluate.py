"""Evaluate and compare checkpoints: accuracy, calibration, tests, mistakes, and a report.

    python evaluate.py runs/cifar10-cnn/best.pt
    python evaluate.py runs/cifar10-cnn/best.pt runs/cifar10-vit/best.pt --robustness

Prints a table and conclusions; writes into --out-dir:

    report.html                all of it in one file, which opens anywhere
    metrics.json               the numbers of each checkpoint
    comparison.json            the numbers of each pair; command, data, versions
    predictions.csv            one row per image
    classification_report.txt  scikit-learn's, a section per checkpoint
    *.png                      the figures of the report
"""

import hashlib
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

import charts
import cli
import report
from batches import CORRUPTIONS, corrupt, shifted
from checkpoint import formula_image
from data import Data, Split
from examples import draw_explained
from figures import in_our_style
from metrics import METRICS, choose_mistakes, compare_all, fit_temperature, measure, probabilities
from models import count_multiply_adds, count_parameters
from prepare import (
    TrainedModel,
    expand_patterns,
    load_data_for,
    load_models,
    same_images,
    trained_before,
)
from settings import OF_THE_RUN

MAX_DRAWN = 3  # pairs of checkpoints, and checkpoints with their mistakes, in figures


# ---------------------------------------------------------------- numbers


def evaluate(model: TrainedModel, split: Split, val: Split | None, classes: list[str]):
    """Metrics of one model on a split, and its logits, NumPy (N, C).

    `val`: validation images to fit the temperature on, or None.

    Raises UserError: a logit is not finite.
    """
    model.logits(split.subset(torch.arange(min(32, len(split)))), classes)  # the first is slow
    started = time.perf_counter()
    logits = model.logits(split, classes).numpy()
    seconds = time.perf_counter() - started
    labels, history = split.labels[split.indices].cpu().numpy(), model.checkpoint["history"]
    temperature = T = None
    try:
        metrics = measure(logits, labels, classes)
        if val is not None:
            val_logits = model.logits(val, classes).numpy()
            T = fit_temperature(val_logits, val.labels[val.indices].numpy())
    except cli.UserError as error:
        raise cli.UserError(f"{model.path}: {error}") from None
    if T is not None:
        p = probabilities(logits / T)
        scores = {name: float(METRICS[name].compute(p, labels)) for name in ("log_loss", "ece")}
        temperature = {"temperature": T, **scores}
    image = formula_image(model.checkpoint["dataset"]["image_size"])
    device = next(model.network.parameters()).device
    return {"name": model.name} | metrics | {
        "temperature": temperature,
        "model": model.checkpoint["model_name"],
        "seed": model.checkpoint["settings"].get("seed"),
        "parameters": count_parameters(model.network),
        "multiply_adds": count_multiply_adds(model.network, image.to(device)),
        "bytes": Path(model.path).stat().st_size,
        "sha256": hashlib.sha256(Path(model.path).read_bytes()).hexdigest(),
        "epochs": len(history),
        "epoch": model.checkpoint["epoch"],
        "step": model.checkpoint["step"],
        "timing": {
            "training_seconds": history[-1]["seconds"],
            "evaluation_seconds": seconds,
            "images_per_second": len(labels) / seconds,
        },
    }, logits


def measure_robustness(model: TrainedModel, split: Split, classes: list[str]) -> dict:
    """Accuracy on corrupted and shifted images, and of the mean of an image and its mirror."""
    device, N = next(model.network.parameters()).device, len(split)
    total = 1 + 5 * len(CORRUPTIONS) + 1 + 4 * 4
    bar = tqdm(total=total, desc=f"robustness, {model.name}", leave=False, disable=None)

    def accuracy(versions) -> float:
        """Of the mean probabilities over what `versions` makes of images uint8 (B, 3, S, S)."""
        right = 0
        for part in torch.arange(N).split(500):
            images, labels = split.rows(part)
            changed = [Split.of(x, labels) for x in versions(images.to(device))]
            p = sum(model.logits(x, classes).softmax(1) for x in changed)
            right += (p.argmax(1) == labels).sum().item()
        bar.update()
        return right / N

    found = {"images": N, "flip_averaged": accuracy(lambda x: (x, x.flip(3))), "corruptions": {}}
    for kind in CORRUPTIONS:
        found["corruptions"][kind] = [
            accuracy(lambda x, kind=kind, severity=severity: [corrupt(x, kind, severity)])
            for severity in range(1, 6)
        ]
    found["shifts"] = [accuracy(lambda x: [x])]
    for n in range(1, 5):
        moves = ((-n, 0), (n, 0), (0, -n), (0, n))  # left, right, up, down
        each = [accuracy(lambda x, move=move: [shifted(x, *move)]) for move in moves]
        found["shifts"].append(statistics.fmean(each))
    bar.close()
    found["clean"] = found["shifts"][0]
    found["corruption_mean"] = statistics.fmean(itertools.chain(*found["corruptions"].values()))
    return found


def recipe(model: TrainedModel) -> str:
    """What two training runs share that differ in the seed alone; of unknown settings, the file."""
    c = model.checkpoint
    same = {k: v for k, v in c["settings"].items() if k not in {*OF_THE_RUN, "seed"}}
    images = {k: v for k, v in c["dataset"].items() if k not in ("data_dir", "drawn")}
    network = [c["model_name"], c["model_config"], c["classes"]]
    shared = [network, len(c["history"]), images, same or model.path]
    return json.dumps(shared, sort_keys=True)


# ---------------------------------------------------------------- text and files


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
    rows = [
        ["", *(metric.title for metric in METRICS.values()), "parameters", "epochs", "training"]
    ]
    for name, row in metrics.items():
        scores = [metric.form.format(row[key]) for key, metric in METRICS.items()]
        minutes = row["timing"]["training_seconds"] / 60
        size = f"{row['parameters']:,}"
        rows.append([name, *scores, size, f"{row['epochs']}", f"{minutes:.1f} min"])
    print(table(rows))


def write_files(out_dir: Path, files: dict[str, str | bytes]) -> None:
    """Write texts and pictures by their names; remove figures of an earlier evaluation."""
    sometimes = ("mistakes", "disagreements", "robustness", "difference", "difference-[123]")
    with cli.writing(out_dir):
        for old in itertools.chain(*(out_dir.glob(f"{name}.png") for name in sometimes)):
            old.unlink()
    for name, content in files.items():
        with cli.writing(out_dir / name):
            data = content if isinstance(content, bytes) else content.encode()
            (out_dir / name).write_bytes(data)


def draw(
    models: list[TrainedModel], metrics: dict, compared: dict, p: list, data: Data, split: Split
):
    """All figures by name, in the order of the report."""
    most = {
        "confusion_matrix.png shows": charts.MAX_MATRICES,
        "curves show": charts.MAX_CURVES,
        "mistakes are of": MAX_DRAWN,
    }
    for which, count in most.items():
        if len(models) > count:
            print(f"{which} the first {count} of {len(models)} checkpoints")
    classes, labels = data.classes, split.labels[split.indices].numpy()
    figures = {}
    for number, pair in enumerate(compared["pairs"][:MAX_DRAWN], 1):
        name = "difference" if len(compared["pairs"]) == 1 else f"difference-{number}"
        figures[name] = charts.plot_difference(pair, list(metrics), classes)
    figures["confusion_matrix"] = charts.plot_confusion(metrics, classes)
    figures["confidence"] = charts.plot_confidence(metrics)
    compared["shown"] = {}
    for kind, rows in choose_mistakes(p[:MAX_DRAWN], labels).items():
        figures[kind] = draw_explained(models[:MAX_DRAWN], split, torch.from_numpy(rows), classes)
        compared["shown"][kind] = report.image_names(split, rows.tolist())
    if "robustness" in next(iter(metrics.values())):
        figures["robustness"] = charts.plot_robustness(metrics)
    epochs = {model.name: model.checkpoint["best"]["epoch"] for model in models}
    histories = {model.name: model.checkpoint["history"] for model in models}
    figures["learning_curves"] = charts.plot_curves(histories, epochs)
    figures["class_examples"] = charts.plot_examples(split, classes)
    figures["class_counts"] = charts.plot_counts(data)
    return figures


# ---------------------------------------------------------------- command line


def parse_arguments(argv):
    """Read the command line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=cli.name_type, metavar="CHECKPOINT",
                        help="files that train_cnn.py or train_vit.py wrote")  # fmt: skip
    cli.add_data_flags(parser, from_checkpoint=True)
    add = parser.add_argument
    add("--split", choices=("test", "val"), default="test", help="which images")
    add("--robustness", action="store_true", help="also on corrupted and shifted images")
    add("--robustness-images", type=cli.integer(1), default=1000, metavar="N", help="how many")
    add("--out-dir", type=cli.path_type, metavar="DIR",
        help="for the results, in place of earlier ones (default: in runs/evaluation)")  # fmt: skip
    cli.add_device_flags(parser)
    return parser.parse_args(argv)


def default_out_dir(args) -> Path:
    """In runs/evaluation, named after the checkpoints and what else was typed."""

    def short(path) -> str:  # runs/a/best.pt -> a, pretrained/cnn.pt -> pretrained-cnn
        path = Path(path)
        if ".." in path.parts or not path.name:
            path = path.resolve()
        name = path.as_posix().strip("/").removeprefix("runs/")
        return name.removesuffix("/best.pt").removesuffix(".pt").replace("/", "-")

    words = ["+".join(map(short, expand_patterns(args.checkpoints))), args.dataset]
    words += [args.data_dir and short(args.data_dir), args.split == "val" and "val"]
    words += [args.robustness and "robustness"]
    return Path("runs/evaluation") / cli.file_name("_".join(filter(None, words)), "")


def own_validation(model: TrainedModel, data: Data, args) -> Split | None:
    """The validation images that chose the model's epoch, if others are measured. Else None.

    None too if the weights that it started from (--init) may have been trained on them.
    """
    trained_on = model.checkpoint["dataset"]
    same = same_images(trained_on, data) and not trained_before("", trained_on, data, "val")
    return data.val if same and len(data.val) and args.split == "test" else None


@cli.command
@in_our_style
def main(argv=None):
    # 1. Check.
    args = parse_arguments(argv)
    models = load_models(args.checkpoints, cli.use_device(args))
    dataset = args.dataset or models[0].checkpoint["dataset"]["name"]
    args.out_dir = args.out_dir or default_out_dir(args)
    cli.make_out_dir(args.out_dir, args.data_dir if dataset == "folder" else None, curves=False)

    # 2. Gather.
    data = load_data_for(models, args.dataset, args.data_dir, args.split)
    split = getattr(data, args.split)
    note = f"; {cli.printable(data.note)}" if data.note else ""
    print(f"{data.name}: {len(split):,} {args.split} images of {len(data.classes)} classes{note}")

    # 3. Compute.
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))
    labels, metrics, p = split.labels[split.indices].numpy(), {}, []
    for model in models:
        row, logits = evaluate(model, split, own_validation(model, data, args), data.classes)
        if args.robustness:
            some = split.subset(order[: args.robustness_images])
            row["robustness"] = measure_robustness(model, some, data.classes)
        metrics[model.name] = {"split": args.split} | row
        p.append(probabilities(logits))
    recipes = [recipe(model) for model in models]
    compared = compare_all(metrics, recipes, p, labels, data.classes)
    compared["about"] = report.describe(args, argv, data, split, models[0].checkpoint["dataset"])

    # 4. Draw.
    figures = draw(models, metrics, compared, p, data, split)
    pictures = {name: charts.as_png(figure) for name, figure in figures.items()}

    # 5. Write.
    reports = [
        f"{name}\n\n{report.text_report(x, labels, data.classes)}"
        for name, x in zip(metrics, p, strict=True)
    ]
    by_path = {model.path: metrics[model.name] for model in models}
    files = {
        "metrics.json": json.dumps(by_path, indent=2, allow_nan=False) + "\n",
        "comparison.json": json.dumps(compared, indent=2, allow_nan=False) + "\n",
        "predictions.csv": report.predictions_csv(list(metrics), p, split, data.classes),
        "classification_report.txt": "\n\n".join(reports) + "\n",
        **{f"{name}.png": picture for name, picture in pictures.items()},
        "report.html": report.render(metrics, compared, pictures),
    }
    write_files(args.out_dir, files)
    print_table(metrics)
    print("", *report.summary(metrics, compared), "", sep="\n")
    print(f"written to {args.out_dir}: {', '.join(files)}")


if __name__ == "__main__":
    cli.run(main)
