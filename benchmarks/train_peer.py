"""Train a published recipe for one of our budgets in our loop, to compare with ours.

    python benchmarks/train_peer.py separable --data-dir data/cifar10-jpeg --epochs 60
    python benchmarks/train_peer.py vit --data-dir data/cifar10-jpeg --epochs 60

`separable` (pierandom/separable-resnet): SGD .1 with momentum .9, batch 64, label smoothing .1,
clipping at 1, flip, TrivialAugmentWide, erasing; 15 epochs at the full rate, then cosines of 15,
30, 60, ... epochs. `vit` (Gani et al. 2022, arXiv 2210.07240, supervised part): 192 wide, 9 deep,
12 heads, MLP ×2, AdamW 1e-3, weight decay .05, stochastic depth .1, label smoothing .1, automatic
augmentation, CutMix and MixUp, erasing; its repeated augmentation is left out, so that an epoch
shows each image once, as ours does. Both keep the last weights: neither averages them.
"""

import itertools
import json
import math
import time
from pathlib import Path

import torch
from common import DEVICE, adamw, train_for
from peers import SeparableResNet
from sklearn.metrics import accuracy_score
from torch import nn

import training
from batches import Batches
from cli import Parser, command, run
from data import load_data
from evaluate import predict
from models import ViT, count_parameters

RANDOM = {"flip": True, "auto_augment": True, "erase": 12}


def cosine_restarts(step: int, total_steps: int, warmup: float, peak: float, epochs: int) -> float:
    """15 epochs at the peak, then cosines to 0, each twice as long as the one before."""
    epoch, period = step * epochs / total_steps - 15, 15
    if epoch < 0:
        return peak
    while epoch >= period:
        epoch, period = epoch - period, 2 * period
    return peak * (1 + math.cos(math.pi * epoch / period)) / 2


def cosine(step: int, total_steps: int, warmup: float, peak: float) -> float:
    """Five percent up, then half a cosine down to 0."""
    up = 0.05 * total_steps
    if step < up:
        return peak * (step + 1) / up
    return peak * (1 + math.cos(math.pi * (step - up) / (total_steps - up))) / 2


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("peer", choices=("separable", "vit"))
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR",
                        help="folder of images, such as data/cifar10-jpeg")  # fmt: skip
    parser.add_argument(
        "--epochs", type=int, default=60, metavar="N", help="passes over the images"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed")
    parser.add_argument("--limit-batches", type=int, metavar="N", help="at most N an epoch")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file for the result")
    args = parser.parse_args(argv)
    data = load_data("folder", args.data_dir)
    torch.manual_seed(args.seed)
    settings = {"epochs": args.epochs, "seed": args.seed, "limit_batches": args.limit_batches}
    settings |= {"label_smoothing": 0.1, "clip": 1.0, "ema_decay": 0.0}
    if args.peer == "separable":
        model, settings["lr"], size, mixed = SeparableResNet(), 0.1, 64, 0.0
        training.lr_at = lambda *step: cosine_restarts(*step, epochs=args.epochs)
    else:
        model = ViT(depth=9, heads=12, drop_path=0.1)
        for module in model.modules():  # timm's start, with positions that are noise
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.trunc_normal_(model.positions, std=0.02)
        settings["lr"], size, mixed = 1e-3, 128, 1.0
        training.lr_at = cosine
    model = model.to(DEVICE, memory_format=torch.channels_last)
    if args.peer == "separable":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = adamw(model, 1e-3, 0.05)
    common = {"mean": data.mean, "std": data.std, "device": DEVICE}
    batches = Batches(data.train, size, train=True, mix=mixed, **RANDOM, **common)
    started, finished = time.perf_counter(), False
    try:
        train_for(model, optimizer, batches, Batches(data.val, 500, **common), settings)
        finished = True
    except SystemExit:  # told to stop: what it has reached is measured
        pass
    seconds = time.perf_counter() - started
    model.eval()
    accuracies = []
    for split in (data.val, data.test):
        with torch.no_grad():
            few = itertools.islice(Batches(split, 500, **common), args.limit_batches)
            logits, labels = predict(model, few)
        accuracies.append(accuracy_score(labels, logits.argmax(1)))
    result = {
        "peer": args.peer,
        "seed": args.seed,
        "epochs": args.epochs,
        "parameters": count_parameters(model),
        "finished": finished,
        "val_accuracy": accuracies[0],
        "test_accuracy": accuracies[1],
        "seconds": round(seconds, 1),
    }
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    run(main)
