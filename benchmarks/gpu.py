r"""All that is to be measured on a GPU, in three parts, the most important runs first.

    python benchmarks/gpu.py --part 1 --data-dir data/cifar10-jpeg --out-dir gpu
    python benchmarks/gpu.py --part 1 --data-dir data/cifar10-jpeg --out-dir try --tiny

1. Images per second and fraction of the matrix peak; the fast recipes with three seeds, one after
   the other: time to 90% (CNN) and 71.1% (ViT) validation accuracy, at the recipe's batch size and
   at a larger one; then images per second with and without torch.compile.
2. The best CNN recipe with three seeds, beside separable-resnet's for as many epochs.
3. The best ViT recipe with three seeds, beside that of Gani et al. for as many epochs.

In parts 2 and 3 the runs share the GPU, so their times do not measure speed. When the time is
up, unfinished runs are stopped, and the weights reached by then are measured; later ones are left
out. Writes logs, a JSON file per part, which grows with each run of part 1, and weights in half
precision into --out-dir, and prints a table. --tiny: a few steps each, one run after the other in
this process, to try the script on a CPU.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import throughput
import train_peer
from common import SCRIPTS, add_folder_flag
from seeds import measure

import checkpoint
from cli import Parser, command, integer, make_out_dir, path_type, positive, run
from data import load_data

SEEDS = (0, 1, 2)
LARGE_BATCH = {
    "cnn": ["--batch-size", "512", "--lr", "1e-2", "--muon-lr", "0.04"],
    "vit": ["--batch-size", "512", "--lr", "2e-3", "--muon-lr", "0.03"],
}


@dataclasses.dataclass
class Job:
    """A call of a script's `main(argv)`."""

    name: str
    script: types.ModuleType
    argv: list[str]


def run_jobs(args, *jobs: Job) -> None:
    """Run the jobs side by side, a process each, until they end or the time is up.

    With --tiny, run them one by one in this process. Output goes into <name>.log.
    """
    for job in jobs:  # of an earlier call
        shutil.rmtree(run_folder(args, job.name), ignore_errors=True)
        for suffix in ("json", "log", "pt"):
            (args.out_dir / f"{job.name}.{suffix}").unlink(missing_ok=True)
    if time.time() > args.deadline:
        print(f"no time for {', '.join(job.name for job in jobs)}", flush=True)
        return
    for job in jobs:
        print(f"{job.name}: {Path(job.script.__file__).name} {' '.join(job.argv)}", flush=True)
    if args.tiny:
        for job in jobs:
            with open_log(args, job) as log, contextlib.redirect_stdout(log):
                job.script.main(job.argv)
        return
    processes = {job.name: start(args, job) for job in jobs}
    try:
        while time.time() < args.deadline and any(p.poll() is None for p in processes.values()):
            time.sleep(0.1)
    finally:  # also where this script is stopped
        for name, process in processes.items():
            if process.poll() is None:
                print(f"{name}: stopped", flush=True)
                process.terminate()
    for name, process in processes.items():
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        if process.wait() not in (0, 143, -signal.SIGTERM):
            print(f"{name}: failed with {process.returncode}; see its log", flush=True)


