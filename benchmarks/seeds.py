r"""Accuracy over seeds, and the training time to a given validation accuracy.

    python benchmarks/seeds.py cnn --seeds 0 1 2 --target .831 -- \
        --dataset folder --data-dir data/cifar10-jpeg

Runs train_cnn.py or train_vit.py once a seed, with what follows `--` as its flags, and measures
best.pt (chosen on validation) on the test split: one plain forward per image. The time to
--target is that of training, to the end of the first epoch whose validation accuracy reaches it.
Prints a row a seed, then mean ± standard deviation (n - 1), and appends all to
benchmarks/results/seeds.jsonl. Runs are kept under --out-dir; one that is there is only measured.
"""

import statistics
import sys
from pathlib import Path

from common import DEVICE, RESULTS, SCRIPTS, append
from sklearn.metrics import accuracy_score

from batches import Batches
from checkpoint import load_checkpoint, load_data_of, load_model
from cli import Parser, UserError, command
from evaluate import predict


@command
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    own = argv[: argv.index("--")] if "--" in argv else argv
    flags = argv[len(own) + 1 :]
    parser = Parser(__doc__)
    parser.add_argument("network", choices=SCRIPTS)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="a training each"
    )
    parser.add_argument("--target", type=float, required=True, metavar="X",
                        help="validation accuracy to time, 0 to 1")  # fmt: skip
    parser.add_argument(
        "--out-dir", type=Path, default=Path("runs"), metavar="DIR", help="of the runs"
    )
    parser.add_argument("--results", type=Path, default=RESULTS / "seeds.jsonl", metavar="FILE",
                        help="where the rows are appended")  # fmt: skip
    args = parser.parse_args(own)
    rows = []
    for seed in args.seeds:
        run = args.out_dir / f"{args.network}-seed{seed}"
        if not (run / "last.pt").exists():
            SCRIPTS[args.network].main([*flags, "--seed", str(seed), "--out-dir", str(run)])
        last = load_checkpoint(run / "last.pt")
        if last["epoch"] < last["settings"]["epochs"]:
            raise UserError(f"{run} is not finished: go on with it, or remove it")
        settings = {k: v for k, v in last["settings"].items() if k not in ("seed", "out_dir")}
        rows.append({"seed": seed} | measure(run / "best.pt", args.target))

    print(f"{'seed':>4}{'test':>9}{'validation':>12}{'seconds':>10}{f'to {args.target:.1%}':>12}")
    for row in rows:
        to = "never" if row["seconds_to_target"] is None else f"{row['seconds_to_target']:.1f}"
        print(
            f"{row['seed']:4}{row['test_accuracy']:9.2%}{row['val_accuracy']:12.2%}"
            f"{row['seconds']:10.1f}{to:>12}"
        )
    tests = [row["test_accuracy"] for row in rows]
    spread = statistics.stdev(tests) if len(tests) > 1 else None
    print(f"test {statistics.mean(tests):.2%}" + (f" ± {spread:.2%}" if spread else ""))
    append(args.results, {
        "network": args.network, "settings": settings, "target": args.target, "runs": rows,
        "test_mean": round(statistics.mean(tests), 4), "test_std": spread and round(spread, 4),
    })  # fmt: skip


def measure(path: Path, target: float) -> dict:
    """What a run of the training scripts reached, and when."""
    model, checkpoint = load_model(path, DEVICE)
    data = load_data_of({str(path): checkpoint}, None, None)
    logits, labels = predict(
        model,
        Batches(data.test, 500, mean=checkpoint["mean"], std=checkpoint["std"], device=DEVICE),
    )
    reached = [r["seconds"] for r in checkpoint["history"] if (r["val_accuracy"] or 0) >= target]
    return {
        "test_accuracy": accuracy_score(labels, logits.argmax(1)),
        "val_accuracy": checkpoint["best"]["val_accuracy"],
        "epochs": checkpoint["history"][-1]["epoch"],
        "finished": checkpoint["history"][-1]["epoch"] == checkpoint["settings"]["epochs"],
        "seconds": round(checkpoint["history"][-1]["seconds"], 1),
        "seconds_to_target": round(reached[0], 1) if reached else None,
    }


if __name__ == "__main__":
    main()
