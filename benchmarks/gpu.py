"""Run a plan, a list of commands, on a GPU, and measure the networks that it trains.

    python benchmarks/gpu.py benchmarks/plans/speed.txt --data-dir data/cifar10-jpeg --out-dir gpu

A line of a plan is `name: script flags`, or a comment that starts with #. OUT stands for
--out-dir. Training scripts get `--dataset folder --data-dir DIR --pictures off --out-dir
OUT/runs/name` too. At most --at-once commands run at a time, in the order of the
plan. One that reads a file of another run, as `--teacher OUT/runs/cnn/best.pt` does, waits for
that run. Side by side they share the GPU, so their times do not measure speed.

When the time is up, the rest is stopped, and what stopped runs have reached is measured. Writes
name.log, weights in half precision, and results.json, which grows with each run. Prints a table.
--tiny: trainings of two epochs of three steps, one after the other in this process, to try a plan.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import add_folder_flag
from seeds import measure

from checkpoint import load_checkpoint, save_checkpoint, without_training_state
from cli import Parser, UserError, command, integer, make_out_dir, path_type, positive, run
from data import load_data

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {"train_cnn": 0.9, "train_vit": 0.711}  # validation accuracies whose time is measured
TINY = ["--epochs", "2", "--limit-batches", "3"]


@dataclasses.dataclass
class Job:
    """A line of a plan."""

    name: str
    script: Path
    argv: list[str]

    def best(self, out_dir: Path) -> Path:
        """The checkpoint that a training script writes."""
        return out_dir / "runs" / self.name / "best.pt"


def read_plan(args) -> list[Job]:
    """The jobs of the plan.

    Raises:
        UserError: the plan cannot be read, or a line of it is no command.
    """
    jobs = []
    try:
        lines = args.plan.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{args.plan}: cannot be read ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, _, words = line.partition(":")
        words = [re.sub(r"\bOUT\b", lambda _: str(args.out_dir), w) for w in words.split()]
        if not re.fullmatch(r"\w[\w.-]*", name) or not words or not (ROOT / words[0]).is_file():
            raise UserError(f"{args.plan}, line {number}: use `name: script flags`")
        if name in {job.name for job in jobs}:
            raise UserError(f"{args.plan}, line {number}: there are two commands named {name}")
        job = Job(name, ROOT / words[0], words[1:])
        if job.script.stem in TARGETS:
            job.argv += ["--dataset", "folder", "--data-dir", str(args.data_dir)]
            job.argv += ["--pictures", "off", "--out-dir", str(job.best(args.out_dir).parent)]
            job.argv += TINY if args.tiny else []
        jobs.append(job)
    return jobs


def run_jobs(args, jobs: list[Job]) -> dict:
    """Run the jobs side by side until they end or the time is up; return the measurements."""
    waiting, running, results = list(jobs), {}, {}
    try:
        while (waiting or running) and time.time() < args.deadline:
            for name, (job, process) in list(running.items()):
                if process.poll() is not None:
                    finish(args, job, process, results)
                    del running[name]
            others = [*waiting, *(job for job, _ in running.values())]
            job = next((job for job in waiting if not needs(args, job, others)), None)
            if waiting and job is None and not running:
                names = ", ".join(job.name for job in waiting)
                raise UserError(f"{args.plan}: each of {names} waits for another")
            if job and len(running) < args.at_once:
                waiting.remove(job)
                running[job.name] = job, start(args, job)
            else:
                time.sleep(0.1)
    finally:  # also where this script is stopped
        for job, process in running.values():
            if process.poll() is None:
                print(f"{job.name}: stopped", flush=True)
                process.terminate()
    for job, process in running.values():
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        finish(args, job, process, results)
    if waiting:
        print(f"no time for {', '.join(job.name for job in waiting)}", flush=True)
    return results


def needs(args, job: Job, others: list[Job]) -> bool:
    """Whether a job reads a file of another one's run."""
    folders = {other.best(args.out_dir).parent for other in others if other is not job}
    return any(folders.intersection(Path(word.rpartition("=")[2]).parents) for word in job.argv)


