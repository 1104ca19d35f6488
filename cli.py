"""What every command line shares: errors in one line, names, types of flags, device."""

import argparse
import contextlib
import contextvars
import errno
import functools
import hashlib
import os
import signal
import sys
import tempfile
import threading
import unicodedata
from pathlib import Path

import torch

import distributed
from stopping import Finished, Stopped, UserError, how_to_resume

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that shows defaults in `--help` and reports errors in one line."""

    def __init__(self, manual: str, **kwargs):
        super().__init__(description=manual, formatter_class=_Help, allow_abbrev=False, **kwargs)

    def error(self, message: str):
        """Print one line and exit with status 2. (argparse would print the usage as well.)"""
        print(f"error: {printable(message)}", file=sys.stderr)
        sys.exit(2)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the docstring and adds defaults, except None and False."""

    def _get_help_string(self, action):
        no_default = action.default is None or action.default is False
        return action.help if no_default else super()._get_help_string(action)


# What a running command cleans up at its end, for each thread.
_at_end: contextvars.ContextVar[contextlib.ExitStack] = contextvars.ContextVar("at_end")


def command(main):
    """Decorate `main(argv=None)`: bad input prints one line and exits with 2, Ctrl-C with 130.

    If standard output is closed, full, or cannot encode a name, the work goes on.
    """

    @functools.wraps(main)
    def wrapper(argv: list[str] | None = None) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(_at_end.reset, _at_end.set(stack))
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            if not isinstance(sys.stdout, TolerantStream):  # or another command is running
                stack.callback(setattr, threading, "excepthook", threading.excepthook)
                threading.excepthook = _report_thread
                out, err = TolerantStream(sys.stdout), TolerantStream(sys.stderr)
                out.stream = None if distributed.rank() else out.stream
                err.stream = None if distributed.local_rank() else err.stream
                stack.enter_context(contextlib.redirect_stdout(out))
                stack.enter_context(contextlib.redirect_stderr(err))
                stack.callback(out.flush)
            stderr = sys.stderr
            try:
                return main(argv)
            except Finished as reason:
                return print(reason)
            except UserError as error:
                message = str(error)
            except OSError as error:
                name = f"{error.filename}: " if error.filename else ""
                message = f"{name}{error.strerror or error}"
            except (MemoryError, RuntimeError) as error:
                kinds = MemoryError, torch.OutOfMemoryError
                if isinstance(error, kinds) or "tried to allocate" in str(error).lower():
                    message = "out of memory: use --device cpu or, in training, smaller batches"
                    if distributed.rank():  # others may have enough
                        stderr = sys.__stderr__
                elif str(error).startswith("Symlink loop"):  # from Path.resolve
                    message = str(error)
                elif distributed.is_lost(error):
                    message = "torchrun: another process has ended; --resume repeats the epoch"
                elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                    reason = " ".join(str(error).split("\n\nSet TORCH")[0].split())[:200]
                    message = f"--compile: omit it, or install a C++ compiler ({reason})"
                else:
                    raise
            except Stopped as stop:
                script = main.__globals__.get("__file__", sys.argv[0])
                words = sys.argv[1:] if argv is None else argv
                print(how_to_resume(stop, script, words, distributed.run_id()), file=stderr)
                sys.exit(128 + stop.number)
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                sys.exit(130)
            print(f"error: {printable(message)}", file=stderr)
            sys.exit(2)

    return wrapper


