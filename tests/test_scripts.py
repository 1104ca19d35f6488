"""Each script once, as a user runs it, on digits, one after the other."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, TINY_CNN, TINY_VIT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("user")


def run(folder, script, *argv):
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, argv)],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("script", "flags"),
    [("train_cnn.py", TINY_CNN), ("train_vit.py", [*TINY_VIT, "--pictures", "off"])],
)
def test_training(folder, script, flags):
    argv = ["--dataset", "digits", "--epochs", 1, "--limit-batches", 3, "--amp", "off", *flags]
    out = run(folder, script, *argv)
    model = script[6:9]
    head = out.splitlines()[0]
    counts = "1,293 training, 144 validation, 360 test images"
    assert head.startswith(f"digits: 10 classes ('0', '1', '2', '3', ...); {counts}; {model} of")
    assert "--no-flip" in head and "float32" in head
    assert f"python evaluate.py runs/digits-{model}/best.pt" in out
    assert (folder / "runs" / f"digits-{model}" / "last.pt").exists()


def test_evaluating(folder, trained):
    out = run(folder, "evaluate.py", *trained.values())
    assert "digits-cnn" in out and "digits-vit" in out and "written to runs/" in out


def test_explaining_into_a_pipe_that_is_closed(folder, trained):
    """As `| head -1` does; also with the matplotlib backend of a notebook, which is not here."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "explain.py"), *map(str, trained.values())],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"MPLBACKEND": "no_such_backend"},
    )  # fmt: skip
    assert process.stdout.readline().startswith("test image 44 (9)  digits-cnn: ")
    process.stdout.close()
    assert (process.stderr.read(), process.wait(120)) == ("", 0)
    assert len(list((folder / "runs" / "explanations").glob("*.png"))) == 4


@pytest.mark.parametrize(
    ("script", "number", "code"),
    [("train_cnn.py", signal.SIGINT, 130), ("train_vit.py", signal.SIGTERM, 143)],
)
def test_signals(folder, script, number, code):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), "--dataset", "digits", "--out-dir", f"signal-{code}"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # if ours is ignored
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.readline()  # the head of the table: now it trains
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in err


def test_help_imports_nothing_that_it_does_not_need():
    code = """if True:
        import sys
        import train_cnn
        try:
            train_cnn.main(["--help"])
        except SystemExit as end:
            assert end.code == 0
        slow = ("sklearn", "tensorboard", "matplotlib", "scipy")
        print("unneeded:", [name for name in slow if name in sys.modules])
    """
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.rstrip().endswith("unneeded: []"), out
