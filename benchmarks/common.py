"""What the benchmarks share: a training as the scripts do it, and where results go."""

import argparse
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import train_cnn  # noqa: E402
import train_vit  # noqa: E402
from checkpoint import KEYS  # noqa: E402
from models import build_model  # noqa: E402
from recipe import make_batches  # noqa: E402
from training import parameter_groups, train  # noqa: E402

SCRIPTS = {"cnn": train_cnn, "vit": train_vit}
RESULTS = ROOT / "benchmarks" / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CARD = "model_name model_config settings classes mean std dataset versions".split()


def recipe_settings(name: str, **changes) -> argparse.Namespace:
    """The recipe of a script as its command line would give it, with some settings changed."""
    common = {"seed": 0, "amp": "auto", "limit_batches": None}
    return argparse.Namespace(**SCRIPTS[name].RECIPE | common | changes)


def train_for(model, optimizer, train_batches, val_batches, settings: dict, **changes) -> list:
    """Our loop, with checkpoints and curves that are thrown away; returns the history."""
    common = {"epochs": 1, "seed": 0, "amp": "auto", "limit_batches": None}
    common |= {"lr": 1e-3, "warmup": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        settings = argparse.Namespace(**common | settings | changes, out_dir=folder)
        state = train(
            model, optimizer, train_batches, val_batches,
            settings=settings, card={key: KEYS[key]() for key in CARD},
        )  # fmt: skip
    return state["history"]


def new_model(name: str, settings):
    """The recipe's network, on the device."""
    script = SCRIPTS[name]
    torch.manual_seed(settings.seed)
    model = build_model(name, {key: getattr(settings, key) for key in script.MODEL_SETTINGS})
    return model.to(DEVICE, memory_format=torch.channels_last)


def new_training(name: str, settings, images):
    """The recipe's network, started as its script does with some images, and its optimizer."""
    model = new_model(name, settings)
    if name == "cnn":
        train_cnn.whiten(model, images)
    return model, SCRIPTS[name].make_optimizer(model, settings)


def run_recipe(name: str, data, **changes) -> tuple[float, int]:
    """One epoch of a recipe without validation; seconds and images."""
    settings = recipe_settings(name, epochs=1, **changes)
    batches, _ = make_batches(data, settings, DEVICE)
    model, optimizer = new_training(name, settings, next(iter(batches))[0])
    row = train_for(model, optimizer, batches, None, vars(settings))[0]
    return row["seconds"], row["step"] * settings.batch_size


def adamw(model, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW for all of a network."""
    groups = parameter_groups(model.named_parameters())
    return torch.optim.AdamW(groups, lr, weight_decay=weight_decay, fused=True)


def append(file: Path, result: dict) -> None:
    """Add a line to a file of results, with machine, versions and date."""
    result |= {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "date": str(datetime.date.today()),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(result) + "\n")