def start(args, job: Job) -> subprocess.Popen:
    """Start the job in a process of its own."""
    command = [sys.executable, "-u", str(job.script), *job.argv]
    # Without cuDNN's attention, whose backward pass has given NaN on an H100 (pocket-tts, PR 264).
    environment = os.environ | {"OMP_NUM_THREADS": "2", "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
    with (args.out_dir / f"{job.name}.log").open("w") as log:
        log.write(f"# {job.script.name} {' '.join(job.argv)}\n")
        log.flush()
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def finish(args, job: Job, process: subprocess.Popen, results: dict) -> None:
    """Wait for the job's end, and measure the network that it has trained."""
    if process.wait() not in (0, 143, -signal.SIGTERM):
        print(f"{job.name}: failed with {process.returncode}; see its log", flush=True)
    measure_run(args, job, results)


def measure_run(args, job: Job, results: dict) -> None:
    """Measure best.pt, if there is one; keep the results and the weights."""
    best = job.best(args.out_dir)
    if not best.exists():
        return
    try:
        results[job.name] = measure(best, TARGETS[job.script.stem])
        (args.out_dir / "results.json").write_text(json.dumps(results, indent=1))
        weights = without_training_state(load_checkpoint(best), torch.float16)
        save_checkpoint(args.out_dir / f"{job.name}.pt", weights)
    except UserError as error:  # the other jobs go on
        print(f"{job.name}: not measured, or not kept: {error}", flush=True)


def run_here(args, jobs: list[Job]) -> dict:
    """Run the jobs one after the other in this process."""
    results = {}
    for job in jobs:
        with (args.out_dir / f"{job.name}.log").open("w") as log, contextlib.redirect_stdout(log):
            importlib.import_module(job.script.stem).main(job.argv)
        measure_run(args, job, results)
    return results


def show(results: dict) -> None:
    """Print a row per run, and means ± standard deviations over the seeds of finished runs."""
    print(f"{'run':28}{'test':>9}{'validation':>12}{'epochs':>8}{'seconds':>10}{'to target':>11}")
    kinds = {}
    for name, row in results.items():
        to = row["seconds_to_target"]
        print(
            f"{name:28}{row['test_accuracy']:9.2%}{row['val_accuracy']:12.2%}{row['epochs']:8}"
            f"{row['seconds']:10.1f}{'-' if to is None else to:>11}"
        )
        if row["finished"]:
            kinds.setdefault(name.rpartition("-seed")[0], []).append(row)
        else:
            print(f"{name} did not finish: it counts in no mean")
    for kind, rows in kinds.items():
        if kind and len(rows) > 1:
            tests = [row["test_accuracy"] for row in rows]
            line = f"{kind:28}{statistics.mean(tests):9.2%} ± {statistics.stdev(tests):.2%}"
            times = [row["seconds_to_target"] for row in rows]
            if None not in times:
                line += f"   to target {statistics.mean(times):.1f} ± {statistics.stdev(times):.1f}"
            print(line)


@command
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("plan", type=path_type, help="file of commands")
    add_folder_flag(parser)
    add("--out-dir", type=path_type, required=True, metavar="DIR", help="for all that is written")
    add("--at-once", type=integer(1), default=1, metavar="N", help="commands side by side")
    add("--minutes", type=positive, default=60, metavar="X", help="time for the whole plan")
    add("--tiny", action="store_true", help="two epochs of three steps")
    args = parser.parse_args(argv)
    args.deadline = time.time() + 60 * args.minutes
    jobs = read_plan(args)
    make_out_dir(args.out_dir)
    if (args.out_dir / "runs").exists():
        parser.error(f"--out-dir {args.out_dir} has runs already: choose another")
    load_data("folder", args.data_dir)  # decoded once, before several processes need it
    show(run_here(args, jobs) if args.tiny else run_jobs(args, jobs))


if __name__ == "__main__":
    run(main)
