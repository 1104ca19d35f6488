"""What the benchmarks share: flags, the recipes' networks, training, timing, files of results."""

import argparse
import copy
import dataclasses
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import models
import train_cnn
import train_vit
import training
from checkpoint import make_metadata
from cli import UserError, path_type, writing
from optimizers import parameter_groups
from stopping import Stopped

SCRIPTS = {"cnn": train_cnn, "vit": train_vit}
RESULTS = Path(__file__).resolve().parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# ---------------------------------------------------------------- flags


def add_folder_flag(parser) -> None:
    """Add --data-dir, a folder of images."""
    parser.add_argument("--data-dir", type=path_type, required=True, metavar="DIR",
                        help="folder of images, such as data/cifar10-jpeg")  # fmt: skip


def add_results_flag(parser, name: str) -> None:
    """Add --results, a file in benchmarks/results unless another is given."""
    parser.add_argument("--results", type=_writable, default=str(RESULTS / name), metavar="FILE",
                        help="JSONL file that gets the results")  # fmt: skip


def _writable(name: str) -> Path:
    """A file that can be appended to: that is checked before hours of work."""
    path = path_type(name)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    return path


# ---------------------------------------------------------------- training


def recipe_settings(name: str, **changes) -> argparse.Namespace:
    """The settings of a script's recipe, updated with `changes`, and the number of classes."""
    common = {"classes": 10, "recipe": "fast", "seed": 0, "amp": "auto", "limit_batches": None}
    common["balance"] = False
    return argparse.Namespace(**SCRIPTS[name].RECIPE | common | changes)


def new_model(name: str, settings: argparse.Namespace) -> torch.nn.Module:
    """The recipe's network, on the device."""
    torch.manual_seed(settings.seed)
    model = models.build_model(name, models.model_arguments(name, vars(settings)))
    return model.to(DEVICE, memory_format=torch.channels_last)


def new_training(name: str, settings: argparse.Namespace, images: torch.Tensor):
    """The recipe's network and optimizer. The CNN's stem is whitened with `images`."""
    model = new_model(name, settings)
    if name == "cnn":
        train_cnn.whiten(model, images)
    return model, SCRIPTS[name].make_optimizer(model, settings)


def adamw(model, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW for all parameters of a network."""
    groups = parameter_groups(model.named_parameters(), weight_decay)
    return torch.optim.AdamW(groups, lr, fused=True)


def train_for(model, optimizer, train_batches, val_batches, *, classes, lr_at=None, **settings):
    """Run `training.train` without keeping its files; return the history.

    Args:
        model: any network. It is registered as "benchmark" for the duration of the training.
        optimizer: as for `train`.
        train_batches: as for `train`.
        val_batches: as for `train`.
        classes: number of classes.
        lr_at: a schedule to use instead of `training.lr_at`, with the same arguments.
        **settings: those of `TrainingSettings`; others are ignored.
    """
    if not len(train_batches):
        raise UserError("--data-dir: the training split has fewer images than a batch")
    network, settings = models.unwrap(model), {"amp": "auto"} | settings
    fields = [field.name for field in dataclasses.fields(training.TrainingSettings)]
    metadata = make_metadata(
        "benchmark", {"classes": classes}, classes=[str(i) for i in range(classes)],
        mean=[0.0] * 3, std=[1.0] * 3, settings={"epochs": settings.get("epochs", 1)},
    )  # fmt: skip
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(models.MODELS, benchmark=lambda classes: copy.deepcopy(network).cpu()),
        mock.patch.object(training, "lr_at", lr_at or training.lr_at),
    ):
        chosen = {key: settings[key] for key in fields if key in settings} | {"out_dir": folder}
        loop_settings = training.TrainingSettings(**chosen)
        try:
            last = training.train(
                model, optimizer, train_batches, val_batches, loop_settings, metadata
            )
        except Stopped as stop:  # by a signal; nothing is kept that could be resumed
            sys.exit(128 + stop.number)
    return last["history"]


# ---------------------------------------------------------------- timing and results


def in_turn(measurements: dict, rounds: int) -> dict[str, list]:
    """Call each function once per round, in turn; return their results, by name.

    The first round warms up: its results are dropped.
    """
    results = {name: [] for name in measurements}
    for i in range(rounds + 1):
        for name, measure in measurements.items():
            result = measure()
            if i > 0:
                results[name].append(result)
    return results


def ratios(values: list[float], others: list[float]) -> list[float]:
    """Each value divided by that of `others` from the same round."""
    return [value / other for value, other in zip(values, others, strict=True)]


def append(file: Path, result: dict) -> None:
    """Append a line to a JSONL file: the result with device, versions and date."""
    result |= {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "date": str(datetime.date.today()),
    }
    with file.open("a") as lines:
        lines.write(json.dumps(result) + "\n")
