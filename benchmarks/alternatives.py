"""What a user would pick instead: each trains for the same time, and validation accuracy counts.

    python benchmarks/alternatives.py --data-dir data/cifar10-jpeg --minutes 30

- `cnn`, `vit`: our networks and recipes;
- `resnet-20`: SGD .1 with momentum .9, weight decay 1e-4, batch 128, flips, shifts of up to 4
  pixels, half a cosine (He et al. 2016, with today's usual schedule);
- `tutorial-vit`: the UvA tutorial's, AdamW 3e-4, batch 128, clipping at 1, the rate divided by 10
  after 100/180 and 150/180 of the epochs; flips and shifts of 2 pixels for its random crops;
- `notebook-cnn`: the notebook's, Adam 1e-3, batch 64, no augmentation, no schedule.

All train in our loop, on the same images. --steps steps in float32, and as many in half precision
where that is fast, measure the speed. The faster of the two is used, and its speed decides how many
whole epochs fit (at least one). Appends a row for each network to --results, and draws into
--figure the latest row of each that was made in the same way. The test split is not used.
"""

import functools
import json
import math
from pathlib import Path

import torch
from common import (
    DEVICE,
    SCRIPTS,
    adamw,
    add_folder_flag,
    add_results_flag,
    append,
    in_turn,
    new_training,
    recipe_settings,
    train_for,
)
from peers import NotebookCNN, ResNet20, TutorialViT

import training
from batches import Batches
from cli import Parser, command, integer, path_type, positive, run
from data import load_data
from figures import Figure, in_our_style
from models import count_parameters
from prepare import make_batches
from settings import choose_amp


def cosine(step: int, total_steps: int, warmup: float, peak: float) -> float:
    """Half a cosine from the peak down to 0."""
    return peak * (1 + math.cos(math.pi * step / total_steps)) / 2


def two_steps(step: int, total_steps: int, warmup: float, peak: float) -> float:
    """Divided by 10 after 100/180 and again after 150/180 of all steps."""
    done = 180 * step / total_steps
    return peak * (1 if done < 100 else 0.1 if done < 150 else 0.01)


def constant(step: int, total_steps: int, warmup: float, peak: float) -> float:
    return peak


def sgd(model) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)


# network, optimizer, settings, schedule, augmentation
PEERS = {
    "resnet-20": (
        ResNet20,
        sgd,
        {"batch_size": 128},
        cosine,
        {"flip": True, "shift": 4},
    ),
    "tutorial-vit": (
        TutorialViT,
        functools.partial(adamw, lr=3e-4, weight_decay=0.01),
        {"batch_size": 128, "clip": 1.0},
        two_steps,
        {"flip": True, "shift": 2},
    ),
    "notebook-cnn": (
        NotebookCNN,
        lambda model: torch.optim.Adam(model.parameters(), 1e-3),
        {"batch_size": 64},
        constant,
        {},
    ),
}


def train_alternative(name: str, data, *, amp: str, **common) -> dict:
    """Train one of them; return its parameters and history.

    `common`: epochs, seed and limit_batches.
    """
    common |= {"amp": amp, "classes": len(data.classes)}
    torch.manual_seed(common["seed"])
    if name in SCRIPTS:
        own = recipe_settings(name, **common)
        train_batches, val_batches = make_batches(data, own, DEVICE)
        model, optimizer = new_training(name, own, next(iter(train_batches))[0])
        settings, lr_at = vars(own), training.lr_at
    else:
        network, make_optimizer, settings, lr_at, augmentation = PEERS[name]
        model = network(len(data.classes)).to(DEVICE, memory_format=torch.channels_last)
        optimizer, settings = make_optimizer(model), settings | common
        place = {"mean": data.mean, "std": data.std, "device": DEVICE}
        size = settings["batch_size"]
        train_batches = Batches(data.train, size, train=True, **augmentation, **place)
        val_batches = Batches(data.val, 500, **place)
    history = train_for(model, optimizer, train_batches, val_batches, lr_at=lr_at, **settings)
    return {"parameters": count_parameters(model), "history": history}


def fastest(name: str, data, **settings) -> tuple[float, str]:
    """Its highest speed in images per second, and the `amp` with which it has it."""

    def speed(amp: str) -> float:
        (epoch,) = train_alternative(name, data, amp=amp, epochs=1, **settings)["history"]
        return epoch["images_per_second"]

    types = sorted({"off", choose_amp("auto", DEVICE)})
    speeds = in_turn({amp: functools.partial(speed, amp) for amp in types}, rounds=1)
    return max((value, amp) for amp, (value,) in speeds.items())


def draw(results: list[dict], minutes: float) -> Figure:
    """Validation accuracy by training time. The legend has that of the last epoch."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for result in results:
        rows = result["history"]
        x, y = ([row[key] for row in rows] for key in ("seconds", "val_accuracy"))
        label = f"{result['name']}: {y[-1]:.1%} ({len(rows)} epochs, {result['amp']})"
        axes.plot([s / 60 for s in x], y, marker=".", label=label)
    axes.set(xlabel="training time (minutes)", ylabel="validation accuracy", xlim=(0, None))
    axes.set_title(f"The same {minutes:g} minutes for each")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right")
    return figure


@command
@in_our_style
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add_folder_flag(parser)
    names = [*SCRIPTS, *PEERS]
    add("--networks", nargs="+", choices=names, default=names, metavar="NAME", help="which ones")
    add("--minutes", type=positive, default=30, metavar="X", help="training time of each")
    add("--steps", type=integer(1), default=60, metavar="N", help="steps that measure the speed")
    add("--seed", type=integer(0, 2**63 - 1), default=0, metavar="N", help="random seed")
    add("--limit-batches", type=integer(1), metavar="N", help="at most N per epoch, to try it")
    add("--figure", type=path_type, default=Path("runs/alternatives.png"), metavar="FILE",
        help="PNG file of the curves")  # fmt: skip
    add_results_flag(parser, "alternatives.jsonl")
    args = parser.parse_args(argv)
    data = load_data("folder", args.data_dir)
    for name in args.networks:
        speed, amp = fastest(name, data, seed=args.seed, limit_batches=args.steps)
        epochs = max(1, int(60 * args.minutes * speed / len(data.train)))
        print(f"== {name}: {epochs} epochs, {amp}", flush=True)
        settings = {"amp": amp, "seed": args.seed, "limit_batches": args.limit_batches}
        result = train_alternative(name, data, epochs=epochs, **settings)
        row = {"name": name, "minutes": args.minutes, "images": data.content}
        append(args.results, row | settings | result)
    rows = [json.loads(line) for line in args.results.read_text().splitlines()]
    same = ("minutes", "images", "seed", "limit_batches", "device", "cpu", "threads")
    latest = {row["name"]: row for row in rows if all(row[k] == rows[-1][k] for k in same)}
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure = draw([latest[name] for name in names if name in latest], args.minutes)
    figure.savefig(args.figure, dpi=120, format="png")


if __name__ == "__main__":
    run(main)
