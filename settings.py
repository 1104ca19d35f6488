"""Flags of a training, where their values come from, and the rules of resuming.

A flag that is typed comes first, then what --dataset digits changes, then what --recipe best
changes, then the script's recipe. With --resume the values come from the checkpoint.
"""

import argparse
import sys
from pathlib import Path

from checkpoint import load_checkpoint
from cli import (
    Parser,
    UserError,
    add_data_flags,
    add_device_flag,
    as_flags,
    integer,
    non_negative,
    path_type,
    positive,
    real,
)

CHANGEABLE = {"device", "amp", "compile", "data_dir", "out_dir", "resume", "overwrite"}
"""Flags that may differ when a training is resumed: how and where it runs."""


def training_parser(manual: str, recipe: dict, best: dict, digits: dict) -> Parser:
    """The flags that all training scripts share, with the recipe's values as defaults."""
    changes = {"--recipe best": best, "--dataset digits": digits}
    lines = [f"{flag} sets {as_flags(new)}" for flag, new in changes.items()]
    lines.append("With both, --dataset digits decides. A flag that you type decides over either.")
    parser = Parser(manual, epilog="\n".join(lines))
    add_data_flags(parser)
    _add_split_flags(parser.add_argument_group("images and splits").add_argument)
    _add_training_flags(parser.add_argument_group("training").add_argument)
    _add_augmentation_flags(parser.add_argument_group("augmentation").add_argument)
    _add_run_flags(parser.add_argument_group("run"))
    parser.set_defaults(**recipe)
    return parser


def _add_split_flags(add) -> None:
    add("--image-size", type=integer(32, 128), default=32, metavar="N",
        help="side of a folder's images in pixels, 32 to 128")  # fmt: skip
    add("--val-fraction", type=real(0, 0.9), default=0.1, metavar="X",
        help="fraction of the training images for validation")  # fmt: skip


def _add_training_flags(add) -> None:
    number = {"metavar": "N"}
    fraction = {"metavar": "X"}
    add("--recipe", choices=("fast", "best"), default="fast", help="best: long, for a GPU")
    add("--epochs", type=integer(1, 10**6), **number, help="passes over the training images")
    add("--batch-size", type=integer(1), **number, help="images per step")
    add("--lr", type=positive, **fraction, help="highest learning rate (of AdamW)")
    add("--muon-lr", type=real(1e-30, 1e30), **fraction, help="highest learning rate of Muon")
    add("--warmup", type=real(0, 0.9), **fraction, help="fraction of steps in which it rises")
    add("--weight-decay", type=non_negative, **fraction, help="not for norms and biases")
    add("--label-smoothing", type=real(0, 0.9), **fraction, help="spread over all classes")
    add("--clip", type=non_negative, **fraction, help="largest gradient norm; 0: no clipping")
    add("--ema-decay", type=real(0, 0.99999), **fraction, help="of averaged weights; 0: none")
    add("--seed", type=integer(0, 2**63 - 1), default=0, **number, help="does not change splits")


def _add_augmentation_flags(add) -> None:
    on_off = argparse.BooleanOptionalAction
    add("--flip", action=on_off, help="mirror half of the images")
    add("--shift", type=integer(0, 31), metavar="N", help="move images by up to N pixels")
    add("--erase", type=integer(0, 32), metavar="N", help="erase a square of side N; 0: none")
    add("--auto-augment", action=on_off, help="TrivialAugmentWide on groups of images")
    add("--mix", type=real(0, 1), metavar="X", help="fraction of batches in CutMix or MixUp")


def _add_run_flags(group) -> None:
    add = group.add_argument
    add_device_flag(group)
    add("--amp", choices=("auto", "off", "bf16", "fp16"), default="auto",
        help="mixed precision; auto: on with CUDA, off without")  # fmt: skip
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--out-dir", type=path_type, metavar="DIR", help="default: runs/<dataset>-<model>")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="resume the run in --out-dir")
    either.add_argument("--overwrite", action="store_true", help="replace the run in --out-dir")
    add("--limit-batches", type=integer(1, 2**31), metavar="N", help="at most N per epoch")


def parse_settings(parser: Parser, argv, model_name: str, best: dict, digits: dict):
    """Read the command line; return (all settings, the checkpoint to resume from or None).

    Raises:
        UserError: an occupied out-dir, nothing to resume, a flag that conflicts with the run.
    """
    defaults = vars(parser.parse_args([]))
    not_typed = object()
    namespace = argparse.Namespace(**dict.fromkeys(defaults, not_typed))
    typed = vars(parser.parse_args(argv, namespace))
    typed = {key: value for key, value in typed.items() if value is not not_typed}
    settings = defaults | (best if typed.get("recipe") == "best" else {})
    settings |= (digits if typed.get("dataset") == "digits" else {}) | typed
    if settings["out_dir"] is None:
        suffix = "-best" if settings["recipe"] == "best" else ""
        settings["out_dir"] = Path("runs", f"{settings['dataset']}-{model_name}{suffix}")
    out_dir = settings["out_dir"]
    if not settings["resume"]:
        if list(out_dir.glob("*.pt")) and not settings["overwrite"]:
            raise UserError(
                f"{out_dir} holds a run already: resume it (--resume), replace it (--overwrite), "
                "or choose another --out-dir"
            )
        return argparse.Namespace(**settings), None
    checkpoint = load_run(out_dir, model_name)
    refuse_conflicts(typed, checkpoint["settings"], defaults, out_dir)
    if checkpoint["epoch"] >= checkpoint["settings"]["epochs"]:
        print(f"{out_dir} is finished: all of its {checkpoint['epoch']} epochs are done")
        sys.exit(0)
    changed = {key: typed[key] for key in CHANGEABLE & set(typed)}
    settings |= checkpoint["settings"] | changed | {"out_dir": out_dir, "resume": True}
    return argparse.Namespace(**settings), checkpoint


def load_run(out_dir: Path, model_name: str) -> dict:
    """The content of out_dir/last.pt, a training of `model_name` that can be resumed.

    Raises:
        UserError: a file of the run is missing or damaged, or it is another network's.
    """
    path = out_dir / "last.pt"
    for file in (path, out_dir / "best.pt"):
        if not file.is_file():
            advice = "put it back, or start again (--overwrite)"
            if not list(out_dir.glob("*.pt")):
                advice = "check --out-dir, or omit --resume"
            raise UserError(f"--resume: {file} is missing: {advice}")
    try:
        checkpoint = load_checkpoint(path)
    except UserError as error:
        raise UserError(f"--resume: {error}; or start again (--overwrite)") from None
    if checkpoint["optimizer"] is None:
        raise UserError(
            f"--resume: {path} holds weights only, not a training: start again (--overwrite)"
        )
    if checkpoint["model_name"] != model_name:
        raise UserError(
            f"--resume: {path} is a {checkpoint['model_name']}: resume it with "
            f"train_{checkpoint['model_name']}.py, or choose another --out-dir"
        )
    return checkpoint


def refuse_conflicts(typed: dict, saved: dict, defaults: dict, out_dir: Path) -> None:
    """Raise UserError if a typed flag differs from that of the run to resume."""
    for key in sorted(set(typed) - CHANGEABLE):
        own = saved.get(key, defaults[key])  # an older run may not have the flag
        value = str(typed[key]) if isinstance(typed[key], Path) else typed[key]
        if value != own:
            raise UserError(
                f"--{key.replace('_', '-')} {value} conflicts with the run in {out_dir}, which has "
                f"{own}: omit it, or start again in another --out-dir"
            )
