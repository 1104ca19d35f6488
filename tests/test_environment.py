"""Notebooks, pipes, full disks, odd names, shared machines: the work goes on, or says why not."""

import errno
import io
import json
import multiprocessing
import os
import shutil
import sys
import threading
from pathlib import Path

import markupsafe
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_CNN
from PIL import Image

import checkpoint
import cli
import evaluate
import explain
import folders
import train_cnn
import train_vit
from cli import UserError
from data import load_data
from models import build_model
from prepare import start_from

DIGITS = ["--dataset", "digits", "--epochs", "1", "--limit-batches", "2", "--device", "cpu"]
DIGITS += ["--pictures", "off"]


def train(out_dir, *flags):
    train_cnn.main([*DIGITS, *TINY_CNN, "--out-dir", str(out_dir), *map(str, flags)])


# ---------------------------------------------------------------- standard output


class Closed(io.TextIOBase):
    """A pipe whose reader is gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")

    flush = write


class Notebook(io.TextIOBase):
    """Like ipykernel's stream: no `reconfigure`, no file descriptor."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text


STREAMS = {
    "closed pipe": Closed,
    "closed file": lambda: (lambda f: (f.close(), f)[1])(io.StringIO()),
    "full disk": lambda: Path("/dev/full").open("w"),  # noqa: SIM115
    "none": lambda: None,
    "ASCII": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
    "notebook": Notebook,
}


@pytest.mark.parametrize("kind", STREAMS)
def test_any_standard_output_will_do(kind, tmp_path, monkeypatch):
    """Work goes on to its end, whatever happens to what it prints."""
    streams = [STREAMS[kind](), STREAMS[kind]()]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        train(tmp_path / "größer", "--overwrite")
        if kind == "notebook":
            assert "best validation accuracy" in streams[0].text
        if kind == "ASCII":
            streams[0].flush()
            assert b"gr\\xf6\\xdfer" in streams[0].buffer.getvalue()
    assert checkpoint.load_checkpoint(tmp_path / "größer" / "last.pt")["epoch"] == 1


def test_a_thread_may_run_a_script(tmp_path):
    """`run` handles no signals there."""
    thread = threading.Thread(target=cli.run, args=(lambda: train(tmp_path / "run"),))
    thread.start()
    thread.join(60)
    assert (tmp_path / "run" / "last.pt").exists()


def test_a_script_leaves_the_process_as_it_was(tmp_path):
    threads, hook, out = torch.get_num_threads(), threading.excepthook, sys.stdout
    train(tmp_path, "--threads", threads + 1)
    assert (torch.get_num_threads(), threading.excepthook, sys.stdout) == (threads, hook, out)


# ---------------------------------------------------------------- names


LATIN = os.fsdecode(b"caf\xe9")  # a Latin-1 name on a system of UTF-8
NAMES = {"odd": f"_a|b `$x$` <b>*_c_*\n[1]* {LATIN}", "long": "n" * 240}


@pytest.mark.parametrize("kind", NAMES)
def test_any_name_reaches_all_that_is_written(kind, trained, tmp_path, capsys):
    """The name of a run and of a photograph: figures, reports, JSON, maps."""
    name, out_dir = NAMES[kind], tmp_path / "out"
    run, photo = tmp_path / name, tmp_path / f"{name}.png"
    run.mkdir()
    shutil.copy(trained["vit"], run / "best.pt")
    shutil.copy(ROOT / "pictures" / "chelsea.png", photo)
    path = str(run / "best.pt")
    if kind == "odd":
        evaluate.main([path, "--out-dir", str(out_dir)])
        assert list(json.loads((out_dir / "metrics.json").read_text())) == [path]
        assert cli.printable(name) in (out_dir / "classification_report.txt").read_text()
        assert len(list(out_dir.glob("*.png"))) == 6
        assert str(markupsafe.escape(cli.printable(name))) in (out_dir / "report.html").read_text()
    argv = ["--method", "grad-cam", "attention", "--save-maps", "--out-dir", str(out_dir)]
    explain.main([path, "--images", str(photo), *argv])
    maps = np.load(next(out_dir.glob("*.npz")))
    assert f"{cli.printable(name)}_grad-cam_predicted" in maps
    assert len(list(out_dir.glob("*-images.png"))) == 4
    assert len([p for p in out_dir.glob("*.png") if Image.open(p).size == (300, 300)]) == 2
    out, err = capsys.readouterr()
    assert err == "" and cli.printable(name) in out


