"""Flags of a training run, where their values come from, and the rules of resuming.

Order of precedence: 1. what is typed, 2. what --dataset digits changes, 3. what --recipe changes,
4. the script's recipe. With --resume the values come from the checkpoint.
"""

import argparse
import contextlib
from pathlib import Path

import torch

import distributed
from checkpoint import load_checkpoint
from cli import (
    Finished,
    Parser,
    UserError,
    add_data_flags,
    add_device_flags,
    integer,
    make_out_dir,
    naming,
    non_negative,
    path_type,
    real,
    writing,
)
from models import network_defaults
from optimizers import fast_bfloat16

# Flags that may differ when a run is resumed: how and where it runs.
CHANGEABLE = {"device", "threads", "amp", "compile", "data_dir", "out_dir", "resume", "overwrite"}
CHANGEABLE |= {"pictures", "run_id"}
OF_THE_RUN = CHANGEABLE - {"amp"}  # not of the recipe; precision is

WITHOUT_WEIGHTS = {"drop_path", "patch_dropout"}  # network flags that may differ with --init

AMP_TYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

NUMERIC_FLAGS = {  # group: rows of flag, type, default, help
    "images and splits": (
        ("--image-size", integer(32, 128), 32, "side of a folder's images in pixels, 32 to 128"),
        ("--val-fraction", real(0, 0.9), 0.1, "fraction of the training images for validation"),
        ("--seed", integer(0, 2**63 - 1), 0, "random seed; the splits stay the same"),
    ),
    "training": (
        ("--epochs", integer(1, 10**6), 10, "passes over the training images"),
        ("--batch-size", integer(1), 128, "images per step"),
        ("--lr", real(1e-30, 1e30), 1e-3, "peak learning rate of AdamW, or of SGD"),
        ("--muon-lr", real(1e-30, 1e30), 0.02, "peak learning rate of Muon (blocks or stages)"),
        ("--warmup", real(0, 0.9), 0.0, "fraction of the steps in which the learning rates rise"),
        ("--weight-decay", real(0, 1e30), 0.0, "weight decay, not of norms and biases"),
        ("--label-smoothing", real(0, 0.9), 0.0, "label smoothing; 0: none"),
        ("--clip", non_negative, 0.0, "largest norm of the gradient; 0: no clipping"),
        ("--ema-decay", real(0, 0.99999), 0.0, "decay of the averaged weights; 0: no average"),
    ),
    "augmentation": (
        ("--shift", integer(0, 31), 0, "move images by up to N pixels"),
        ("--erase", integer(0, 32), 0, "erase a square of side N; 0: none"),
        ("--trivial-augment", real(0, 1), 0.0, "fraction of images for TrivialAugment"),
        ("--mix", real(0, 1), 0.0, "fraction of the batches mixed by CutMix or MixUp"),
    ),
}


def training_parser(manual: str, recipe: dict, changes: dict) -> Parser:
    """The flags that all training scripts share; `recipe` has the defaults that differ from here.

    Args:
        manual: the script's docstring, for --help.
        recipe: defaults by name, those of the network's own flags among them.
        changes: what each other recipe changes, by its name, and what "digits" changes.
    """
    lines = []
    for name, new in changes.items():
        flag = "--dataset digits" if name == "digits" else f"--recipe {name}"
        lines.append(f"{flag} sets {as_flags(new)}")
    lines.append("A later line overrides an earlier one; a flag that you type overrides them all.")
    parser = Parser(manual, epilog="\n".join(lines))
    add_data_flags(parser)
    for title, rows in NUMERIC_FLAGS.items():
        group = parser.add_argument_group(title)
        for flag, kind, default, text in rows:
            letter = "N" if isinstance(default, int) else "X"
            group.add_argument(flag, type=kind, default=default, metavar=letter, help=text)
    group = parser.add_argument_group("augmentation, on or off")
    on_off = {"action": argparse.BooleanOptionalAction, "default": False}
    group.add_argument("--flip", **on_off, help="mirror half of the images")
    group.add_argument("--balance", **on_off, help="draw images of all classes equally often")
    group = parser.add_argument_group("run")
    add, amp = group.add_argument, ("auto", *AMP_TYPES)
    recipes = ("fast", *(name for name in changes if name != "digits"))
    add("--recipe", choices=recipes, default="fast", help="a set of these flags; see below")
    add_device_flags(group)
    add("--amp", choices=amp, default="auto", help="mixed precision; auto: where it is fast")
    add("--compile", action="store_true", help="compile the network with torch.compile")
    add("--init", type=path_type, metavar="FILE", help="start from the weights of a checkpoint")
    add("--out-dir", type=path_type, metavar="DIR", help="default: runs/<dataset>-<model>")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true", help="resume the run in --out-dir")
    either.add_argument("--overwrite", action="store_true", help="replace the run in --out-dir")
    add("--pictures", choices=("on", "off"), default="on", help="pictures in TensorBoard")
    add("--limit-batches", type=integer(1, 2**31), metavar="N",
        help="at most N batches per epoch, for validation too")  # fmt: skip
    parser.set_defaults(**recipe)
    return parser


