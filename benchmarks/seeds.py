r"""Accuracy over seeds, and the training time to a given validation accuracy.

    python benchmarks/seeds.py cnn --seeds 0 1 2 --target .831 -- \
        --dataset folder --data-dir data/cifar10-jpeg

Runs train_cnn.py or train_vit.py once per seed, with the flags after `--`, and measures best.pt
(chosen on validation) on the test split: one plain forward per image. The time to --target is that
of training, to the end of the first epoch whose validation accuracy reaches it. Prints a row per
seed, then mean ± standard deviation (n - 1), and appends the result to
benchmarks/results/seeds.jsonl. Runs are kept below --out-dir; those that are finished are measured
only.
"""

import statistics
import sys
from pathlib import Path

from common import DEVICE, SCRIPTS, add_results_flag, append
from sklearn.metrics import accuracy_score

from checkpoint import load_checkpoint
from cli import Parser, UserError, command, integer, path_type, real, run
from prepare import load_data_for, load_models
from settings import OF_THE_RUN


def measure(path: Path, target: float) -> dict:
    """Accuracies and times of a checkpoint of the training scripts."""
    models = load_models([str(path)], DEVICE)
    data, checkpoint = load_data_for(models, None, None), models[0].checkpoint
    labels, history = data.test.labels[data.test.indices], checkpoint["history"]
    if checkpoint["best"]["val_accuracy"] is None:
        raise UserError(f"{path}: trained without validation; use --val-fraction")
    logits = models[0].logits(data.test, data.classes)
    reached = [row["seconds"] for row in history if row["val_accuracy"] >= target]
    return {
        "test_accuracy": accuracy_score(labels, logits.argmax(1)),
        "val_accuracy": checkpoint["best"]["val_accuracy"],
        "epochs": history[-1]["epoch"],
        "finished": history[-1]["epoch"] == checkpoint["settings"]["epochs"],
        "seconds": round(history[-1]["seconds"], 1),
        "seconds_to_target": round(reached[0], 1) if reached else None,
    }


def train_and_measure(network: str, seed: int, flags: list[str], args) -> tuple[dict, dict]:
    """The row of one seed, and the settings of its run."""
    folder = args.out_dir / f"{network}-seed{seed}"
    exists = (folder / "last.pt").exists()
    if flags or not exists:  # a run that exists is resumed, or refused if its settings differ
        own = ["--seed", str(seed), "--out-dir", str(folder)]
        SCRIPTS[network].main([*flags, *own, *["--resume"] * exists])
    last = load_checkpoint(folder / "last.pt")
    if last["epoch"] < last["settings"]["epochs"]:
        raise UserError(f"{folder} is not finished: resume it, or remove it")
    settings = {k: v for k, v in last["settings"].items() if k not in ("seed", "out_dir")}
    settings["images"] = last["dataset"].get("content")
    return {"seed": seed} | measure(folder / "best.pt", args.target), settings


def show(rows: list[dict], target: float) -> None:
    """Print a row per seed."""
    print(f"{'seed':>4}{'test':>9}{'validation':>12}{'seconds':>10}{f'to {target:.1%}':>12}")
    for row in rows:
        to = "never" if row["seconds_to_target"] is None else f"{row['seconds_to_target']:.1f}"
        print(
            f"{row['seed']:4}{row['test_accuracy']:9.2%}{row['val_accuracy']:12.2%}"
            f"{row['seconds']:10.1f}{to:>12}"
        )


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    own = argv[: argv.index("--")] if "--" in argv else argv
    parser = Parser(__doc__)
    add = parser.add_argument
    add("network", choices=SCRIPTS, help="which script")
    add("--seeds", type=integer(0, 2**63 - 1), nargs="+", default=[0, 1, 2], metavar="N",
        help="one run each")  # fmt: skip
    add("--target", type=real(0, 1), required=True, metavar="X",
        help="validation accuracy to reach, 0 to 1")  # fmt: skip
    add("--out-dir", type=path_type, default=Path("runs"), metavar="DIR", help="for the runs")
    add_results_flag(parser, "seeds.jsonl")
    args = parser.parse_args(own)
    rows, settings = [], {}
    for seed in dict.fromkeys(args.seeds):
        row, new = train_and_measure(args.network, seed, argv[len(own) + 1 :], args)
        keys = {*new, *settings} - OF_THE_RUN if rows else ()
        if differ := ", ".join(sorted(key for key in keys if new.get(key) != settings.get(key))):
            raise UserError(f"{args.out_dir}: the runs differ in {differ}: use another --out-dir")
        settings = new
        rows.append(row)
    show(rows, args.target)
    tests = [row["test_accuracy"] for row in rows]
    mean, spread = statistics.mean(tests), statistics.stdev(tests) if len(tests) > 1 else None
    print(f"test {mean:.2%}" + (f" ± {spread:.2%}" if spread else ""))
    append(args.results, {
        "network": args.network, "settings": settings, "target": args.target, "runs": rows,
        "test_mean": round(mean, 4), "test_std": spread and round(spread, 4),
    })  # fmt: skip


if __name__ == "__main__":
    run(main)
