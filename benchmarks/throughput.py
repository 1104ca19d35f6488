"""Images per second of the training loop, beside those of forward, backward and step alone.

    python benchmarks/throughput.py cnn --steps 15 --rounds 5    on noise, the recipe's batch size
    python benchmarks/throughput.py vit --compile --peak         on a GPU

Times these in one process, in turn, for several rounds of the same number of steps:

- `bare`: forward, backward and step on one batch that is on the device already;
- `loop`: `training.train` on that batch (with clipping, averaged weights, sums, logs);
- `batches`: `training.train` on shuffled and augmented batches, as the recipe trains;
- `augmented`: the same with TrivialAugment and mixing;
- `... bf16`, `... off` (--amp bf16 off): the same in bfloat16, in float32;
- `... compiled` (--compile): the same after torch.compile.

Prints medians, and each one's median ratio of times to `bare` and to `loop`. --parts adds the share
of a step that each of its parts takes, --peak the fraction of the arithmetic that a product of two
8192 × 8192 matrices reaches on the device.
Appends the result to benchmarks/results/throughput.jsonl.
"""

import argparse
import collections
import copy
import functools
import itertools
import statistics
import time

import torch
import torch.nn.functional as F
from common import (
    DEVICE,
    SCRIPTS,
    add_results_flag,
    append,
    in_turn,
    new_model,
    new_training,
    ratios,
    recipe_settings,
    train_for,
)

from cli import Parser, command, integer, run
from data import Data, Split
from models import counting_operations
from prepare import make_batches
from settings import AMP_TYPES, choose_amp
from training import update_average

PEAK_SIZE = 8192  # of the matrices whose product is taken for the peak


def synchronised() -> float:
    """The time when the device has finished all of its work."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def bare_seconds(model, optimizer, batch, steps: int, amp: str) -> float:
    """Time of forward, backward and step."""
    amp, (x, y) = choose_amp(amp, DEVICE), batch
    model.train()
    started = synchronised()
    for _ in range(steps):
        with torch.autocast(DEVICE.type, AMP_TYPES[amp], enabled=amp != "off"):
            logits = model(x)
        F.cross_entropy(logits.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return synchronised() - started


def loop_seconds(model, optimizer, batches, settings) -> float:
    """Time of one epoch of `training.train`."""
    return train_for(model, optimizer, batches, None, **vars(settings))[0]["seconds"]


def part_shares(model, optimizer, batches, settings) -> dict[str, float]:
    """The median fraction of a step's time that each of its parts takes."""
    amp, ema = choose_amp(settings.amp, DEVICE), copy.deepcopy(model)
    seconds, started = collections.defaultdict(list), synchronised()

    def done(part: str) -> None:
        nonlocal started
        seconds[part].append(synchronised() - started)
        started = synchronised()

    model.train()
    for step, (images, labels) in enumerate(batches):
        done("batch")
        with torch.autocast(DEVICE.type, AMP_TYPES[amp], enabled=amp != "off"):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=settings.label_smoothing)
        done("forward")
        loss.backward()
        done("backward")
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip or float("inf"))
        done("gradient norm")
        for part in optimizer.parts:
            part.step()
            done(type(part).__name__)
        optimizer.zero_grad()
        update_average(ema, model, step, settings.ema_decay)
        done("average")
    medians = {part: statistics.median(values) for part, values in seconds.items()}
    return {part: round(value / sum(medians.values()), 4) for part, value in medians.items()}


def matrix_flops_per_second() -> float:
    """Floating-point operations per second of a matrix product, in the type of training."""
    dtype = AMP_TYPES[choose_amp("auto", DEVICE)]
    a, b = torch.randn(2, PEAK_SIZE, PEAK_SIZE, device=DEVICE, dtype=dtype)
    a @ b
    seconds = []
    for _ in range(5):
        started = synchronised()
        a @ b
        seconds.append(synchronised() - started)
    return 2 * PEAK_SIZE**3 / statistics.median(seconds)


def step_flops(name: str, settings, batch) -> int:
    """Floating-point operations of forward and backward for one batch."""
    with counting_operations() as counter:
        F.cross_entropy(new_model(name, settings)(batch[0]), batch[1]).backward()
    return counter.get_total_flops()


