"""What each ingredient brings: a network with one change, trained for a few epochs.

    python benchmarks/ablation.py cnn --data-dir data/cifar10-jpeg --epochs 3
    python benchmarks/ablation.py vit --data-dir data/cifar10-jpeg --variants plain recipe

Every run has the same data, split, seed and number of epochs. Prints validation accuracy and
training seconds of each variant and appends them to benchmarks/results/ablation.jsonl. The test
split is not used. `plain` is what the ingredients are added to, `recipe` what the script trains.
The other variants are in VARIANTS, and what they change is in ingredients.py.
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from common import (
    DEVICE,
    SCRIPTS,
    adamw,
    add_folder_flag,
    add_results_flag,
    append,
    new_model,
    recipe_settings,
    train_for,
)
from ingredients import (
    alternating_flip,
    gelu,
    layer_scale,
    mimetic,
    qk_norm,
    relu,
    silu,
    squeeze_excitation,
    whitened_start,
    whitened_stem,
    zero_last_norm,
)
from torch import nn

import models
from batches import DistillationBatches
from checkpoint import load_model
from cli import Parser, UserError, command, integer, path_type, quoted, run
from data import load_data
from prepare import make_batches


@dataclasses.dataclass
class Variant:
    """The recipe with changes."""

    changes: tuple = ()  # functions of the network and its training batches, called in order
    settings: dict = dataclasses.field(default_factory=dict)  # instead of the recipe's
    optimizer: Callable | None = None  # instead of the script's `make_optimizer`
    teacher: bool = False  # half of the labels are the teacher's probabilities


def sgd(model, settings):
    """SGD for the whole CNN. The rate of the norms' biases is `norm_bias_lr` times as high."""
    weights, biases, others = [], [], []
    for name, p in model.named_parameters():
        group = weights if p.ndim >= 2 else biases if re.search("norm.*bias", name) else others
        group.append(p)
    groups = [
        {"params": weights, "weight_decay": 5e-4},
        {"params": biases, "lr": settings.lr * getattr(settings, "norm_bias_lr", 1.0)},
        {"params": others},
    ]
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, fused=True)


def with_sgd(*changes, **settings) -> Variant:
    """The CNN trained by SGD. It has ReLU if no other change is given."""
    return Variant(changes or (relu,), {"lr": 0.15, "erase": 0, "shift": 2} | settings, sgd)


def recipe_cnn(**settings) -> Variant:
    """The CNN as its script trains it, with other settings."""
    return Variant((whitened_stem,), settings)


def plain_vit(*changes, teacher: bool = False) -> Variant:
    """The ViT with all of its parameters trained by AdamW."""

    def optimizer(model, settings):
        return adamw(model, settings.lr, settings.weight_decay)

    return Variant(changes, {"patch_dropout": 0.0}, optimizer, teacher)


def muon_vit(lr: float, *changes) -> Variant:
    """The ViT with all patches, Muon's learning rate `lr`, AdamW for the rest."""
    return Variant(changes, {"patch_dropout": 0.0, "muon_lr": lr})


VARIANTS = {
    "cnn": {
        "plain": with_sgd(),
        "gelu": with_sgd(gelu),
        "silu": with_sgd(silu),
        "whitened-start": with_sgd(relu, whitened_start),
        "whitened-stem": with_sgd(relu, whitened_stem),
        "norm-bias-lr-16": with_sgd(norm_bias_lr=16.0),
        "zero-last-norm": with_sgd(relu, zero_last_norm),
        "squeeze-excitation": with_sgd(relu, squeeze_excitation),
        "alternating-flip": with_sgd(relu, alternating_flip),
        "label-smoothing-.2": with_sgd(label_smoothing=0.2),
        "lr-.3": with_sgd(lr=0.3),
        "batch-64": with_sgd(batch_size=64, lr=0.1),
        "gelu, norm-bias-lr-16": with_sgd(gelu, norm_bias_lr=16.0),
        "gelu, norm-bias-lr-16, whitened-stem": with_sgd(whitened_stem, norm_bias_lr=16.0),
        "recipe": recipe_cnn(),
        "recipe, muon-.03": recipe_cnn(muon_lr=0.03),
        "recipe, muon-.05": recipe_cnn(muon_lr=0.05),
        "recipe, no erasing": recipe_cnn(erase=0),
        "recipe, no average": recipe_cnn(ema_decay=0.0),
        "recipe, mix": recipe_cnn(mix=0.5),
        "recipe, trivial-augment": recipe_cnn(trivial_augment=1.0),
    },
    "vit": {
        "plain": plain_vit(),
        "mimetic": plain_vit(mimetic),
        "qk-norm": plain_vit(qk_norm),
        "layer-scale": plain_vit(layer_scale),
        "teacher": plain_vit(teacher=True),
        "muon-.01": muon_vit(0.01),
        "muon-.02": muon_vit(0.02),
        "muon-.02, mimetic": muon_vit(0.02, mimetic),
        "muon-.04, mimetic": muon_vit(0.04, mimetic),
        "recipe": Variant(),
    },
}


