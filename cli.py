"""What every script's command line shares: one-line errors, checked numbers, the device."""

import argparse
import functools
import math
import signal
import sys
import tempfile
from pathlib import Path

import torch


class UserError(Exception):
    """Wrong use or bad input; the message names the file or flag and says what to do."""


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that shows defaults in `--help` and fails in one line."""

    def __init__(self, manual: str, **kwargs):
        super().__init__(description=manual, formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        """Print one line and exit with status 2; argparse would print the usage as well."""
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the docstring, and adds the defaults where there is one to tell."""

    def _get_help_string(self, action):
        untold = action.default is None or action.default is False
        return action.help if untold else super()._get_help_string(action)


def command(main):
    """Decorate `main(argv=None)`: bad input ends in one line and exit 2, Ctrl-C in 130."""

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            print(f"error: {name}{error.strerror or error}", file=sys.stderr)
            sys.exit(2)
        except (torch.OutOfMemoryError, MemoryError):
            print(
                "error: out of memory: use --device cpu or, in training, a smaller --batch-size",
                file=sys.stderr,
            )
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapper


def run(main) -> None:
    """Run a script's `main`; SIGTERM ends it like an exit (143), so that files are closed."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be in any encoding
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    main()


def make_out_dir(folder: Path) -> None:
    """Make `folder` and check that it is writable: better now than after an hour.

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


def number(kind, low, high=None, *, above: bool = False):
    """An argparse type: a finite `kind` from `low` to `high` (`above`: `low` itself is refused)."""
    words = "a whole number " if kind is int else "a number "
    if high is None:
        words += f"above {low}" if above else f"of at least {low}"
    else:
        words += f"from {low} to {high}"

    def parse(text: str):
        try:
            value = kind(text)
            fits = math.isfinite(value) and (value > low if above else value >= low)
        except (ValueError, OverflowError):
            fits = False
        if not fits or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
        return value

    return parse


def some(names: set[str]) -> str:
    """A few of the names, for a message."""
    shown = sorted(names)[:4]
    return ", ".join(map(repr, shown)) + (", ..." if len(names) > 4 else "") or "none"


def path_type(text: str) -> Path:
    """An argparse type; what a shell makes of an unset variable is no folder."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: name a file or folder")
    return Path(text)


def add_data_flags(parser: argparse.ArgumentParser, *, remembered: bool = False) -> None:
    """Add --dataset and --data-dir; `remembered`: a checkpoint supplies what is not typed."""
    group = parser.add_argument_group("data")
    note = " (default: as in training)" if remembered else ""
    group.add_argument(
        "--dataset",
        metavar="NAME",
        default=None if remembered else "cifar10",
        help="cifar10 (downloaded on first use), digits (comes with scikit-learn), or folder "
        "(DIR/train/<class>/* and DIR/test/<class>/*, or DIR/<class>/*)" + note,
    )
    group.add_argument(
        "--data-dir",
        type=path_type,
        metavar="DIR",
        default=None if remembered else Path("data"),
        help="folder of the data set; CIFAR-10 is downloaded into it" + note,
    )


def add_device_flag(parser: argparse._ActionsContainer) -> None:
    """Add --device."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto takes a GPU where there is one",
    )


def choose_device(name: str) -> torch.device:
    """The device that `--device name` asks for; raises UserError if this machine lacks it."""
    found = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, there in found.items() if there)
    if not found[name]:
        raise UserError(f"--device {name}: PyTorch finds no such device here; use --device cpu")
    return torch.device(name)
