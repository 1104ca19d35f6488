"""Signals, kills, full disks, power cuts: what they leave, and that a resumed run ends the same."""

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import TINY_CNN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint as checkpoint_module
import settings as settings_module
import stopping
import train_cnn
import training
from checkpoint import load_checkpoint

ARGV = ["--dataset", "digits", "--recipe", "fast", "--device", "cpu", "--amp", "off"]
ARGV += ["--epochs", "3", *TINY_CNN, "--pictures", "off"]
ARGV += ["--limit-batches", "10"]


@pytest.fixture(autouse=True)
def interruptible():
    """Where the suite runs as a shell's background job, SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing has disturbed, and how long it took."""
    folder, started = tmp_path_factory.mktemp("whole"), time.perf_counter()
    train_cnn.main([*ARGV, "--out-dir", str(folder)])
    return folder, time.perf_counter() - started


def is_the_same(run, whole) -> None:
    """Whether weights, average, optimizer, history and curves are those of the whole run."""
    for name in ("last.pt", "best.pt"):
        one, other = load_checkpoint(run / name), load_checkpoint(whole / name)
        for part in ("model", "ema"):
            for key, value in (one[part] or {}).items():
                assert torch.equal(value, other[part][key]), (name, part, key)
        without = [
            [{k: v for k, v in row.items() if "second" not in k} for row in state["history"]]
            for state in (one, other)
        ]
        assert without[0] == without[1] and one["best"] == other["best"]
    for part, tag in (("train", "epoch/loss"), ("val", "epoch/loss"), ("train", "step/loss")):
        curves = [EventAccumulator(str(d / part)).Reload().Scalars(tag) for d in (run, whole)]
        assert [(p.step, p.value) for p in curves[0]] == [(p.step, p.value) for p in curves[1]]
    assert not list(run.glob(".*.tmp"))


def resume(folder, whole) -> None:
    """Resume, or start again if no epoch was saved; and compare."""
    saved = (folder / "last.pt").exists()
    how = ["--resume"] if saved else [*ARGV, "--overwrite"]
    try:
        train_cnn.main([*how, "--out-dir", str(folder)])
    finally:
        is_the_same(folder, whole)


@pytest.mark.parametrize(
    ("number", "code", "when"),
    [
        (signal.SIGINT, 130, "step"),
        (signal.SIGTERM, 143, "validation"),
        (signal.SIGTERM, 143, "first epoch"),
    ],
)
def test_a_signal_ends_after_a_step(tmp_path, whole, capsys, monkeypatch, number, code, when):
    update, validate, steps = training.update_average, training.validate, []

    def signalled(ema, network, step, decay):
        steps.append(step)
        if step == {"step": 25, "first epoch": 7}.get(when):
            os.kill(os.getpid(), number)
        update(ema, network, step, decay)

    def signalled_in_validation(*args):
        if when == "validation" and len(steps) == 20:
            os.kill(os.getpid(), number)
        return validate(*args)

    monkeypatch.setattr(training, "update_average", signalled)
    monkeypatch.setattr(training, "validate", signalled_in_validation)
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as end:
        train_cnn.main([*ARGV, "--out-dir", str(tmp_path)])
    assert end.value.code == code
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    err = capsys.readouterr().err
    if when == "first epoch":
        assert "stopped before the first checkpoint was saved: run the same" in err
    else:
        assert f"python train_cnn.py --resume --out-dir {tmp_path}\n" in err
    assert steps[-1] == {"step": 25, "validation": 20, "first epoch": 7}[when]
    monkeypatch.undo()
    resume(tmp_path, whole[0])


def test_a_kill_between_the_two_files_of_a_run_that_replaces_another(tmp_path, whole, fails):
    """The old last.pt must not be resumed with the new best.pt."""
    folder = shutil.copytree(whole[0], tmp_path / "run")

    def killed_at_the_second_rename():
        real, done = Path.replace, []

        def replace(path, target):
            done.append(target)
            return os._exit(9) if len(done) == 2 else real(path, target)

        checkpoint_module.Path.replace = replace
        train_cnn.main([*ARGV, "--seed", "5", "--overwrite", "--out-dir", str(folder)])

    process = forked(killed_at_the_second_rename).processes[0]
    process.join()
    assert process.exitcode == 9
    assert load_checkpoint(folder / "best.pt")["settings"]["seed"] == 5
    assert "last.pt" in fails(train_cnn.main, "--resume", "--out-dir", folder)


def test_a_second_signal_ends_at_once(tmp_path, capsys, monkeypatch):
    def twice(*args):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("still here")

    monkeypatch.setattr(training, "update_average", twice)
    with pytest.raises(SystemExit) as end:
        train_cnn.main([*ARGV, "--out-dir", str(tmp_path)])
    assert end.value.code == 130 and "interrupted" in capsys.readouterr().err


