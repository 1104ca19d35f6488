"""What each ingredient brings: the recipe with one thing changed, trained for a few epochs.

    python benchmarks/ablation.py cnn --epochs 3 --data-dir data/cifar10-jpeg --variants recipe gelu

Every run has the same data, split, seed and number of epochs, so the same number of steps.
Prints validation accuracy and training seconds of each variant, beside the recipe's own, and
appends them to benchmarks/results/ablation.jsonl. The test split is not looked at.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import models  # noqa: E402
import train_cnn  # noqa: E402
from batches import Batches  # noqa: E402
from data import load_data  # noqa: E402
from recipe import make_batches  # noqa: E402
from training import parameter_groups, train  # noqa: E402

# ---------------------------------------------------------------- CNN


def replace_relu(activation):
    """The CNN with another activation: `models.F.relu` is looked up at each call."""

    def change(model, settings):
        class Functional:
            relu = staticmethod(activation)
            max_pool2d = staticmethod(F.max_pool2d)

        models.F = Functional
        return model

    return change


def principal_patches(images, size: int, count: int):
    """The first `count` principal directions of `size`×`size` patches, (count, 3, size, size)."""
    patches = F.unfold(images.contiguous(), size).transpose(1, 2).reshape(-1, 3 * size * size)
    covariance = patches.T @ patches / len(patches)
    directions = torch.linalg.eigh(covariance)[1].flip(1)[:, :count]
    return directions.T.reshape(count, 3, size, size)


def pca_stem(model, settings):
    """Start the stem as the patches' principal directions, each with both signs."""
    images, _ = next(iter(settings.batches))
    half = principal_patches(images, 3, settings.stem // 2)
    model.stem.weight.data = torch.cat([half, -half]).to(memory_format=torch.channels_last)
    return model


def frozen_pca_stem(model, settings):
    """The same, and not trained (airbench's whitening layer, with batch norm for its scale)."""
    pca_stem(model, settings).stem.weight.requires_grad_(False)
    return model


def zero_last_norm(model, settings):
    """Residual blocks start as the identity (Goyal et al. 2017, sec. 5.1)."""
    for module in model.modules():
        if isinstance(module, models.ResidualBlock):
            nn.init.zeros_(module.norm2.weight)
    return model


def dirac(model, settings):
    """Convolutions start as the identity on their first input channels (airbench)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name != "stem":
            nn.init.dirac_(module.weight[: module.in_channels].data)
    return model


class SqueezeExcitation(nn.Module):
    """Channels weighted by what is in the whole map (Hu et al. 2018, arXiv 1709.01507)."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // 8)
        self.excite = nn.Linear(channels // 8, channels)

    def forward(self, x):
        weights = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
        return x * weights[:, :, None, None]


def squeeze_excitation(model, settings):
    for module in model.modules():
        if isinstance(module, models.ResidualBlock):
            module.norm2 = nn.Sequential(module.norm2, SqueezeExcitation(module.norm2.num_features))
    return model


class SeparableBlock(nn.Module):
    """Pre-activation, depthwise 5×5, pointwise (separable-resnet's V2, written from its text)."""

    def __init__(self, ins: int, outs: int, stride: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(ins)
        self.depthwise = nn.Conv2d(ins, ins, 5, stride, 2, groups=ins, bias=False)
        self.norm2 = nn.BatchNorm2d(ins)
        self.pointwise = nn.Conv2d(ins, outs, 1, bias=False)
        self.shortcut = stride == 1 and ins == outs

    def forward(self, x):
        y = self.pointwise(self.norm2(self.depthwise(F.gelu(self.norm(x)))))
        return x + y if self.shortcut else y


def separable(model, settings):
    """Depthwise-separable pre-activation net at the budget: 64, 128, 256 wide, 9, 6, 2 deep."""
    layers, ins = [nn.Conv2d(3, 64, 3, padding=1, bias=False)], 64
    for stage, (width, depth) in enumerate([(64, 9), (128, 6), (256, 2)]):
        for block in range(depth):
            layers.append(SeparableBlock(ins, width, 2 if stage and not block else 1))
            ins = width
    layers += [nn.BatchNorm2d(ins), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(ins, 10))


class AlternatingFlip(Batches):
    """Each image is mirrored in every second epoch, which ones first by chance (airbench)."""

    epoch = 0

    def __iter__(self):
        first = torch.rand(len(self.split), generator=torch.Generator().manual_seed(0)) < 0.5
        flipped = first ^ bool(self.epoch % 2)
        self.epoch += 1
        rows = self.split.rows
        del rows
        self._flipped = flipped
        yield from super().__iter__()

    def _on_device(self, rows):
        images, labels = super()._on_device(rows)
        mirrored = self._flipped[rows].to(images.device)[:, None, None, None]
        return torch.where(mirrored, images.flip(3), images), labels


def faster_biases(factor):
    """Norms' biases learn `factor` times faster (airbench)."""

    def make_optimizer(model, settings):
        groups = parameter_groups(model, settings.weight_decay)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        biases = {id(m.bias) for m in norms}
        fast = [p for p in groups[1]["params"] if id(p) in biases]
        groups[1]["params"] = [p for p in groups[1]["params"] if id(p) not in biases]
        groups.append({"params": fast, "weight_decay": 0, "factor": factor})
        optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True)

        def scale(optimizer, args, kwargs):
            for group in optimizer.param_groups:
                group["lr"] *= group.get("factor", 1)

        optimizer.register_step_pre_hook(scale)
        return optimizer

    return make_optimizer


CNN = {
    "recipe": {},
    "gelu": {"model": replace_relu(F.gelu)},
    "silu": {"model": replace_relu(F.silu)},
    "pca-stem": {"model": pca_stem},
    "frozen-pca-stem": {"model": frozen_pca_stem},
    "stem-24-pca": {"model": pca_stem, "settings": {"stem": 24}},
    "zero-last-norm": {"model": zero_last_norm},
    "dirac": {"model": dirac},
    "squeeze-excitation": {"model": squeeze_excitation},
    "separable-5x5": {"model": separable},
    "alternating-flip": {"batches": AlternatingFlip, "settings": {"flip": False}},
    "bias-lr-16": {"optimizer": faster_biases(16)},
    "label-smoothing-0": {"settings": {"label_smoothing": 0.0}},
    "label-smoothing-.2": {"settings": {"label_smoothing": 0.2}},
    "erase-8": {"settings": {"erase": 8}},
    "no-ema": {"settings": {"ema_decay": 0.0}},
    "lr-.08": {"settings": {"lr": 0.08}},
    "lr-.3": {"settings": {"lr": 0.3}},
    "batch-64": {"settings": {"batch_size": 64, "lr": 0.1}},
    "no-shift": {"settings": {"shift": 0}},
}


def run(variant: dict, args, data, script) -> dict:
    """Train one variant; returns what is worth keeping of it."""
    settings = argparse.Namespace(**script.RECIPE, seed=args.seed, amp="auto", limit_batches=None)
    vars(settings).update(variant.get("settings", {}))
    settings.epochs, settings.limit_batches = args.epochs, args.limit_batches
    device = torch.device(args.device)
    settings.batches, val_batches = make_batches(data, settings, device)
    if "batches" in variant:
        settings.batches.__class__ = variant["batches"]
    models.F = F
    torch.manual_seed(args.seed)
    config = {key: getattr(settings, key) for key in script.MODEL_SETTINGS}
    model = models.build_model(script.__name__.removeprefix("train_"), config)
    if "model" in variant:
        model = variant["model"](model, settings)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = variant.get("optimizer", script.make_optimizer)(model, settings)
    batches = vars(settings).pop("batches")
    card = dict.fromkeys(
        "model_name model_config settings classes mean std dataset versions".split()
    )
    with tempfile.TemporaryDirectory() as settings.out_dir:
        state = train(model, optimizer, batches, val_batches, settings=settings, card=card)
    return {
        "val_accuracy": [round(row["val_accuracy"], 4) for row in state["history"]],
        "train_accuracy": round(state["history"][-1]["train_accuracy"], 4),
        "seconds": round(state["history"][-1]["seconds"], 1),
        "parameters": models.count_parameters(model),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=("cnn",))
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--limit-batches", type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/ablation.jsonl")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    data = load_data("folder", args.data_dir)
    for name in args.variants or CNN:
        print(f"== {name}", flush=True)
        result = run(CNN[name], args, data, train_cnn)
        line = {"network": args.network, "variant": name, "epochs": args.epochs, "seed": args.seed}
        line |= result | {"threads": torch.get_num_threads(), "device": args.device}
        print(json.dumps(line), flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
