"""What both recipes share before and after the loop: flags, out-dir, resuming, data and model."""

import argparse
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision

from batches import Batches, Taught, evaluation_batch_size
from checkpoint import load_checkpoint, load_model, plain
from cli import (
    Parser,
    UserError,
    add_data_flags,
    add_device_flag,
    choose_device,
    make_out_dir,
    number,
    path_type,
)
from data import Data, load_data
from models import build_model, count_parameters
from training import choose_amp


def recipe_parser(manual: str, best: dict, digits: dict) -> Parser:
    """The flags that both scripts share; `parser.set_defaults(...)` in a script gives values."""
    changes = {"--recipe best": best, "--dataset digits": digits}
    lines = [f"{flag} sets {as_flags(new)}" for flag, new in changes.items()]
    lines.append("With both, --dataset digits decides; a flag that you type decides over either.")
    parser = Parser(manual, epilog="\n".join(lines))
    add_data_flags(parser)
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--recipe", choices=("fast", "best"), default="fast",
        help="fast: good accuracy in little time; best: many epochs, more augmentation, "
        "not measured yet")  # fmt: skip
    add("--epochs", type=number(int, 1, 10**6), metavar="N", help="passes over the training images")
    add("--batch-size", type=number(int, 1), metavar="N", help="images per training step")
    add("--lr", type=number(float, 0, above=True), metavar="X",
        help="highest learning rate of AdamW (what Muon does not train)")  # fmt: skip
    add("--muon-lr", type=number(float, 0, 1e30, above=True), metavar="X",
        help="highest learning rate of Muon (hidden matrices and filters)")  # fmt: skip
    add("--warmup", type=number(float, 0, 0.9), metavar="X",
        help="share of the steps, 0 to 0.9, while the rate rises; then it falls")  # fmt: skip
    add("--weight-decay", type=number(float, 0), metavar="X", help="not applied to biases, norms")
    add("--label-smoothing", type=number(float, 0, 0.9), metavar="X",
        help="share of the target that is spread over all classes; 0: off")  # fmt: skip
    add("--clip", type=number(float, 0), metavar="X", help="clip the gradient norm to X; 0: never")
    add("--ema-decay", type=number(float, 0, 0.99999), metavar="X",
        help="decay of the moving average (EMA) of the weights; 0: no average")  # fmt: skip
    add("--flip", action=argparse.BooleanOptionalAction, help="mirror images at random")
    add("--shift", type=number(int, 0, 31), metavar="N", help="move images by up to N pixels")
    add("--erase", type=number(int, 0, 32), metavar="N", help="blank an N×N square; 0: none")
    add("--auto-augment", action=argparse.BooleanOptionalAction,
        help="TrivialAugmentWide, a random operation for each sixteenth of a batch")  # fmt: skip
    add("--mix", type=number(float, 0, 1), metavar="X",
        help="share of the batches mixed by CutMix or MixUp")  # fmt: skip
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, metavar="N",
        help="random seed of weights, order, augmentation; the splits stay the same")  # fmt: skip
    add("--image-size", type=number(int, 32, 128), default=32, metavar="N",
        help="with --dataset folder: side of the images in pixels, 32 to 128")  # fmt: skip
    add("--val-fraction", type=number(float, 0, 0.9), default=0.1, metavar="X",
        help="share of training images for validation; 0: best.pt is the last epoch")  # fmt: skip
    group = parser.add_argument_group("run")
    add = group.add_argument
    add_device_flag(group)
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
        help="automatic mixed precision; auto: on with CUDA, off without")  # fmt: skip
    add("--out-dir", type=path_type, metavar="DIR",
        help="where checkpoints and curves go (default: runs/<dataset>-<model>)")  # fmt: skip
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="go on from last.pt in --out-dir")
    either.add_argument("--overwrite", action="store_true", help="replace the run in --out-dir")
    add("--limit-batches", type=number(int, 1, 2**31), metavar="N",
        help="at most N batches an epoch, to try something out (default: all)")  # fmt: skip
    return parser