def noise(count: int) -> Data:
    """Random images of ten classes, all of them in the training split."""
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    train = Split.of(images, torch.arange(count) % 10)
    empty = train.subset(torch.arange(0))
    return Data("noise", train, empty, empty, list("0123456789"), (0.5,) * 3, (0.25,) * 3)


def measure(name: str, args) -> dict:
    """Time all ways of training; return what is printed and saved."""
    settings, steps = recipe_settings(name, epochs=1), args.steps
    augmented = recipe_settings(name, trivial_augment=1.0, mix=0.5)
    data = noise(settings.batch_size * steps)
    batches, _ = make_batches(data, settings, DEVICE)
    one = next(iter(batches))
    sources = {
        "bare": None,
        "loop": [one] * steps,
        "batches": batches,
        "augmented": make_batches(data, augmented, DEVICE)[0],
    }
    timed = {}
    compiled = ("", " compiled")[: 1 + args.compile]
    for way, amp, suffix in itertools.product(sources, args.amp, compiled):
        model, optimizer = new_training(name, settings, one[0])
        if suffix:
            model.compile()
        own = argparse.Namespace(**vars(settings) | {"amp": amp})
        timed[way + (f" {amp}" if len(args.amp) > 1 else "") + suffix] = (
            functools.partial(bare_seconds, model, optimizer, one, steps, amp)
            if way == "bare"
            else functools.partial(loop_seconds, model, optimizer, sources[way], own)
        )
    seconds = in_turn(timed, args.rounds)
    result = {"benchmark": "throughput", "model": name, "batch_size": settings.batch_size}
    result |= {"steps": steps, "ways": summarise(seconds, len(data.train))}
    if args.parts:
        result["parts"] = part_shares(*new_training(name, settings, one[0]), batches, settings)
    if args.peak:
        top, flops = matrix_flops_per_second(), step_flops(name, settings, one) * steps
        for way, row in result["ways"].items():
            row["share_of_peak"] = round(flops / statistics.median(seconds[way]) / top, 4)
        result["peak_tflops"] = round(top / 1e12, 2)
    return result


def summarise(seconds: dict[str, list[float]], images: int) -> dict[str, dict]:
    """Images per second of each way, and ratios of its times to those of `bare` and `loop`."""
    ways = {}
    for way, values in seconds.items():
        row = ways[way] = {"images_per_second": round(images / statistics.median(values), 1)}
        if way.startswith(("batches", "augmented")):  # what drawing and augmenting cost
            loop = seconds[" ".join(["loop", *way.split(" ")[1:]])]
            row["times_loop"] = round(statistics.median(ratios(values, loop)), 3)
        bare = ratios(values, next(iter(seconds.values())))  # the first way
        row["times_bare"] = round(statistics.median(bare), 3)
        row["ratios"] = [round(ratio, 3) for ratio in bare]
    return ways


def show(result: dict) -> None:
    """Print the result as a table."""
    print(f"{result['model']:22}{'images/s':>10}{'× bare':>9}{'× loop':>9}{'of peak':>9}")
    for way, row in result["ways"].items():
        share = f"{row['share_of_peak']:.1%}" if "share_of_peak" in row else "-"
        loop = f"{row['times_loop']:.3f}" if "times_loop" in row else "-"
        print(
            f"{way:22}{row['images_per_second']:10.0f}{row['times_bare']:9.3f}{loop:>9}{share:>9}"
        )

    for part, share in result.get("parts", {}).items():
        print(f"{part:22}{share:10.1%}")


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("model", choices=SCRIPTS, help="which recipe")
    parser.add_argument("--steps", type=integer(1), default=20, metavar="N", help="steps per round")
    parser.add_argument("--rounds", type=integer(1), default=5, metavar="N", help="repetitions")
    parser.add_argument("--amp", choices=("auto", "off", "bf16"), nargs="+", default=["auto"],
                        help="types to compare; ratios are to the first")  # fmt: skip
    parser.add_argument("--parts", action="store_true", help="add the share of each part")
    parser.add_argument("--compile", action="store_true", help="time torch.compile as well")
    parser.add_argument("--peak", action="store_true", help="add fractions of the matrix peak")
    add_results_flag(parser, "throughput.jsonl")
    args = parser.parse_args(argv)
    result = measure(args.model, args)
    show(result)
    append(args.results, result)


if __name__ == "__main__":
    run(main)
