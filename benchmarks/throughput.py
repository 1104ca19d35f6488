"""Images per second of the training loop, against the bare arithmetic of the device.

    python benchmarks/throughput.py cnn --steps 15 --rounds 5    on noise, the recipe's batch size
    python benchmarks/throughput.py vit --compile --peak         on a GPU

Times in one process, in turn, several rounds of the same number of steps:

- `bare`: forward, backward and step on one batch that is already in place;
- `loop`: our loop on one batch that is already in place (clipping, averaged weights, sums, log);
- `batches`: our loop on batches drawn, flipped, shifted and normalised, as the recipe trains;
- `auto-augment`: the same with automatic augmentation and mixing;
- `... compiled` (--compile): the same after torch.compile.

Prints medians, and each one's median ratio of times to `bare` and to `loop`; --peak adds the share
of the arithmetic that a product of two 8192 × 8192 matrices reaches on the device. Appends the
result to benchmarks/results/throughput.jsonl.
"""

import itertools
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    DEVICE,
    RESULTS,
    SCRIPTS,
    append,
    new_model,
    new_training,
    recipe_settings,
    train_for,
)  # fmt: skip
from torch.utils.flop_counter import FlopCounterMode

from batches import Batches
from cli import Parser, command, run
from data import Split
from training import choose_amp


class OneBatch:
    """The same batch again and again, `steps` times."""

    def __init__(self, batch, steps: int):
        self.batch, self.steps = batch, steps

    def __len__(self):
        return self.steps

    def __iter__(self):
        return iter([self.batch] * self.steps)


def synchronised() -> float:
    """The time, once the device has done all that it was given."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bare_seconds(model, optimizer, batch, steps: int) -> float:
    amp_dtype, (x, y) = choose_amp("auto", DEVICE), batch
    model.train()
    started = synchronised()
    for _ in range(steps):
        with torch.autocast(DEVICE.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return synchronised() - started


def matrix_flops_per_second(size: int = 8192) -> float:
    """What a product of two square matrices reaches, in the type that training uses."""
    a = torch.randn(size, size, device=DEVICE, dtype=choose_amp("auto", DEVICE) or torch.float32)
    b = torch.randn_like(a)
    a @ b
    seconds = []
    for _ in range(5):
        started = synchronised()
        a @ b
        seconds.append(synchronised() - started)
    return 2 * size**3 / statistics.median(seconds)


def step_flops(name: str, settings, batch) -> int:
    """Floating-point operations of forward and backward for one batch."""
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(new_model(name, settings)(batch[0]), batch[1]).backward()
    return counter.get_total_flops()


def measure(name: str, steps: int, rounds: int, compiled: bool, peak: bool) -> dict:
    """Images per second of each way, medians, and ratios to `bare` within a round."""
    settings = recipe_settings(name)
    size = settings.batch_size
    images = torch.randint(256, (size * steps, 3, 32, 32), dtype=torch.uint8)
    split = Split(images, torch.arange(len(images)) % 10, torch.arange(len(images)))
    common = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "device": DEVICE, "train": True}
    common |= {"flip": settings.flip, "shift": settings.shift, "erase": settings.erase}
    batches = Batches(split, size, **common)
    augmented = Batches(split, size, **common, auto_augment=True, mix=0.5)
    one = next(iter(batches))

    sources = {"bare": None, "loop": OneBatch(one, steps)}
    sources |= {"batches": batches, "auto-augment": augmented}
    trainings = {}
    for way, c in itertools.product(sources, (False, True) if compiled else (False,)):
        trainings[way, c] = new_training(name, settings, one[0])
        if c:
            trainings[way, c][0].compile()
    seconds = {key: [] for key in trainings}
    for turn in range(rounds + 1):
        for (way, c), training in trainings.items():
            if way == "bare":
                taken = bare_seconds(*training, one, steps)
            else:
                history = train_for(*training, sources[way], None, vars(settings), epochs=1)
                taken = history[0]["seconds"]
            if turn:  # the first round warms up, and compiles
                seconds[way, c].append(taken)

    result = {
        "benchmark": "throughput",
        "model": name,
        "batch_size": size,
        "steps": steps,
        "ways": {},
    }
    flops = step_flops(name, settings, one) * steps
    top = matrix_flops_per_second() if peak else None
    for (way, c), values in seconds.items():
        ratios = [own / base for own, base in zip(values, seconds["bare", False], strict=True)]
        row = {"images_per_second": round(size * steps / statistics.median(values), 1)}
        if way in ("batches", "auto-augment"):  # what drawing and augmenting costs
            loop = zip(values, seconds["loop", c], strict=True)
            row["times_loop"] = round(statistics.median(own / base for own, base in loop), 3)
        row |= {
            "times_bare": round(statistics.median(ratios), 3),
            "ratios": [round(r, 3) for r in ratios],
        }
        if top:
            row["share_of_peak"] = round(flops / statistics.median(values) / top, 4)
        result["ways"][way + " compiled" * c] = row
    return result | ({"peak_tflops": round(top / 1e12, 2)} if top else {})


def show(result: dict) -> None:
    print(f"{result['model']:22}{'images/s':>10}{'× bare':>9}{'× loop':>9}{'of peak':>9}")
    for way, row in result["ways"].items():
        share = f"{row['share_of_peak']:9.1%}" if "share_of_peak" in row else f"{'-':>9}"
        loop = f"{row['times_loop']:9.3f}" if "times_loop" in row else f"{'-':>9}"
        print(f"{way:22}{row['images_per_second']:10.0f}{row['times_bare']:9.3f}{loop}{share}")


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("model", choices=SCRIPTS)
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of a timed round")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="repetitions")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    parser.add_argument("--peak", action="store_true", help="share of the matrix peak, too")
    parser.add_argument("--results", type=Path, default=RESULTS / "throughput.jsonl",
                        metavar="FILE", help="where the rows are appended")  # fmt: skip
    args = parser.parse_args(argv)
    result = measure(args.model, args.steps, args.rounds, args.compile, args.peak)
    show(result)
    append(args.results, result)


if __name__ == "__main__":
    run(main)
