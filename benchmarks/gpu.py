r"""All that is to be measured on a GPU, in three parts of at most eight minutes on one H100.

    python benchmarks/gpu.py --part 1 --data-dir data/cifar10-jpeg --out-dir gpu
    python benchmarks/gpu.py --part 1 --data-dir data/cifar10-jpeg --out-dir try --tiny

1. The fast recipes over three seeds, one after the other: time to 90% (CNN) and 71.1% (ViT)
   validation accuracy, at the recipe's batch size and at a larger one; then images per second,
   share of the matrix peak, torch.compile on and off.
2. The best CNN recipe over three seeds, beside separable-resnet's for as many epochs.
3. The best ViT recipe over three seeds, beside Gani et al.'s for as many epochs.

In parts 2 and 3 the trainings share the GPU, so their times are no measure of speed. What is not
finished when the time is up is stopped, and what it has reached is measured. Logs, a JSON file a
part and weights in half precision are written to --out-dir, the table is printed last. --tiny:
three steps each, to try the script out on a CPU.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import ROOT
from seeds import measure

from cli import Parser, command
from data import load_data

SEEDS = (0, 1, 2)
LARGE_BATCH = {
    "cnn": ["--batch-size", "512", "--lr", "1e-2", "--muon-lr", "0.04"],
    "vit": ["--batch-size", "512", "--lr", "2e-3", "--muon-lr", "0.03"],
}


def start(name: str, command: list[str], out_dir: Path) -> subprocess.Popen:
    """A script of ours in a process of its own, its output in <name>.log; old results go."""
    shutil.rmtree(out_dir / "runs" / name, ignore_errors=True)
    for suffix in ("json", "pt"):
        (out_dir / f"{name}.{suffix}").unlink(missing_ok=True)
    print(f"{name}: python {' '.join(command)}", flush=True)
    log = (out_dir / f"{name}.log").open("w")
    command = [sys.executable, str(ROOT / command[0]), *command[1:]]
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def wait(processes: dict[str, subprocess.Popen], deadline: float) -> None:
    """Until all have ended, or the time is up; then all are told to end at once."""
    while time.time() < deadline and any(p.poll() is None for p in processes.values()):
        time.sleep(0.1)
    for name, process in processes.items():
        if process.poll() is None:
            print(f"{name}: out of time, stopped", flush=True)
            process.terminate()
    for name, process in processes.items():
        if process.wait() not in (0, 143):
            print(f"{name}: failed with {process.returncode}; see its log", flush=True)


def trained(runs: dict[str, Path], target: float) -> dict:
    """Each run measured on the test split; what has no checkpoint is left out."""
    return {
        name: measure(path / "best.pt", target)
        for name, path in runs.items()
        if (path / "best.pt").exists()
    }


def part_1(args, deadline: float) -> dict:
    few = ["--limit-batches", "3", "--epochs", "2"] if args.tiny else []
    results = {}
    for kind in ("fast", "fast-512"):
        for model, target in (("cnn", 0.9), ("vit", 0.711)):
            flags, runs = (LARGE_BATCH[model] if kind == "fast-512" else []), {}
            for seed in SEEDS[: 1 if args.tiny else None]:
                name = f"{model}-{kind}-{seed}"
                runs[name] = args.out_dir / "runs" / name
                command = [f"train_{model}.py", *args.data, *flags, *few, "--seed", str(seed)]
                command += ["--out-dir", str(runs[name]), "--overwrite"]
                wait({name: start(name, command, args.out_dir)}, deadline)
            results |= trained(runs, target)
    for model in ("cnn", "vit"):
        rounds = (
            ["--steps", "3", "--rounds", "1"]
            if args.tiny
            else ["--steps", "100", "--rounds", "3", "--compile"]
        )
        command = ["benchmarks/throughput.py", model, "--peak", *rounds]
        command += ["--results", str(args.out_dir / "throughput.jsonl")]
        wait({model: start(f"throughput-{model}", command, args.out_dir)}, deadline)
    return results


def best_and_peer(args, deadline: float, model: str, peer: str) -> dict:
    few = ["--limit-batches", "3", "--epochs", "2"] if args.tiny else ["--epochs", str(args.epochs)]
    runs, peers, processes = {}, {}, {}
    for seed in SEEDS[: 1 if args.tiny else None]:
        name = f"{model}-best-{seed}"
        runs[name] = args.out_dir / "runs" / name
        command = [f"train_{model}.py", *args.data, *few, "--recipe", "best", "--seed", str(seed)]
        command += ["--out-dir", str(runs[name]), "--overwrite"]
        processes[name] = start(name, command, args.out_dir)
        name = f"{peer}-peer-{seed}"
        peers[name] = args.out_dir / f"{name}.json"
        command = ["benchmarks/train_peer.py", peer, *args.data[2:], *few, "--seed", str(seed)]
        command += ["--out", str(peers[name])]
        processes[name] = start(name, command, args.out_dir)
    wait(processes, deadline)
    results = trained(runs, 0.9)
    for name, path in runs.items():
        if name in results:
            weights = args.out_dir / f"{name}.pt"
            command = ["checkpoint.py", str(path / "best.pt"), str(weights)]
            start(f"export-{name}", command, args.out_dir).wait()
    return results | {n: json.loads(p.read_text()) for n, p in peers.items() if p.exists()}


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("--part", type=int, choices=(1, 2, 3), required=True, help="see above")
    parser.add_argument("--data-dir", required=True, metavar="DIR",
                        help="folder of images, such as data/cifar10-jpeg")  # fmt: skip
    parser.add_argument("--out-dir", type=Path, required=True, metavar="DIR",
                        help="where logs, results and weights go")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=60, metavar="N", help="of parts 2 and 3")
    parser.add_argument("--minutes", type=float, default=7.5, metavar="X", help="time of the part")
    parser.add_argument("--tiny", action="store_true", help="three steps each")
    args = parser.parse_args(argv)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    args.data = ["--dataset", "folder", "--data-dir", args.data_dir]
    deadline = time.time() + 60 * args.minutes
    load_data("folder", args.data_dir)  # decoded once, before several processes want it
    if args.part == 1:
        results = part_1(args, deadline)
    else:
        pair = ("cnn", "separable") if args.part == 2 else ("vit", "vit")
        results = best_and_peer(args, deadline, *pair)
    (args.out_dir / f"part{args.part}.json").write_text(json.dumps(results, indent=1))

    for log in sorted(args.out_dir.glob("throughput-*.log")) if args.part == 1 else ():
        print(log.read_text())
    print(f"{'run':20}{'test':>9}{'validation':>12}{'seconds':>10}{'to target':>11}")
    for name, row in results.items():
        to = row.get("seconds_to_target")
        print(
            f"{name:20}{row['test_accuracy']:9.2%}{row['val_accuracy']:12.2%}{row['seconds']:10.1f}"
            f"{'-' if to is None else to:>11}"
        )
    kinds = {}
    for name, row in results.items():
        if row["finished"]:
            kinds.setdefault(name.rsplit("-", 1)[0], []).append(row)
        else:
            print(f"{name} was stopped, and counts in no mean")
    for kind, rows in kinds.items():
        if len(rows) > 1:
            tests = [row["test_accuracy"] for row in rows]
            line = f"{kind:20}{statistics.mean(tests):9.2%} ± {statistics.stdev(tests):.2%}"
            times = [row.get("seconds_to_target") for row in rows]
            if None not in times:
                line += f"   to target {statistics.mean(times):.1f} ± {statistics.stdev(times):.1f}"
            print(line)


if __name__ == "__main__":
    main()
