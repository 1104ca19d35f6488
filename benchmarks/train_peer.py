"""Train a published recipe for one of our budgets in our loop, to compare with ours.

    python benchmarks/train_peer.py separable --data-dir data/cifar10-jpeg --epochs 60
    python benchmarks/train_peer.py vit --data-dir data/cifar10-jpeg --epochs 60

`separable` (pierandom/separable-resnet): SGD .1 with momentum .9, batch 64, label smoothing .1,
clipping at 1, flip, TrivialAugmentWide, erasing; 15 epochs at the full rate, then cosines of 15,
30, 60, ... epochs. `vit` (Gani et al. 2022, arXiv 2210.07240, supervised part): 192 wide, 9 deep,
12 heads, MLP ×2, AdamW 1e-3, weight decay .05, stochastic depth .1, label smoothing .1, automatic
augmentation, CutMix and MixUp, erasing. Its repeated augmentation is omitted, so that an epoch
shows each image once, as ours does. Both keep the last weights: neither averages them.
"""

import functools
import itertools
import json
import math
import time

import torch
from common import DEVICE, adamw, add_folder_flag, train_for
from peers import SeparableResNet
from sklearn.metrics import accuracy_score
from torch import nn

from batches import Batches, predict
from cli import Parser, command, integer, path_type, run
from data import load_data
from models import ViT, count_parameters

SETTINGS = {
    "separable": {"lr": 0.1, "batch_size": 64, "mix": 0.0},
    "vit": {"lr": 1e-3, "batch_size": 128, "mix": 1.0},
}
SHARED = {"label_smoothing": 0.1, "clip": 1.0}
AUGMENTATION = {"flip": True, "trivial_augment": 1.0, "erase": 12}


def cosine_restarts(step: int, total_steps: int, warmup: float, peak: float, epochs: int) -> float:
    """15 epochs at the peak, then cosines to 0, each twice as long as the one before."""
    epoch, period = step * epochs / total_steps - 15, 15
    if epoch < 0:
        return peak
    while epoch >= period:
        epoch, period = epoch - period, 2 * period
    return peak * (1 + math.cos(math.pi * epoch / period)) / 2


def cosine(step: int, total_steps: int, warmup: float, peak: float) -> float:
    """Five percent of the steps up to the peak, then half a cosine down to 0."""
    up = 0.05 * total_steps
    if step < up:
        return peak * (step + 1) / up
    return peak * (1 + math.cos(math.pi * (step - up) / (total_steps - up))) / 2


def separable(classes: int, epochs: int):
    """Network, optimizer and schedule of separable-resnet."""
    model = SeparableResNet(classes).to(DEVICE, memory_format=torch.channels_last)
    lr = SETTINGS["separable"]["lr"]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    return model, optimizer, functools.partial(cosine_restarts, epochs=epochs)


def vit(classes: int, epochs: int):
    """Network, optimizer and schedule of Gani et al."""
    model = ViT(classes=classes, depth=9, heads=12, drop_path=0.1)
    for module in model.modules():  # initialised as timm does, with positions that are noise
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
    nn.init.trunc_normal_(model.positions, std=0.02)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    return model, adamw(model, SETTINGS["vit"]["lr"], 0.05), cosine


PEERS = {"separable": separable, "vit": vit}


def train_peer(peer: str, data, args) -> dict:
    """Train, measure on the validation and test splits, and return the result."""
    torch.manual_seed(args.seed)
    settings, classes = SETTINGS[peer], len(data.classes)
    model, optimizer, lr_at = PEERS[peer](classes, args.epochs)
    common = {"mean": data.mean, "std": data.std, "device": DEVICE}
    augmentation = AUGMENTATION | {"mix": settings["mix"], "classes": classes}
    batches = Batches(data.train, settings["batch_size"], train=True, **augmentation, **common)
    val_batches, test_batches = (Batches(split, 500, **common) for split in (data.val, data.test))
    changes = {"epochs": args.epochs, "seed": args.seed, "limit_batches": args.limit_batches}
    changes |= {"classes": classes, "lr_at": lr_at}
    started, finished = time.perf_counter(), False
    try:
        train_for(model, optimizer, batches, val_batches, **SHARED, **changes)
        finished = True
    except SystemExit:  # SIGTERM: the weights reached by then are measured
        pass
    seconds = time.perf_counter() - started
    model.eval()
    accuracies = []
    for split_batches in (val_batches, test_batches):
        logits, labels = predict(model, itertools.islice(split_batches, args.limit_batches))
        accuracies.append(accuracy_score(labels, logits.argmax(1)))
    return {
        "peer": peer,
        "seed": args.seed,
        "epochs": args.epochs,
        "parameters": count_parameters(model),
        "finished": finished,
        "val_accuracy": accuracies[0],
        "test_accuracy": accuracies[1],
        "seconds": round(seconds, 1),
    }


@command
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("peer", choices=PEERS, help="which recipe")
    add_folder_flag(parser)
    add("--epochs", type=integer(1), default=60, metavar="N", help="passes over the images")
    add("--seed", type=integer(0, 2**63 - 1), default=0, metavar="N", help="random seed")
    add("--limit-batches", type=integer(1), metavar="N", help="at most N per epoch")
    add("--out", type=path_type, metavar="FILE", help="JSON file for the result")
    args = parser.parse_args(argv)
    if args.out and not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}; make it first")
    result = train_peer(args.peer, load_data("folder", args.data_dir), args)
    print(json.dumps(result))
    if args.out:
        args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    run(main)
