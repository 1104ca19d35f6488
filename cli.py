"""What every command line shares: one-line errors, types of flags, device and precision."""

import argparse
import functools
import math
import signal
import sys
import tempfile
from pathlib import Path

import torch


class UserError(Exception):
    """Wrong use or bad input. The message names the file or flag and says what to do."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that shows defaults in `--help` and reports errors in one line."""

    def __init__(self, manual: str, **kwargs):
        super().__init__(description=manual, formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        """Print one line and exit with status 2. (argparse would print the usage as well.)"""
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the docstring and adds defaults, except None and False."""

    def _get_help_string(self, action):
        no_default = action.default is None or action.default is False
        return action.help if no_default else super()._get_help_string(action)


def command(main):
    """Decorate `main(argv=None)`: bad input prints one line and exits with 2, Ctrl-C with 130."""

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except UserError as error:
            message = str(error)
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            message = f"{name}{error.strerror or error}"
        except (torch.OutOfMemoryError, MemoryError):
            message = "out of memory: use --device cpu or, in training, a smaller --batch-size"
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            message = "--compile: torch.compile fails here (it needs a C++ compiler): omit it"
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
        else:
            return
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    return wrapper


def run(main) -> None:
    """Run a script's `main`. SIGTERM ends it like an exit (143), so that files are closed."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be in any encoding
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()


def warn(message: str) -> None:
    """Print one line on stderr and go on."""
    print(f"warning: {message}", file=sys.stderr)


def make_out_dir(folder: Path) -> None:
    """Make `folder` and check that it is writable, before an hour of training is lost.

    Raises:
        UserError: it is a file, or cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            f"--out-dir {folder}: cannot be written ({error.strerror}): choose another folder"
        ) from None


def quoted(names) -> str:
    """Up to four of the names, sorted and quoted, for a message; "none" for no names."""
    first = ", ".join(map(repr, sorted(names)[:4]))
    return first + (", ..." if len(names) > 4 else "") or "none"


def as_flags(values: dict) -> str:
    """{"patch_size": 8, "flip": False} as "--patch-size 8 --no-flip"."""
    words = []
    for key, value in values.items():
        flag = "--no-" if value is False else "--"
        words.append(flag + key.replace("_", "-"))
        if not isinstance(value, bool):
            words += map(str, value if isinstance(value, list) else [value])
    return " ".join(words)


# ---------------------------------------------------------------- types of flags


def integer(low: int, high: int | None = None):
    """An argparse type: a whole number from `low` to `high`."""
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    return _number_type(int, f"a whole number {limits}", lambda n: low <= n <= (high or n))


def real(low: float, high: float):
    """An argparse type: a number from `low` to `high`."""
    return _number_type(float, f"a number from {low} to {high}", lambda x: low <= x <= high)


def _number_type(kind, description: str, accepts):
    def parse(text: str):
        try:
            value = kind(text)
            valid = math.isfinite(value) and accepts(value)
        except (ValueError, OverflowError):
            valid = False
        if not valid:
            raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
        return value

    return parse


non_negative = _number_type(float, "a number of at least 0", lambda x: x >= 0)
positive = _number_type(float, "a number above 0", lambda x: x > 0)


def path_type(text: str) -> Path:
    """An argparse type: a path that is not empty, as a shell's unset variable would make it."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: name a file or folder")
    return Path(text)


# ---------------------------------------------------------------- flags of all scripts


def add_data_flags(parser: argparse.ArgumentParser, *, from_checkpoint: bool = False) -> None:
    """Add --dataset and --data-dir. `from_checkpoint`: a checkpoint supplies the defaults."""
    add = parser.add_argument_group("data").add_argument
    note = " (default: as in training)" if from_checkpoint else ""
    name, folder = (None, None) if from_checkpoint else ("cifar10", Path("data"))
    add("--dataset", metavar="NAME", default=name, help="cifar10, digits or folder" + note)
    add("--data-dir", type=path_type, metavar="DIR", default=folder,
        help="folder of your images, or where CIFAR-10 is kept" + note)  # fmt: skip


def add_device_flag(parser: argparse._ActionsContainer) -> None:
    """Add --device."""
    choices = ("auto", "cpu", "cuda", "mps")
    parser.add_argument("--device", choices=choices, default="auto", help="auto: a GPU if any")


def choose_device(name: str) -> torch.device:
    """The device that `--device name` asks for; raises UserError if this machine lacks it."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, found in available.items() if found)
    if not available[name]:
        raise UserError(f"--device {name}: PyTorch finds no such device here; use --device cpu")
    return torch.device(name)


def choose_amp(name: str, device: torch.device) -> torch.dtype | None:
    """The half-precision type that `--amp name` means on `device`. None: float32 throughout.

    Raises:
        UserError: an unknown name, or float16, whose gradient scaler needs a GPU, elsewhere.
    """
    cuda = device.type == "cuda"
    if name == "auto" and cuda:
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name not in ("auto", "off", "bf16", "fp16"):
        raise UserError(f"--amp {name}: use auto, off, bf16 or fp16")
    if name == "fp16" and not cuda:
        raise UserError(f"--amp fp16 needs --device cuda, not {device.type}; use --amp off")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