def test_an_undecodable_out_dir_is_refused(tmp_path, fails):
    """TensorBoard cannot write there."""
    line = fails(train_cnn.main, *DIGITS, *TINY_CNN, "--out-dir", tmp_path / LATIN)
    assert "caf\\udce9: TensorBoard needs a name in UTF-8" in line


def test_tilde_and_patterns_need_no_shell(trained, tmp_path, monkeypatch):
    """No shell expands `--out-dir=~/x`, nor anything in a notebook."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train_cnn.main([*DIGITS, *TINY_CNN, "--out-dir=~/runs/a"])
    shutil.copytree(trained["vit"].parent, tmp_path / "runs" / "b")
    for i in (1, 2):
        Image.new("RGB", (9, 9), "red").save(tmp_path / f"{i}.png")
    argv = ["--images", "?.png", "--method", "grad-cam", "--out-dir", "~/maps"]
    explain.main(["~/runs/*/best.pt", *argv])
    assert len(list(tmp_path.glob("maps/[12]_[ab]_*.png"))) == 4
    assert not (tmp_path / "~").exists()


# ---------------------------------------------------------------- disks


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("where", ["figure", "report", "maps", "cache"])
def test_a_full_disk_is_named_with_the_file(where, trained, photos, tmp_path, fails, monkeypatch):
    photos = shutil.copytree(photos, tmp_path / "photos")
    folder = ["--dataset", "folder", "--data-dir", photos, "--batch-size", 8]
    script, argv, named = {
        "figure": (explain, [trained["cnn"]], "_explanations-any.png"),
        "report": (evaluate, [trained["cnn"]], "metrics.json"),
        "maps": (explain, [trained["cnn"], "--save-maps"], "_maps-any.npz"),
        "cache": (train_cnn, [*folder, *TINY_CNN], "/.cache-32-"),
    }[where]
    if where == "cache":
        monkeypatch.setattr(os, "fsync", no_space)
    elif where == "figure":
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", no_space)
    elif where == "report":
        monkeypatch.setattr(Path, "write_bytes", no_space)
    else:
        monkeypatch.setattr(np, "savez", no_space)
    line = fails(script.main, *argv, "--out-dir", tmp_path / "out")
    assert named in line and "(No space left on device): free some space" in line


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.ENOENT, "make its folder first"),
        (errno.EROFS, "make it writable, or choose another"),
    ],
)
def test_what_to_do_depends_on_the_cause(number, advice):
    with pytest.raises(UserError, match=rf"x\.pt: cannot be written \(.+\): .*{advice}"):  # noqa: SIM117
        with cli.writing("x.pt"):
            raise OSError(number, os.strerror(number))


@pytest.mark.filterwarnings("error")  # of an exception in a thread
def test_curves_that_cannot_be_written_do_not_end_a_training(tmp_path, monkeypatch, capsys):
    """One line per writer and epoch, and no traceback of TensorBoard's thread."""
    flushed = []  # the writers flush once when they are made
    monkeypatch.setattr(
        "tensorboard.compat.tensorflow_stub.io.gfile.GFile.flush",
        lambda file: flushed.append(file) or (len(flushed) > 2 and no_space()),
    )
    train(tmp_path)
    assert checkpoint.load_checkpoint(tmp_path / "last.pt")["epoch"] == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines
    for line in lines:
        assert line.startswith(f"warning: {tmp_path}/")
        assert "(No space left on device): free some space; the work goes on" in line


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_read_only_folder_is_decoded_elsewhere(number, photos, tmp_path, monkeypatch):
    """As on Kaggle. (Permissions do not stop the superuser, so opening a file is made to fail.)"""
    without = shutil.ignore_patterns(".cache*")  # of other tests
    other = shutil.copytree(photos, tmp_path / "other", ignore=without)
    photos = shutil.copytree(photos, tmp_path / "photos", ignore=without)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home" / "torch"))
    real = Path.open

    def read_only(path, mode="r", *args, **kwargs):
        if "w" in mode and (path.is_relative_to(photos) or path.is_relative_to(other)):
            raise OSError(number, "Read-only file system", str(path))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)
    first = load_data("folder", photos)
    load_data("folder", other)  # has a place of its own
    monkeypatch.setattr(folders, "read_image", None)  # the second time nothing is decoded
    again = load_data("folder", photos)
    assert torch.equal(first.test.images, again.test.images)
    assert f"decoded images are kept in {tmp_path / 'home' / 'torch' / 'images'}" in again.note
    assert not list(photos.glob(".cache*"))