def start(args, job: Job) -> subprocess.Popen:
    """Start the job in a process of its own."""
    command = [sys.executable, "-u", job.script.__file__, *job.argv]
    # Without cuDNN's attention, whose backward pass has given NaN on an H100 (pocket-tts, PR 264).
    environment = os.environ | {"OMP_NUM_THREADS": "2", "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
    with open_log(args, job) as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def open_log(args, job: Job):
    return (args.out_dir / f"{job.name}.log").open("w")


def run_folder(args, name: str) -> Path:
    return args.out_dir / "runs" / name


def training_job(args, name: str, model: str, seed: int, *flags: str) -> Job:
    """A run of ours, in --out-dir/runs/<name>."""
    argv = ["--dataset", "folder", "--data-dir", str(args.data_dir), *flags, *args.limits]
    argv += ["--pictures", "off", "--overwrite", "--seed", str(seed)]
    argv += ["--out-dir", str(run_folder(args, name))]
    return Job(name, SCRIPTS[model], argv)


def measured(args, names: list[str], target: float) -> dict:
    """What `seeds.measure` returns for each run; runs without a checkpoint are left out."""
    files = {name: run_folder(args, name) / "best.pt" for name in names}
    return {name: measure(file, target) for name, file in files.items() if file.exists()}


def save(args, results: dict) -> None:
    (args.out_dir / f"part{args.part}.json").write_text(json.dumps(results, indent=1))


def measure_speed(args, name: str, *flags: str) -> None:
    """Images per second of both networks; prints the tables."""
    size = ["--rounds", "1", "--steps", "3"] if args.tiny else ["--rounds", "2", "--steps", "30"]
    for model in ("cnn", "vit"):
        argv = [model, *size, *flags, "--results", str(args.out_dir / "throughput.jsonl")]
        job = Job(f"{name}-{model}", throughput, argv)
        run_jobs(args, job)
        with contextlib.suppress(FileNotFoundError):  # there was no time
            print((args.out_dir / f"{job.name}.log").read_text())


def fast_recipes(args) -> dict:
    """Part 1: images per second; then runs one after the other; then compiled."""
    results = {}
    measure_speed(args, "throughput", *[] if args.tiny else ["--peak"])
    for seed in args.seeds:
        for kind in ("fast", "fast-512"):
            for model, target in (("cnn", 0.9), ("vit", 0.711)):
                name = f"{model}-{kind}-{seed}"
                flags = LARGE_BATCH[model] if kind == "fast-512" else []
                run_jobs(args, training_job(args, name, model, seed, *flags))
                results |= measured(args, [name], target)
                save(args, results)
    if not args.tiny:
        measure_speed(args, "compiled", "--compile")
    return results


def best_and_peer(args, model: str, peer: str) -> dict:
    """Parts 2 and 3: our best recipe and a published one, side by side."""
    jobs, names, files = [], [], {}
    for seed in args.seeds:
        names.append(f"{model}-best-{seed}")
        jobs.append(training_job(args, names[-1], model, seed, "--recipe", "best"))
        name = f"{peer}-peer-{seed}"
        files[name] = args.out_dir / f"{name}.json"
        argv = [peer, "--data-dir", str(args.data_dir), *args.limits, "--seed", str(seed)]
        jobs.append(Job(name, train_peer, [*argv, "--out", str(files[name])]))
    run_jobs(args, *jobs)
    own = measured(args, names, 0.9)
    peers = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    save(args, own | peers)
    for name in own:
        best = run_folder(args, name) / "best.pt"
        checkpoint.main([str(best), str(args.out_dir / f"{name}.pt")])
    return own | peers


def show(results: dict) -> None:
    """Print a row per run, and means ± standard deviations of the runs that were finished."""
    print(f"{'run':20}{'test':>9}{'validation':>12}{'seconds':>10}{'to target':>11}")
    kinds = {}
    for name, row in results.items():
        to = row.get("seconds_to_target")
        print(
            f"{name:20}{row['test_accuracy']:9.2%}{row['val_accuracy']:12.2%}{row['seconds']:10.1f}"
            f"{'-' if to is None else to:>11}"
        )
        if row["finished"]:
            kinds.setdefault(name.rsplit("-", 1)[0], []).append(row)
        else:
            print(f"{name} was stopped: it counts in no mean")
    for kind, rows in kinds.items():
        if len(rows) > 1:
            tests = [row["test_accuracy"] for row in rows]
            line = f"{kind:20}{statistics.mean(tests):9.2%} ± {statistics.stdev(tests):.2%}"
            times = [row.get("seconds_to_target") for row in rows]
            if None not in times:
                line += f"   to target {statistics.mean(times):.1f} ± {statistics.stdev(times):.1f}"
            print(line)


@command
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--part", type=integer(1, 3), required=True, metavar="N", help="1, 2 or 3")
    add_folder_flag(parser)
    add("--out-dir", type=path_type, required=True, metavar="DIR", help="for all that is written")
    add(
        "--epochs",
        type=integer(1),
        default=30,
        metavar="N",
        help="in parts 2 and 3: 30 or 60, after which a peer's cosines end",
    )
    add("--minutes", type=positive, default=7.5, metavar="X", help="time for the part")
    add("--tiny", action="store_true", help="one seed, two epochs of three steps")
    args = parser.parse_args(argv)
    args.seeds = SEEDS[:1] if args.tiny else SEEDS
    args.limits = [] if args.part == 1 else ["--epochs", str(args.epochs)]
    if args.tiny:
        args.limits = ["--epochs", "2", "--limit-batches", "3"]
    make_out_dir(args.out_dir)
    load_data("folder", args.data_dir)  # decoded once, before several processes need it
    args.deadline = time.time() + 60 * args.minutes
    if args.part == 1:
        results = fast_recipes(args)
    else:
        results = best_and_peer(args, *(("cnn", "separable") if args.part == 2 else ("vit", "vit")))
    show(results)


if __name__ == "__main__":
    run(main)