def as_flags(values: dict) -> str:
    """{"patch_size": 8, "flip": False} as "--patch-size 8 --no-flip"."""
    words = []
    for key, value in values.items():
        flag = "--no-" if value is False else "--"
        words.append(flag + key.replace("_", "-"))
        if not isinstance(value, bool):
            words += map(str, value if isinstance(value, list) else [value])
    return " ".join(words)


def parse_flags(parser: Parser, argv, model_name: str, changes: dict):
    """Read the command line, and make --out-dir. `changes` as for `training_parser`.

    Returns:
        (all flags, the checkpoint to resume from or None).

    Raises:
        UserError: --out-dir is occupied, in use or cannot be written, there is nothing to resume,
            or a flag conflicts with the run or with --init.
        Finished: the run to resume is finished.
    """
    defaults = vars(parser.parse_args([]))
    not_typed = object()  # argparse does not tell typed flags from defaults; this default does
    namespace = argparse.Namespace(**dict.fromkeys(defaults, not_typed))
    typed = vars(parser.parse_args(argv, namespace))
    typed = {key: value for key, value in typed.items() if value is not not_typed}
    typed["run_id"] = distributed.run_id()
    digits = changes["digits"] if typed.get("dataset") == "digits" else {}
    recipe = (defaults | digits | typed)["recipe"]
    values = defaults | changes.get(recipe, {}) | digits | typed
    if recipe == "plain" and "muon_lr" in typed and not values["resume"]:
        raise UserError(
            "--muon-lr has no effect with --recipe plain (the default for digits), which does not "
            "use Muon: omit it, or add --recipe fast"
        )
    if values["out_dir"] is None:
        suffix = "" if recipe == (defaults | digits)["recipe"] else f"-{recipe}"
        values["out_dir"] = Path("runs", f"{values['dataset']}-{model_name}{suffix}")
    out_dir = values["out_dir"]
    own = values["run_id"] and saved_run_id(out_dir) == values["run_id"]  # of this torchrun
    refused = out_dir / ".refused"  # torchrun also restarts what was refused
    if values["run_id"] and not distributed.restarts():
        refused.unlink(missing_ok=True)
    if own and not values["resume"] and (out_dir / "last.pt").is_file():
        if not distributed.restarts() or refused.exists():
            refused.touch()
            raise UserError(
                f"torchrun: --rdzv-id {values['run_id']} was used before, for the run in "
                f"{out_dir}: use another"
            )
        values["resume"] = True
        typed.pop("overwrite", None)
    if not values["resume"]:
        with writing(f"--out-dir {out_dir}"):
            occupied = list(out_dir.glob("*.pt"))
        if occupied and not values["overwrite"] and not (own and distributed.restarts()):
            raise UserError(
                f"{out_dir} holds a run already: resume it (--resume), replace it (--overwrite), "
                "or choose another --out-dir"
            )
        images = values["data_dir"] if values["dataset"] == "folder" else None
        if not distributed.rank():
            make_out_dir(out_dir, images)
        if values["init"] is not None:
            values |= network_of(values["init"], model_name, typed, defaults)
        return argparse.Namespace(**values), None
    return resumed_flags(values, typed, defaults, model_name)