def test_a_lock_is_not_needed_to_read(tmp_path, monkeypatch):
    """As for CIFAR-10 in a read-only folder, where no lock can be made."""
    monkeypatch.setattr(os, "open", no_space)
    entered = False
    with cli.locked(tmp_path / ".lock", wait=True):
        entered = True
    assert entered


# ---------------------------------------------------------------- two programs


def hold(folder, ready, release):
    with cli.locked(folder):
        ready.set()
        release.wait(60)


def test_two_programs_do_not_write_into_one_folder(trained, tmp_path, fails):
    """Training, resuming, evaluating, explaining; a program that is killed blocks nothing."""
    run = shutil.copytree(trained["cnn"].parent, tmp_path / "run")
    state = checkpoint.load_checkpoint(run / "last.pt")
    state["settings"]["epochs"] += 1
    checkpoint.save_checkpoint(run / "last.pt", state)
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(run, ready, release))
    other.start()
    assert ready.wait(60)
    for script, argv in (
        (train_cnn, ["--resume"]),
        (train_cnn, [*DIGITS, *TINY_CNN, "--overwrite"]),
        (evaluate, [trained["cnn"]]),
        (explain, [trained["cnn"]]),
    ):
        line = fails(script.main, *argv, "--out-dir", run)
        assert f"{run}: another program is writing there" in line
    other.kill()
    other.join()
    train_cnn.main(["--resume", "--out-dir", str(run)])
    assert checkpoint.load_checkpoint(run / "last.pt")["epoch"] == 3


def test_a_second_program_waits_for_the_decoding_of_the_first(photos, tmp_path):
    ignore = shutil.ignore_patterns(".cache*")
    photos = shutil.copytree(photos, tmp_path / "photos", ignore=ignore)
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(photos, ready, release))
    other.start()
    assert ready.wait(60)
    thread = threading.Thread(target=load_data, args=("folder", photos))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and not list(photos.glob(".cache*"))
    release.set()
    thread.join(60)
    other.join()
    assert list(photos.glob(".cache*.bin"))


def test_a_refusal_leaves_an_out_dir_as_it_was(tmp_path, fails):
    """Not removed; one that is new is removed."""
    mine, empty, new = (tmp_path / name for name in ("mine", "empty", "new"))
    mine.mkdir(), empty.mkdir()
    (mine / "notes.txt").touch()
    for folder in (mine, empty, new):
        fails(train_cnn.main, *DIGITS, *TINY_CNN, "--batch-size", 5000, "--out-dir", folder)
    assert sorted(tmp_path.rglob("*")) == [empty, mine, mine / "notes.txt"]


def test_a_refused_training_can_be_repeated(tmp_path, fails):
    """Its lock ends with it, also in the same process."""
    fails(train_cnn.main, *DIGITS, *TINY_CNN, "--batch-size", 5000, "--out-dir", tmp_path)
    train(tmp_path)