def run(main) -> None:
    """Run a script's `main`. SIGTERM ends it like an exit (143), so that files are closed."""
    if threading.current_thread() is not threading.main_thread():
        return main()  # only the main thread can handle signals
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    finally:  # in a notebook, %run leaves the process as it was
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class TolerantStream:
    """A text stream that ignores write errors; later output is discarded. It may wrap None."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        """Write `text`, with escapes for what the stream's encoding lacks."""
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self._call("write", text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        """Write what is in the stream's buffer."""
        self._call("flush")

    def isatty(self) -> bool:
        """Whether there is a terminal; it is asked before a progress bar is drawn."""
        return bool(self._call("isatty"))

    def _call(self, method: str, *args):
        if self.stream is None:
            return None
        try:
            return getattr(self.stream, method)(*args)
        except (OSError, ValueError):  # no reader, no space, closed
            self.stream = None
            return None


def _report_thread(args) -> None:
    """Print an exception of a thread, except TensorBoard's, which `flush` raises again."""
    if type(args.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(args)


@contextlib.contextmanager
def naming(flag: str, advice: str = ""):
    """Put the flag before the message of a UserError in the block, and more advice after it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag} {error}{advice}") from None


def warn(message: str) -> None:
    """Print one line on stderr and go on."""
    print(f"warning: {printable(message)}", file=sys.stderr)


# ---------------------------------------------------------------- files and names


@contextlib.contextmanager
def writing(path: Path | str, *, needed: bool = True):
    """Name `path` if something in the block cannot be written, in place of an OSError.

    Raises UserError: it is `needed`. Otherwise a warning is printed.
    """
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some space",
            errno.ENAMETOOLONG: "choose a shorter name",
            errno.ENOENT: "make its folder first",
        }.get(error.errno, "make it writable, or choose another folder")
        message = f"{path}: cannot be written ({error.strerror or error}): {advice}"
        if needed:
            raise UserError(message) from None
        warn(f"{message}; the work goes on")


def refuse_inside(folder: Path, images: Path | None = None) -> None:
    """Raise UserError if `folder` is in `images`, or in images that have been decoded before."""
    for parent in (folder.resolve(), *folder.resolve().parents):
        if (images is not None and parent == images.resolve()) or any(parent.glob(".cache-*.bin")):
            raise UserError(
                f"{folder} is in the folder of images {parent}, where results would be read as "
                "images: choose another"
            )


def make_out_dir(folder: Path, images: Path | None = None, *, curves: bool = True) -> None:
    """Make `folder` and check that it is writable, before an hour of training is lost.

    It is locked until the command ends; if it is new and still empty then, it is removed.

    Raises UserError: it is a file, cannot be made or written, is in use, has an undecodable name,
    or is in a folder data set (`images`, if it is not known from its cache).
    """
    with naming("--out-dir"):
        refuse_inside(folder, images)
    if curves and str(folder) != str(folder).encode(errors="replace").decode():
        raise UserError(f"--out-dir {folder}: TensorBoard needs a name in UTF-8: choose another")
    with writing(f"--out-dir {folder}"):
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    if stack := _at_end.get(None):
        if new:
            stack.callback(_remove_empty, folder)
        stack.enter_context(locked(folder))


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # there is something in it
        folder.rmdir()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = False):
    """Hold an exclusive lock on `path`. It ends with the process, however that ends.

    Where that is not possible (Windows, some network disks, read-only ones) nothing is locked.

    Args:
        path: a folder, or a file, which is made if it is not there.
        wait: wait for the other program.

    Raises UserError: another program has it.
    """
    with contextlib.ExitStack() as stack:
        try:
            handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
            stack.callback(os.close, handle)
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(
                f"{path}: another program is writing there: wait for it, or choose another "
                "--out-dir"
            ) from None
        except OSError:
            pass
        yield


def printable(text) -> str:
    """`text` in one line: line breaks, control characters and undecodable bytes as escapes."""
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")
        else c
        for c in str(text)
    )


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC). macOS may have é as e and an accent."""
    return unicodedata.normalize("NFC", name)


def file_name(stem: str, suffix: str) -> str:
    """A file's name without slashes; of a long stem the middle is replaced by a hash."""
    stem = stem.replace("/", "-")
    raw = os.fsencode(stem)
    if len(raw) > 200:
        start, end = (part.decode(errors="ignore") for part in (raw[:120], raw[-60:]))
        stem = f"{start}-{hashlib.sha256(raw).hexdigest()[:8]}-{end}"
    return stem + suffix


def quoted(names) -> str:
    """Up to four of the names, sorted and quoted, for a message; "none" for no names."""
    first = ", ".join(map(repr, sorted(names)[:4]))
    return first + (", ..." if len(names) > 4 else "") or "none"


# ---------------------------------------------------------------- types of flags


def integer(low: int, high: int | None = None):
    """An argparse type: a whole number from `low` to `high`."""
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    return _number_type(int, f"a whole number {limits}", low, high or sys.float_info.max)


def real(low: float, high: float):
    """An argparse type: a number from `low` to `high`."""
    return _number_type(float, f"a number from {low} to {high}", low, high)


def _number_type(kind, description: str, low: float, high: float = sys.float_info.max):
    def parse(text: str):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {description}")

    return parse


non_negative = _number_type(float, "a number of at least 0", 0)
positive = _number_type(float, "a number above 0", sys.float_info.min)


def name_type(text: str) -> str:
    """An argparse type: a path that is not empty; ~ is expanded."""
    if not text:
        raise argparse.ArgumentTypeError("is empty: name a file or folder")
    name = os.path.expanduser(text)  # noqa: PTH111, Path would drop a ./
    if name[0] == "~" and "/" in name:
        raise argparse.ArgumentTypeError(f"{text}: there is no such user")
    return name


def path_type(text: str) -> Path:
    """An argparse type: `name_type` as a path."""
    return Path(name_type(text))


# ---------------------------------------------------------------- flags of all scripts


def add_data_flags(parser: argparse.ArgumentParser, *, from_checkpoint: bool = False) -> None:
    """Add --dataset and --data-dir. `from_checkpoint`: a checkpoint supplies the defaults."""
    add = parser.add_argument_group("data").add_argument
    note = " (default: as in training)" if from_checkpoint else ""
    name, folder = (None, None) if from_checkpoint else ("cifar10", Path("data"))
    add("--dataset", metavar="NAME", default=name, help="cifar10, digits or folder" + note)
    add("--data-dir", type=path_type, metavar="DIR", default=folder,
        help="folder of your images, or where CIFAR-10 is kept" + note)  # fmt: skip


def add_device_flags(parser: argparse._ActionsContainer) -> None:
    """Add --device and --threads."""
    choices = ("auto", "cpu", "cuda", "mps")
    parser.add_argument("--device", choices=choices, default="auto", help="auto: a GPU if any")
    parser.add_argument("--threads", type=integer(1, 1024), metavar="N",
        help="CPU threads; fewer where other programs run (default: one per core)")  # fmt: skip


def use_device(flags: argparse.Namespace) -> torch.device:
    """Set --threads, and return the device of --device.

    Raises UserError: this machine has no such device.
    """
    if flags.threads:
        torch.set_num_threads(flags.threads)
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    found["cpu"] = True
    name = next(filter(found.get, found)) if flags.device == "auto" else flags.device
    if not found[name]:
        raise UserError(f"--device {name}: PyTorch finds no such device here; use --device cpu")
    return torch.device(name)