def parse_settings(parser: Parser, argv, model_name: str, best: dict, digits: dict):
    """Read the command line; returns (settings, the checkpoint to resume from or None).

    What is typed goes before `digits`, the values for that data set, these before `best`, what
    that recipe changes, and these before the parser's own. With --resume they
    come from the checkpoint, all but where to run and where things lie.

    Raises:
        UserError: an occupied out-dir, nothing to resume, a flag that conflicts with the run.
    """
    defaults = vars(parser.parse_args([]))
    untyped = object()
    namespace = argparse.Namespace(**dict.fromkeys(defaults, untyped))
    typed = {k: v for k, v in vars(parser.parse_args(argv, namespace)).items() if v is not untyped}
    settings = defaults | (best if typed.get("recipe") == "best" else {})
    settings |= (digits if typed.get("dataset") == "digits" else {}) | typed
    if settings["out_dir"] is None:
        suffix = "-best" if settings["recipe"] == "best" else ""
        settings["out_dir"] = Path("runs", f"{settings['dataset']}-{model_name}{suffix}")
    out_dir, resumed = Path(settings["out_dir"]), None

    if settings["resume"]:
        if not (out_dir / "last.pt").is_file():
            cure = "put it back, or start anew (--overwrite)"
            if not list(out_dir.glob("*.pt")):
                cure = "check --out-dir, or leave --resume out"
            raise UserError(f"--resume: there is no file {out_dir / 'last.pt'}: {cure}")
        try:
            resumed = load_checkpoint(out_dir / "last.pt")
        except UserError as error:
            raise UserError(f"--resume: {error}; or start anew (--overwrite)") from None
        if resumed["optimizer"] is None:
            raise UserError(
                f"--resume: {out_dir / 'last.pt'} holds weights only, no training to go on with: "
                "start anew (--overwrite)"
            )
        if resumed["model_name"] != model_name:
            raise UserError(
                f"--resume: {out_dir / 'last.pt'} is a {resumed['model_name']}: go on with "
                f"train_{resumed['model_name']}.py, or give this run another --out-dir"
            )
        saved = resumed["settings"]
        free = {"device", "amp", "data_dir", "out_dir", "resume", "overwrite"}
        for key in sorted(set(typed) - free):
            own = saved.get(key, defaults[key])  # an older run may not know the flag
            if plain(typed[key]) != own:
                flag = "--" + key.replace("_", "-")
                raise UserError(
                    f"{flag} {typed[key]} conflicts with the run in {out_dir}, which has "
                    f"{own}: leave it out, or start anew in another --out-dir"
                )
        if resumed["epoch"] >= saved["epochs"]:
            print(f"{out_dir} is finished: {resumed['epoch']} of {saved['epochs']} epochs are done")
            sys.exit(0)
        if not (out_dir / "best.pt").is_file():
            raise UserError(
                f"--resume: {out_dir / 'best.pt'} is missing: put it back, or start anew "
                "(--overwrite)"
            )
        settings = settings | saved | {k: typed[k] for k in free & set(typed)}
        settings["out_dir"] = out_dir
    else:
        if list(out_dir.glob("*.pt")) and not settings["overwrite"]:
            raise UserError(
                f"{out_dir} holds a run already: go on with it (--resume), replace it "
                "(--overwrite), or choose another --out-dir"
            )
    return argparse.Namespace(**settings), resumed


def prepare(settings, model_name: str, model_settings: list[str], resumed: dict | None):
    """Load the data, build the model, make the out-dir; print in one line what will happen.

    Returns (model, train_batches, val_batches or None, card).

    Raises:
        UserError: no such device, no data, a model that cannot be built, an out-dir that cannot
            be written, or other data than those of the run to resume.
    """
    device = choose_device(settings.device)
    amp_dtype = choose_amp(settings.amp, device)
    out_dir = Path(settings.out_dir)
    if settings.dataset == "folder" and out_dir.resolve() == Path(settings.data_dir).resolve():
        raise UserError(f"--out-dir {out_dir} is the folder of images: choose another")
    make_out_dir(out_dir)
    if settings.image_size != 32 and settings.dataset != "folder":
        raise UserError("--image-size is for --dataset folder alone: leave it out")
    data = load_data(
        settings.dataset,
        settings.data_dir,
        image_size=settings.image_size,
        val_fraction=settings.val_fraction,
    )
    if settings.batch_size > len(data.train):
        raise UserError(
            f"--batch-size {settings.batch_size} is more than the {len(data.train)} training "
            "images: use a smaller one"
        )
    torch.manual_seed(settings.seed)
    model_config = {"classes": len(data.classes), "image_size": settings.image_size}
    model_config |= {key: getattr(settings, key) for key in model_settings}
    try:
        model = build_model(model_name, model_config)
    except ValueError as error:
        message = str(error)  # names the arguments: name the flags
        for key in model_settings:
            message = re.sub(rf"\b{key}\b", "--" + key.replace("_", "-"), message)
        raise UserError(message) from None
    except (RuntimeError, TypeError, OverflowError):  # what PyTorch raises for numbers too large
        sizes = as_flags({key: getattr(settings, key) for key in model_settings})
        raise UserError(f"a network with {sizes} is too large: use smaller numbers") from None
    model = model.to(device, memory_format=torch.channels_last)
    card = describe_run(data, settings, model_name, model_config)
    train_batches, val_batches = make_batches(data, settings, device)
    if getattr(settings, "teacher", None):
        if Path(settings.teacher).resolve().parent == out_dir.resolve():
            raise UserError(
                f"--teacher {settings.teacher} lies in the out-dir, which is written to"
            )
        train_batches = Taught(train_batches, load_teacher(settings.teacher, card, device))
    if resumed:
        same_data(card, resumed)
    choices = {key: getattr(settings, key) for key in [*model_settings, "flip"]}
    print(
        f"{data.name}: {len(data.train):,} training, {len(data.val):,} validation, "
        f"{len(data.test):,} test images; {model_name} of "
        f"{count_parameters(model):,} parameters; {settings.epochs} epochs, batch "
        f"{settings.batch_size}, on {device.type}, "
        f"{str(amp_dtype or torch.float32).removeprefix('torch.')}"
        + (f"; {as_flags(choices)}" if data.name == "digits" else "")
        + (f"; {data.note}" if data.note else "")
    )
    return model, train_batches, val_batches, card