@pytest.mark.parametrize("script", [evaluate, explain])
def test_the_other_scripts_take_threads_too(script, fails, monkeypatch):
    wanted, before = [], torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", wanted.append)
    assert "no such checkpoint" in fails(script.main, "missing.pt", "--threads", 7)
    assert wanted == [7, before]


def test_threads_are_said_in_the_first_line(tmp_path, capsys):
    train(tmp_path, "--threads", 1)
    assert "on cpu (threads: 1)" in capsys.readouterr().out.splitlines()[0]


# ---------------------------------------------------------------- start from weights


def test_a_training_starts_from_weights(tmp_path, photos, capsys, monkeypatch):
    """The same classes: all weights. Others: a new head. Both: the data's own mean, unwhitened."""
    train(tmp_path / "first")
    path = tmp_path / "first" / "best.pt"
    before, source = checkpoint.load_model(path)
    starts = []
    real = train_cnn.train

    def spy(model, *args):
        starts.append({k: v.clone() for k, v in model.state_dict().items()})
        return real(model, *args)

    monkeypatch.setattr(train_cnn, "train", spy)
    train_cnn.main([*DIGITS, "--init", str(path), "--out-dir", str(tmp_path / "second")])
    folder = ["--dataset", "folder", "--data-dir", str(photos), "--batch-size", "8"]
    argv = [*folder, "--pictures", "off", "--epochs", "1", "--device", "cpu", "--init", str(path)]
    capsys.readouterr()
    train_cnn.main([*argv, "--out-dir", str(tmp_path / "third")])
    assert "with a new head for other classes" in capsys.readouterr().out.splitlines()[0]
    same, other = starts
    assert all(torch.equal(same[k], v) for k, v in before.state_dict().items())
    differ = {k for k, v in before.state_dict().items() if not torch.equal(other[k], v)}
    assert differ == {"head.weight", "head.bias"}
    third = checkpoint.load_checkpoint(tmp_path / "third" / "best.pt")
    assert third["mean"] == pytest.approx(load_data("folder", photos).mean)
    assert third["model_config"]["widths"] == [8, 8] and third["model_config"]["classes"] == 2
    assert third["mean"] != source["mean"]
    renamed = shutil.copytree(photos, tmp_path / "renamed")
    for part in ("train", "test"):  # as many classes, but others
        (renamed / part / "bright").rename(renamed / part / "white")
    folder = ["--dataset", "folder", "--data-dir", str(renamed), "--batch-size", "8"]
    argv = [
        *folder,
        "--pictures",
        "off",
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--out-dir",
        str(tmp_path / "fourth"),
    ]
    train_cnn.main([*argv, "--init", str(tmp_path / "third" / "best.pt")])
    assert not torch.equal(starts[2]["head.weight"], checkpoint.load_model(
        tmp_path / "third" / "best.pt")[0].head.weight)  # fmt: skip


def test_weights_follow_classes_in_any_order():
    config = {"stem": 4, "widths": [8], "depths": [0], "classes": 3}
    source, network = (build_model("cnn", config) for _ in range(2))
    classes, saved = ["a", "b", "c"], ["b", "c", "a"]  # a cycle
    start = {"classes": saved, "model_name": "cnn"}
    assert start_from(network, source, start, config, classes) == ""
    for i, name in enumerate(classes):
        assert torch.equal(network.head.weight[i], source.head.weight[saved.index(name)])


