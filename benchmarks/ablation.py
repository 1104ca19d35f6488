"""What each ingredient brings: a network with one thing added, trained for a few epochs.

    python benchmarks/ablation.py cnn --data-dir data/cifar10-jpeg --epochs 3
    python benchmarks/ablation.py vit --data-dir data/cifar10-jpeg --variants plain recipe

Every run has the same data, split, seed and number of epochs. Prints validation accuracy and
training seconds of each variant and appends them to benchmarks/results/ablation.jsonl. The test
split is not looked at. `plain` is what the ingredients are added to, `recipe` what the script
trains; the functions below say what each of the others changes.
"""

import itertools
import re
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    DEVICE,
    RESULTS,
    SCRIPTS,
    adamw,
    append,
    new_model,
    recipe_settings,
    train_for,
)
from torch import nn

import models
import train_cnn
from batches import Batches, Taught
from checkpoint import load_model
from cli import Parser, UserError, command
from data import load_data
from recipe import make_batches

# ---------------------------------------------------------------- networks: model, batches -> None


def activation(function):
    """The CNN's activation: `models.F.gelu` is looked up at each call."""

    def change(model, batches):
        models.F = types.SimpleNamespace(**vars(F) | {"gelu": function})

    return change


relu, silu = activation(F.relu), activation(F.silu)


def whitened_stem(model, batches):
    train_cnn.whiten(model, next(iter(batches))[0])


def whitened_start(model, batches):
    """The stem starts as the whitening filters, and is trained."""
    whitened_stem(model, batches)
    model.stem.weight.requires_grad_(True)


def zero_last_norm(model, batches):
    """Residual blocks start as the identity (Goyal et al. 2017, sec. 5.1)."""
    for module in model.modules():
        if isinstance(module, models.ResidualBlock):
            nn.init.zeros_(module.norm2.weight)


class SqueezeExcitation(nn.Module):
    """Channels weighted by what is in the whole map (Hu et al. 2018, arXiv 1709.01507)."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // 8)
        self.excite = nn.Linear(channels // 8, channels)

    def forward(self, x):
        weights = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
        return x * weights[:, :, None, None]


def squeeze_excitation(model, batches):
    for module in model.modules():
        if isinstance(module, models.ResidualBlock):
            scale = SqueezeExcitation(module.norm2.num_features).to(DEVICE)
            module.norm2 = nn.Sequential(module.norm2, scale)


def alternating_flip(model, batches):
    """Each image is mirrored in every second epoch, which ones first by chance (airbench)."""
    first = torch.rand(len(batches.split), generator=torch.Generator().manual_seed(0)) < 0.5
    epochs = itertools.count()
    begin, rows_of = Batches.__iter__, batches._on_device

    class Alternating(Batches):
        def __iter__(self):
            self.mirrored = first ^ bool(next(epochs) % 2)
            return begin(self)

        def _on_device(self, rows):
            images, labels = rows_of(rows)
            mirrored = self.mirrored[rows].to(images.device)[:, None, None, None]
            return torch.where(mirrored, images.flip(3), images), labels

    batches.flip, batches.__class__ = False, Alternating


class NormedAttention(models.Attention):
    """Queries and keys normalised per head (QK-norm, Dehghani et al. 2023, arXiv 2302.05442)."""

    def forward(self, x, return_attention: bool = False):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (self.scale[i] * F.layer_norm(t, t.shape[-1:]) for i, t in enumerate((q, k)))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.project(out.transpose(1, 2).reshape(B, N, D))


def qk_norm(model, batches):
    for block in model.blocks:
        attention = block.attention
        attention.__class__ = NormedAttention
        width = attention.project.in_features // attention.heads
        attention.scale = nn.Parameter(torch.ones(2, 1, 1, width, device=DEVICE))


class LayerScale(nn.Module):
    """A learned factor per channel, small at first (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x):
        return x * self.scale


def layer_scale(model, batches):
    for block in model.blocks:
        dim = block.attention.project.out_features
        for parent, name in ((block.attention, "project"), (block, "mlp")):
            scaled = nn.Sequential(getattr(parent, name), LayerScale(dim).to(DEVICE))
            setattr(parent, name, scaled)