def test_the_command_to_resume_is_not_that_of_a_run_to_replace(tmp_path, whole):
    """--overwrite, and a signal in the first epoch: last.pt is still that of the old run."""
    last = tmp_path / "last.pt"
    last.write_bytes((whole[0] / "last.pt").read_bytes())
    settings = training.TrainingSettings(out_dir=tmp_path, overwrite=True)

    def train(model, optimizer, train_batches, val_batches, settings):
        os.kill(os.getpid(), signal.SIGTERM)
        stopping.stop_if_asked()

    with pytest.raises(stopping.Stopped) as end:
        stopping.finishing_steps(train)(None, None, None, None, settings)
    assert "run the same command" in stopping.how_to_resume(end.value, "x.py")


def test_the_command_to_resume_keeps_the_flags_of_one_that_resumes():
    stop = stopping.Stopped()
    stop.saved, stop.out_dir = True, Path("my runs/a")
    said = stopping.how_to_resume(stop, "x.py", ["--epochs", "3"])
    assert said.endswith("python x.py --resume --out-dir 'my runs/a'")
    assert stopping.how_to_resume(stop, "x.py", ["--compile"]).endswith("'my runs/a' --compile")
    argv = ["--resume", "--out-dir", "a", "--data-dir", "moved"]
    assert stopping.how_to_resume(stop, "x.py", argv).endswith("--data-dir moved")


def test_a_resumed_run_does_not_replace_itself(tmp_path, interrupted):
    """Though it was begun with --overwrite."""
    interrupted(train_cnn.main, *ARGV, "--overwrite", "--out-dir", tmp_path)
    parser = settings_module.training_parser("", train_cnn.RECIPE, train_cnn.CHANGES)
    argv = ["--resume", "--out-dir", str(tmp_path)]
    flags, _ = settings_module.parse_flags(parser, argv, "cnn", train_cnn.CHANGES)
    assert flags.resume and not flags.overwrite


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """SIGINT, in a background job of a shell script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)

    def train(model, optimizer, train_batches, val_batches, settings):
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    settings = training.TrainingSettings(out_dir=tmp_path)
    found = stopping.finishing_steps(train)(None, None, None, None, settings)
    after = signal.signal(signal.SIGINT, before)
    assert found[0] == after == signal.SIG_IGN and callable(found[1])


def forked(function, *args) -> mp.ProcessContext:
    """Start function(*args) in another process, quietly."""
    return mp.start_processes(_quiet, (function, args), 1, join=False, start_method="fork")


def _quiet(_, function, args):
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    torch.set_num_threads(1)
    function(*args)


@pytest.mark.parametrize(
    ("times", "number"),
    [
        (2, signal.SIGKILL),
        pytest.param(20, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(5, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(5, signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_ended_at_random_moments(tmp_path, whole, times, number):
    """Again and again; in the end it is the run that was never ended."""
    moments, folder, ended = random.Random(times), tmp_path / "run", 0
    for i in itertools.count():
        saved = (folder / "last.pt").exists()
        how = ["--resume"] if saved else [*ARGV, "--overwrite"]
        process = forked(train_cnn.main, [*how, "--out-dir", str(folder)]).processes[0]
        process.join(moments.uniform(0.1, whole[1]))
        if process.exitcode is None:
            os.kill(process.pid, number)
            process.join(20)
        ended += process.exitcode != 0
        finished = process.exitcode == 0
        if finished or ended == times:
            if finished:
                is_the_same(folder, whole[0])
            else:
                resume(folder, whole[0])
            folder = tmp_path / f"run{i}"  # another run
        if ended == times:
            return


def test_a_power_cut_between_the_temporary_file_and_the_rename(tmp_path, whole):
    """At some of the six renames of a run."""
    real = Path.replace
    for number in (1, 4):
        folder, done = tmp_path / str(number), []

        def replace(path, target, number=number, done=done):
            done.append(target)
            if len(done) == number:
                os._exit(9)  # nothing is cleaned up
            return real(path, target)

        def cut(folder, replace=replace):
            checkpoint_module.Path.replace = replace
            train_cnn.main([*ARGV, "--out-dir", str(folder)])

        process = forked(cut, folder).processes[0]
        process.join()
        assert process.exitcode == 9 and list(folder.glob(".*.tmp"))
        resume(folder, whole[0])


@pytest.mark.parametrize("number", [1, 4])
def test_a_full_disk(tmp_path, whole, fails, monkeypatch, number):
    """At the file that is written as number 1 or 4 of a run: best.pt or last.pt."""
    real, calls = os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) == number:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    said = fails(train_cnn.main, *ARGV, "--out-dir", tmp_path)
    assert "No space left on device): free some space" in said
    monkeypatch.undo()
    resume(tmp_path, whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_disk_that_is_full(tmp_path, whole, fails, share):
    """A real one, in memory, which takes only a share of what the run writes. Needs root."""
    sizes = [file.stat().st_size for file in whole[0].rglob("*") if file.is_file()]
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(share * sum(sizes))}", "none", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mount is not permitted")
    try:
        said = fails(train_cnn.main, *ARGV, "--out-dir", tmp_path / "run")
        assert "No space left on device" in said
        subprocess.run(["mount", "-o", "remount,size=100m", tmp_path], check=True)
        resume(tmp_path / "run", whole[0])
    finally:
        subprocess.run(["umount", tmp_path], check=True)