def test_the_image_size_and_the_order_of_classes_come_with_the_weights(tmp_path, photos):
    folder = ["--dataset", "folder", "--data-dir", str(photos), "--batch-size", "8"]
    argv = [*folder, "--pictures", "off", "--epochs", "1", "--device", "cpu"]
    first = tmp_path / "first" / "best.pt"
    train_cnn.main([*argv, *TINY_CNN, "--image-size", "48", "--out-dir", str(first.parent)])
    state = checkpoint.load_checkpoint(first)
    state["classes"] = state["classes"][::-1]  # the same classes, in another order
    for key in ("head.weight", "head.bias"):
        state["model"][key] = state["model"][key].flip(0)
    state["self_test"].reverse()
    checkpoint.save_checkpoint(first, state)
    train_cnn.main([*argv, "--lr", "1e-12", "--muon-lr", "1e-12", "--init", str(first),
                    "--out-dir", str(tmp_path / "second")])  # fmt: skip
    second = checkpoint.load_checkpoint(tmp_path / "second" / "last.pt")
    assert second["dataset"]["image_size"] == 48 and second["classes"] == ["bright", "dark"]
    expected = state["model"]["head.weight"].flip(0)
    torch.testing.assert_close(second["model"]["head.weight"], expected, atol=1e-6, rtol=0)


def test_a_checkpoint_that_names_no_arguments_has_those_of_the_network(tmp_path, fails):
    """As one that `train` wrote when called by hand: a typed flag that differs is refused."""
    train(tmp_path / "first")
    state = checkpoint.load_checkpoint(tmp_path / "first" / "last.pt")
    model = checkpoint.build_model("cnn", {"classes": 10})
    state |= {"model_config": {"classes": 10}, "model": model.state_dict(), "ema": None}
    state["self_test"] = checkpoint.self_test(model.eval(), state)
    checkpoint.save_checkpoint(tmp_path / "hand.pt", state)
    argv = [*DIGITS, "--init", tmp_path / "hand.pt", "--out-dir", tmp_path / "out"]
    line = fails(train_cnn.main, *argv, "--stem", 4)
    assert "--stem 4 conflicts with --init" in line and "which has 16" in line
    train_cnn.main([*map(str, argv), "--widths", "48", "112"])


def test_an_interrupted_start_from_weights_resumes_without_the_file(tmp_path, interrupted):
    """And ends in the weights of the uninterrupted one."""
    train(tmp_path / "first")
    argv = [*DIGITS, "--epochs", "2", "--init", str(tmp_path / "first" / "best.pt")]
    train_cnn.main([*argv, "--out-dir", str(tmp_path / "whole")])
    interrupted(train_cnn.main, *argv, "--out-dir", tmp_path / "parts")
    shutil.rmtree(tmp_path / "first")
    train_cnn.main(["--resume", "--out-dir", str(tmp_path / "parts")])
    whole, parts = (
        checkpoint.load_checkpoint(tmp_path / d / "last.pt") for d in ("whole", "parts")
    )
    assert all(torch.equal(whole["model"][k], parts["model"][k]) for k in whole["model"])


def test_what_does_not_fit_the_weights_is_refused(trained, tmp_path, fails):
    argv = [*DIGITS, "--out-dir", tmp_path / "out", "--init"]
    line = fails(train_vit.main, *argv, trained["vit"], "--dim", 64)
    assert f"--dim 64 conflicts with --init {trained['vit']}, which has 16: omit it" in line
    assert "is a vit: use train_vit.py" in fails(train_cnn.main, *argv, trained["vit"])
    assert "none.pt: no such checkpoint" in fails(train_cnn.main, *argv, tmp_path / "none.pt")
    line = fails(train_cnn.main, "--resume", "--epochs", 9, "--out-dir", trained["cnn"].parent)
    assert "--epochs 9 conflicts" in line and "--init" in line


def test_a_finished_run_points_to_init(trained, capsys):
    before = trained["cnn"].with_name("last.pt").read_bytes()
    train_cnn.main(["--resume", "--out-dir", str(trained["cnn"].parent)])
    assert trained["cnn"].with_name("last.pt").read_bytes() == before
    assert "is finished: 2 of 2 epochs are done" in (out := capsys.readouterr().out)
    assert f"--init {trained['cnn']}" in out


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("Allocation on device 0"),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")],
)  # fmt: skip
def test_out_of_memory_is_one_line(error, fails):
    @cli.command
    def main(argv=None):
        raise error

    assert "out of memory: use --device cpu or, in training, smaller batches" in fails(main)
