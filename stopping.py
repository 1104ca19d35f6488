"""How a command ends before its work is done: bad input, nothing to do, a signal.

SIGINT (Ctrl-C) and SIGTERM let a training run finish its step.
"""

import functools
import shlex
import signal
import threading
from pathlib import Path

_signals: list[int] = []  # that have come during `train`


class UserError(Exception):
    """Wrong use or bad input. The message names the file or flag and says what to do."""


class Finished(Exception):  # noqa: N818, it is no error
    """There is nothing left to do; the message says why."""


class Stopped(Exception):  # noqa: N818
    """A signal has ended a training run."""

    number: int  # the signal's
    out_dir: Path  # where the checkpoints are
    saved: bool  # whether this training has written any, or was resumed from one


def stop_if_asked() -> None:
    """Raise `Stopped` if a signal has come. The loop calls this between steps."""
    if _signals:
        raise Stopped


def finishing_steps(train):
    """Decorate `train`: after a signal a step is finished; a second signal ends at once."""

    @functools.wraps(train)
    def wrapper(model, optimizer, train_batches, val_batches, settings, *rest, **named):
        last, handlers = Path(settings.out_dir, "last.pt"), {}

        def written():
            return last.stat().st_mtime_ns if last.exists() else None

        def restore():
            for number, handler in handlers.items():
                signal.signal(number, handler)

        def note(number, _):
            _signals.append(number)
            restore()

        before = written() if settings.overwrite else None  # else it is of the run to resume
        _signals.clear()
        if threading.current_thread() is threading.main_thread():  # others cannot handle signals
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) != signal.SIG_IGN:  # a shell's background job
                    handlers[number] = signal.signal(number, note) or signal.SIG_DFL
        try:
            return train(model, optimizer, train_batches, val_batches, settings, *rest, **named)
        except (Stopped, RuntimeError) as error:
            if not _signals:
                raise
            # Under torchrun another process may have stopped a step before: a RuntimeError here.
            stop = error if isinstance(error, Stopped) else Stopped()
            stop.number, stop.out_dir, stop.saved = _signals[0], last.parent, written() != before
            raise stop from None
        finally:
            restore()

    return wrapper


def how_to_resume(stop: Stopped, script: str, argv=(), run_id: str | None = None) -> str:
    """What to print after a signal. argv: of the script; `run_id`: as `distributed.run_id`."""
    if not stop.saved:
        return "stopped before the first checkpoint was saved: run the same command again"
    start = "the same torchrun command with" if run_id else "python"
    own = ["--resume", "--out-dir", str(stop.out_dir), *["--compile"] * ("--compile" in argv)]
    return (
        f"stopped after a step. To resume (the epoch is repeated): {start} {Path(script).name} "
        + shlex.join(argv if "--resume" in argv else own)
    )