def resumed_flags(values: dict, typed: dict, defaults: dict, model_name: str):
    """As `parse_flags`, for the run in --out-dir: its settings, and typed ones that may differ."""
    out_dir = values["out_dir"]
    if out_dir.is_dir() and not distributed.rank():
        make_out_dir(out_dir)  # before last.pt is read, which another program may be writing
    last = out_dir / "last.pt"
    with naming("--resume:", "; check --out-dir, or start again (--overwrite)"):
        checkpoint = load_checkpoint(last)
        if checkpoint["optimizer"] is None or "epochs" not in checkpoint["settings"]:
            raise UserError(f"{last} holds weights only, not a training run")
    refuse_other_network(f"--resume: {last}", checkpoint, model_name)
    network = {k: v for k, v in network_defaults(model_name).items() if k in defaults}
    settings = network | checkpoint["settings"]  # an older run may lack a flag
    saved = defaults | settings
    fixed = {key: value for key, value in typed.items() if key not in CHANGEABLE}
    train_on = f"--init {out_dir / 'best.pt'} and another --out-dir"
    advice = {
        "epochs": f"its learning rate ends at 0 there. To train on from its weights: {train_on}"
    }
    refuse_conflicts(fixed, saved, f"the run in {out_dir}", advice)
    if checkpoint["epoch"] >= checkpoint["settings"]["epochs"]:
        raise Finished(
            f"{out_dir} is finished: {checkpoint['epoch']} of {checkpoint['epoch']} epochs are "
            f"done. To train on from its weights: {train_on}"
        )
    best = out_dir / "best.pt"
    if not best.is_file():
        raise UserError(f"--resume: {best} is missing: put it back, or start again (--overwrite)")
    changed = {key: typed[key] for key in CHANGEABLE & set(typed)}
    values |= settings | {"compile": False} | changed
    values |= {"out_dir": out_dir, "resume": True, "overwrite": False}
    for key in ("data_dir", "teacher", "init"):  # strings in a checkpoint
        if values.get(key) is not None:
            values[key] = Path(values[key])
    return argparse.Namespace(**values), checkpoint


def saved_run_id(out_dir: Path) -> str | None:
    """The run that the checkpoints there are of, as `distributed.run_id`."""
    for path in (out_dir / "last.pt", out_dir / "best.pt"):  # best.pt is written first
        with contextlib.suppress(UserError):  # missing, or damaged: --overwrite may replace it
            return load_checkpoint(path)["settings"].get("run_id")
    return None


def refuse_other_network(what: str, checkpoint: dict, model_name: str) -> None:
    """Raise UserError if a checkpoint is another network's."""
    name = checkpoint["model_name"]
    if name != model_name:
        raise UserError(f"{what} is a {name}: use train_{name}.py, or another checkpoint")


def network_of(path: Path, model_name: str, typed: dict, defaults: dict) -> dict:
    """The flags of the network of a checkpoint to start from.

    Raises UserError: it cannot be read, is another network, or a typed flag differs.
    """
    with naming("--init"):
        checkpoint = load_checkpoint(path)
    refuse_other_network(f"--init {path}", checkpoint, model_name)
    config = network_defaults(model_name) | checkpoint["model_config"]
    saved = {key: config[key] for key in set(config) & set(defaults) - WITHOUT_WEIGHTS}
    saved["image_size"] = checkpoint["dataset"]["image_size"]
    refuse_conflicts(typed, saved, f"--init {path}", dict.fromkeys(saved, "omit it"))
    return saved


def refuse_conflicts(typed: dict, saved: dict, what: str, advice: dict) -> None:
    """Raise UserError if a typed flag differs from that in `saved`, the flags of `what`."""
    usual = "omit it, or start again in another --out-dir"
    for key in sorted(set(typed) & set(saved)):
        value = typed[key].as_posix() if isinstance(typed[key], Path) else typed[key]
        if value != saved[key]:
            raise UserError(
                f"--{key.replace('_', '-')} {value} conflicts with {what}, which has "
                f"{saved[key]}: {advice.get(key, usual)}"
            )


def choose_amp(name: str, device: torch.device) -> str:
    """What `--amp name` means on `device`: a key of `AMP_TYPES`.

    Raises UserError: an unknown name, or float16, whose gradient scaler needs a GPU, elsewhere.
    """
    if name == "auto":
        half = "fp16" if device.type == "cuda" else "off"
        return "bf16" if fast_bfloat16(device) else half
    if name not in AMP_TYPES:
        raise UserError(f"--amp {name}: use auto, {', '.join(AMP_TYPES)}")
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16 needs --device cuda, not {device.type}; use --amp off")
    return name