def as_flags(values: dict) -> str:
    """{"patch_size": 8, "flip": False} as "--patch-size 8 --no-flip"."""
    words = []
    for key, value in values.items():
        flag = "--no-" if value is False else "--"
        words.append(flag + key.replace("_", "-"))
        if not isinstance(value, bool):
            words += map(str, value if isinstance(value, list) else [value])
    return " ".join(words)


def alike(one: dict, other: dict, tolerance: float) -> bool:
    """Whether two cards have the same classes and image size, and nearly one mean and std."""
    same = one["classes"] == other["classes"]
    same &= one["dataset"]["image_size"] == other["dataset"]["image_size"]
    statistics = [card["mean"] + card["std"] for card in (one, other)]
    return same and np.allclose(*statistics, rtol=0, atol=tolerance)


def same_data(card: dict, resumed: dict) -> None:
    """Raise UserError if the images are not those that the run to resume was trained on."""
    sizes = [c["dataset"]["sizes"] for c in (card, resumed)]
    files = [c["dataset"].get("files") for c in (card, resumed)]  # an older run knows none
    changed = sizes[0] != sizes[1] or (files[1] is not None and files[0] != files[1])
    if changed or not alike(card, resumed, 1e-4):
        raise UserError(
            "--resume: the images in --data-dir are not those of the run: it had "
            f"{sum(resumed['dataset']['sizes'])} of {len(resumed['classes'])} classes; there are "
            f"{sum(sizes[0])} of {len(card['classes'])}, or others"
        )


def load_teacher(file: Path, card: dict, device: torch.device) -> torch.nn.Module:
    """The model of a checkpoint, to learn from.

    Raises:
        UserError: it cannot be read, or was trained on other images.
    """
    try:
        teacher, checkpoint = load_model(file, device)
    except UserError as error:
        raise UserError(f"--teacher {error}") from None
    if not alike(card, checkpoint, 0.02):
        raise UserError(
            f"--teacher {file}: it was trained on other images, sizes or classes "
            f"({checkpoint['dataset']['name']}, {len(checkpoint['classes'])} classes): take a "
            "checkpoint trained on the same data set"
        )
    return teacher


def make_batches(data: Data, settings, device) -> tuple[Batches, Batches | None]:
    """Augmented training batches and, if there is a validation split, its plain ones."""
    common = {"mean": data.mean, "std": data.std, "device": device}
    train_batches = Batches(
        data.train, settings.batch_size, train=True,
        flip=settings.flip, shift=settings.shift, erase=settings.erase,
        auto_augment=settings.auto_augment, mix=settings.mix, **common,
    )  # fmt: skip
    val_size = evaluation_batch_size(data.val)
    val_batches = Batches(data.val, val_size, **common) if len(data.val) else None
    return train_batches, val_batches


def describe_run(data: Data, settings, model_name: str, model_config: dict) -> dict:
    """The part of a checkpoint that is known before training starts, in plain types."""
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    return plain(
        {
            "model_name": model_name,
            "model_config": model_config,
            "settings": vars(settings),
            "classes": data.classes,
            "mean": data.mean,
            "std": data.std,
            "dataset": {
                "name": data.name,
                "data_dir": settings.data_dir,
                "image_size": settings.image_size,
                "val_fraction": settings.val_fraction,
                "sizes": [len(data.train), len(data.val), len(data.test)],
                "files": data.files,
            },
            "versions": versions,
        }
    )


def finish(state: dict, settings) -> None:
    """Say how it ended, and what to run next."""
    out_dir, best = Path(settings.out_dir), state["best"]
    accuracy = best["val_accuracy"]
    if accuracy is not None:
        print(f"best validation accuracy {accuracy:.2%} after epoch {best['epoch']}")
    print("next:")
    for script in ("evaluate.py", "explain.py"):
        print(f"  python {script} {shlex.quote(str(out_dir / 'best.pt'))}")
    print(f"  tensorboard --logdir {shlex.quote(str(out_dir))}")