def load_teacher(path: Path, classes: list[str]) -> nn.Module:
    """The network of a checkpoint with these classes."""
    teacher, checkpoint = load_model(path, DEVICE)
    if checkpoint["classes"] != classes:
        raise UserError(f"--teacher {path}: its classes are not those of --data-dir")
    return teacher


def train_variant(name: str, variant: Variant, args, data) -> dict:
    """Train one variant; return its accuracies, time and size."""
    changes = {"epochs": args.epochs, "seed": args.seed, "limit_batches": args.limit_batches}
    changes |= {"classes": len(data.classes)} | variant.settings
    settings = recipe_settings(name, **changes)
    batches, val_batches = make_batches(data, settings, DEVICE)
    model = new_model(name, settings)
    with mock.patch.object(models, "F", F):  # restored at the end: `relu` replaces it
        for change in variant.changes:
            change(model, batches)
        if variant.teacher:
            batches = DistillationBatches(batches, load_teacher(args.teacher, data.classes))
        make_optimizer = variant.optimizer or SCRIPTS[name].make_optimizer
        optimizer = make_optimizer(model, settings)
        history = train_for(model, optimizer, batches, val_batches, **vars(settings))
    return {
        "val_accuracy": [round(row["val_accuracy"], 4) for row in history],
        "train_accuracy": round(history[-1]["train_accuracy"], 4),
        "seconds": round(history[-1]["seconds"], 1),
        "parameters": models.count_parameters(model),
    }


@command
def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("network", choices=SCRIPTS, help="which recipe")
    add("--variants", nargs="+", metavar="NAME", help="which variants (default: all)")
    add("--epochs", type=integer(1), default=3, metavar="N", help="epochs of each run")
    add("--seed", type=integer(0, 2**63 - 1), default=0, metavar="N", help="seed of each run")
    add_folder_flag(parser)
    add("--teacher", type=path_type, default=Path("pretrained/cnn.pt"), metavar="FILE",
        help="checkpoint for the variants with a teacher")  # fmt: skip
    add("--threads", type=integer(1, 1024), metavar="N", help="CPU threads (default: all)")
    add("--limit-batches", type=integer(1), metavar="N", help="at most N per epoch")
    add_results_flag(parser, "ablation.jsonl")
    args = parser.parse_args(argv)
    variants = VARIANTS[args.network]
    unknown = set(args.variants or ()) - set(variants)
    if unknown:
        raise UserError(f"--variants: unknown: {quoted(unknown)}; use {', '.join(variants)}")
    if args.threads:
        torch.set_num_threads(args.threads)
    data, rows = load_data("folder", args.data_dir), {}
    for name in args.variants or variants:
        print(f"== {name}", flush=True)
        rows[name] = train_variant(args.network, variants[name], args, data)
        steps = {"epochs": args.epochs, "limit_batches": args.limit_batches, "seed": args.seed}
        append(args.results, {"network": args.network, "variant": name} | steps | rows[name])
    print(f"\n{'variant':38}{'val accuracy':>14}{'seconds':>10}")
    for name, row in rows.items():
        print(f"{name:38}{row['val_accuracy'][-1]:14.2%}{row['seconds']:10.1f}")


if __name__ == "__main__":
    run(main)