@torch.no_grad()
def mimetic(model, batches):
    """Attention starts as if trained: q^T k near .7 I in each head, project after v near -.4 I.

    Trockman and Kolter 2023 (arXiv 2305.09828), sec. 3.
    """

    def factors(n, scale):  # of scale (I + noise), with singular values split
        noise = torch.randn(n, dim, dim, device=DEVICE) / dim**0.5
        u, s, vt = torch.linalg.svd(scale * (torch.eye(dim, device=DEVICE) + noise))
        return u * s.sqrt()[:, None], s.sqrt()[:, :, None] * vt

    for block in model.blocks:
        attention = block.attention
        dim, heads = attention.project.in_features, attention.heads
        q, k, v = attention.qkv.weight.view(3, heads, dim // heads, dim)
        left, right = factors(heads, 0.7)
        q.copy_(left.mT[:, : dim // heads])
        k.copy_(right[:, : dim // heads])
        left, right = factors(1, -0.4)
        attention.project.weight.copy_(left[0])
        v.copy_(right.view_as(v))


# ---------------------------------------------------------------- what is compared


def sgd(model, settings):
    """One optimizer for all of the CNN; the norms' biases learn `norm_bias_lr` times as fast."""
    weights, biases, others = [], [], []
    for name, p in model.named_parameters():
        group = weights if p.ndim >= 2 else biases if re.search("norm.*bias", name) else others
        group.append(p)
    scale = getattr(settings, "norm_bias_lr", 1.0)
    groups = [
        {"params": weights, "weight_decay": 5e-4},
        {"params": biases, "lr_scale": scale},
        {"params": others},
    ]
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, fused=True)


def with_sgd(*changes, **settings) -> dict:
    """The CNN trained by SGD, with changes of the network or batches, and settings."""
    settings = {"lr": 0.15, "erase": 0} | settings
    return {"model": changes or [relu], "settings": settings, "optimizer": sgd}


def recipe_cnn(**settings) -> dict:
    """The CNN as its script trains it, but for some settings."""
    return {"model": [whitened_stem], "settings": settings}


def plain_vit(*changes, **settings) -> dict:
    """The ViT with all of its parameters trained by AdamW, and the changes."""
    return {
        "model": changes,
        "settings": settings,
        "optimizer": lambda model, settings: adamw(model, settings.lr, settings.weight_decay),
    }


VARIANTS = {
    "cnn": {
        "plain": with_sgd(),
        "gelu": with_sgd(activation(F.gelu)),
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
        "gelu, norm-bias-lr-16": with_sgd(activation(F.gelu), norm_bias_lr=16.0),
        "gelu, norm-bias-lr-16, whitened-stem": with_sgd(whitened_stem, norm_bias_lr=16.0),
        "recipe": recipe_cnn(),
        "recipe, muon-.03": recipe_cnn(muon_lr=0.03),
        "recipe, muon-.05": recipe_cnn(muon_lr=0.05),
        "recipe, no erasing": recipe_cnn(erase=0),
        "recipe, no average": recipe_cnn(ema_decay=0.0),
        "recipe, mix": recipe_cnn(mix=0.5),
        "recipe, auto-augment": recipe_cnn(auto_augment=True),
    },
    "vit": {
        "plain": plain_vit(),
        "mimetic": plain_vit(mimetic),
        "qk-norm": plain_vit(qk_norm),
        "layer-scale": plain_vit(layer_scale),
        "teacher": plain_vit() | {"taught": True},
        "muon-.01": {"settings": {"muon_lr": 0.01}},
        "recipe": {},
        "recipe, mimetic": {"model": [mimetic]},
        "recipe, mimetic, muon-.04": {"model": [mimetic], "settings": {"muon_lr": 0.04}},
    },
}


def run(name: str, variant: dict, args, data) -> dict:
    """Train one variant; returns what is worth keeping of it."""
    changes = {"epochs": args.epochs, "seed": args.seed, "limit_batches": args.limit_batches}
    settings = recipe_settings(name, **changes | variant.get("settings", {}))
    batches, val_batches = make_batches(data, settings, DEVICE)
    model = new_model(name, settings)
    models.F = F
    for change in variant.get("model", ()):
        change(model, batches)
    if variant.get("taught"):
        batches = Taught(batches, load_model(args.teacher, DEVICE)[0])
    optimizer = variant.get("optimizer", SCRIPTS[name].make_optimizer)(model, settings)
    history = train_for(model, optimizer, batches, val_batches, vars(settings))
    models.F = F
    return {
        "val_accuracy": [round(row["val_accuracy"], 4) for row in history],
        "train_accuracy": round(history[-1]["train_accuracy"], 4),
        "seconds": round(history[-1]["seconds"], 1),
        "parameters": models.count_parameters(model),
    }


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("network", choices=SCRIPTS)
    parser.add_argument("--variants", nargs="+", metavar="NAME",
                        help="names of VARIANTS in this file (default: all)")  # fmt: skip
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="of each run")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of each run")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR",
                        help="folder of images, such as data/cifar10-jpeg")  # fmt: skip
    parser.add_argument("--teacher", type=Path, default=Path("pretrained/cnn.pt"), metavar="FILE",
                        help="checkpoint for the variants with a teacher")  # fmt: skip
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: all)")
    parser.add_argument("--limit-batches", type=int, metavar="N", help="at most N an epoch")
    parser.add_argument("--results", type=Path, default=RESULTS / "ablation.jsonl", metavar="FILE",
                        help="where the rows are appended")  # fmt: skip
    args = parser.parse_args(argv)
    unknown = set(args.variants or ()) - set(VARIANTS[args.network])
    if unknown:
        names = ", ".join(VARIANTS[args.network])
        raise UserError(f"--variants {unknown.pop()!r} is none of: {names}")
    if args.threads:
        torch.set_num_threads(args.threads)
    data, rows = load_data("folder", args.data_dir), []
    for name in args.variants or VARIANTS[args.network]:
        print(f"== {name}", flush=True)
        result = run(args.network, VARIANTS[args.network][name], args, data)
        rows.append((name, result))
        steps = {"epochs": args.epochs, "limit_batches": args.limit_batches, "seed": args.seed}
        append(args.results, {"network": args.network, "variant": name} | steps | result)
    print(f"\n{'variant':38}{'val accuracy':>14}{'seconds':>10}")
    for name, result in rows:
        print(f"{name:38}{result['val_accuracy'][-1]:14.2%}{result['seconds']:10.1f}")


if __name__ == "__main__":
    main()
