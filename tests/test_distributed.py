"""Many processes against one, with gloo. Processes are forked, which saves their imports."""

import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT, TINY_CNN

import distributed
import train_cnn
import training
from batches import Batches
from checkpoint import load_checkpoint, make_metadata
from data import Split
from models import CNN, ViT
from training import TrainingSettings, train

CLASSES = ["a", "b", "c"]
VIT = {"dim": 16, "depth": 2, "heads": 2, "patch_size": 8, "classes": 3}
SMALL_CNN = {"stem": 4, "widths": (8,), "depths": (1,), "classes": 3}


def in_processes(number: int, function, *args) -> None:
    """Call function(*args) in `number` processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    context = mp.start_processes(
        _start, (environment, function, args), number, join=False, start_method="fork"
    )
    while not context.join(timeout=60):
        pass


def _start(rank, environment, function, args):
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), TORCHELASTIC_RUN_ID="test")
    distributed.start(torch.device("cpu"))
    function(*args)
    torch.distributed.destroy_process_group()


def train_steps(name: str, folder, val_images: int) -> None:
    """Three steps of SGD with batches of 12, half of them mixed; last.pt is the result."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (36, 3, 32, 32), dtype=torch.uint8)
    split = Split.of(images, torch.arange(36) % 3)
    normal = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    batches = Batches(split, 12, train=True, flip=True, shift=2, mix=0.5, classes=3, **normal)
    val = Batches(split.subset(torch.arange(val_images)), 5, **normal)
    config = VIT if name == "vit" else SMALL_CNN
    model = {"vit": ViT, "cnn": CNN}[name](**config)
    if name == "cnn":  # norms frozen: a batch's statistics would be of each part alone
        real, model.train = model.train, lambda mode=True: real(False)
    metadata = make_metadata(
        name, config, classes=CLASSES, mean=normal["mean"], std=normal["std"],
        dataset={"name": "digits", "data_dir": ".", "image_size": 32, "val_fraction": 0.1,
                 "sizes": [36, val_images, 0]},
    )  # fmt: skip
    settings = TrainingSettings(
        out_dir=folder, epochs=1, lr=0.1, label_smoothing=0.1, clip=1.0, ema_decay=0.9
    )
    train(model, torch.optim.SGD(model.parameters()), batches, val, settings, metadata)


@pytest.mark.parametrize(("name", "number"), [("vit", 2), ("vit", 3), ("cnn", 2)])
def test_weights_and_scores_are_those_of_one_process(tmp_path, name, number):
    """With 13 validation images in batches of 5, which no number of processes divides."""
    train_steps(name, tmp_path / "one", 13)
    in_processes(number, train_steps, name, tmp_path / "many", 13)
    one, many = (load_checkpoint(tmp_path / run / "last.pt") for run in ("one", "many"))
    for part in ("model", "ema"):
        for key, value in one[part].items():
            torch.testing.assert_close(many[part][key], value, rtol=1e-5, atol=1e-5)
    (row,), (other,) = one["history"], many["history"]
    for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "grad_norm"):
        assert other[key] == pytest.approx(row[key], rel=1e-4), key


def draws(folder) -> None:
    """Write what a network draws in two steps, and the batches that it gets."""
    torch.manual_seed(5)
    seed = training.epoch_seed(0, 1, distributed.rank())
    found = [
        (batch, torch.rand(2))
        for batch in training.drawn_apart((torch.rand(2) for _ in range(2)), seed)
    ]
    torch.save(found, folder / f"{distributed.rank()}.pt")


def test_batches_are_the_same_everywhere_and_a_networks_draws_are_not(tmp_path):
    """Also where batches draw at each step, as those of a DataLoader without workers."""
    in_processes(2, draws, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.manual_seed(5)
    for (batch, own), (same, different) in zip(one, other, strict=True):
        assert torch.equal(batch, same) and not torch.equal(own, different)
        assert torch.equal(batch, torch.rand(2))  # as without a network
    assert not torch.equal(one[0][1], one[1][1])


def statistics() -> None:
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(distributed.rank())
    distributed.average_statistics(norm, None)
    assert norm.running_mean.tolist() == [0.5, 0.5] and norm.num_batches_tracked == 0
    with pytest.raises(ValueError, match="3 images do not divide among 2 processes"):
        distributed.own_part(torch.zeros(3))


def test_statistics_of_norms_are_averaged_and_odd_batches_refused():
    in_processes(2, statistics)


def call(main, *argv) -> None:
    torch.set_num_threads(1)
    main(list(argv))


def test_resumed_with_another_number_of_processes(tmp_path, capfd, interrupted):
    """Rank 0 alone prints; digits, one process for an epoch, then two."""
    argv = ["--dataset", "digits", "--epochs", "2", *TINY_CNN, "--out-dir", str(tmp_path / "a")]
    argv += ["--pictures", "off"]
    interrupted(train_cnn.main, *argv)
    assert load_checkpoint(tmp_path / "a" / "last.pt")["epoch"] == 1
    capfd.readouterr()
    in_processes(2, call, train_cnn.main, "--resume", "--out-dir", str(tmp_path / "a"))
    out, err = capfd.readouterr()
    assert out.count("best validation accuracy") == 1 and "on 2 processes" in out and not err
    done = load_checkpoint(tmp_path / "a" / "last.pt")
    assert [row["epoch"] for row in done["history"]] == [1, 2]
    assert done["step"] == 2 * done["history"][0]["step"]


def test_a_batch_that_does_not_divide_is_refused(tmp_path, monkeypatch, fails):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    said = fails(train_cnn.main, "--dataset", "digits", "--out-dir", tmp_path / "x")
    assert "--batch-size 32 is not a multiple of the number of processes, 3" in said


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import distributed, train_cnn, training
real = training.log_epoch
def log_epoch(logs, row, points):
    if row["epoch"] == 2 and distributed.rank() == 1 and not distributed.restarted():
        os.kill(os.getpid(), signal.SIGKILL)
    real(logs, row, points)
training.log_epoch = log_epoch
if __name__ == "__main__":
    train_cnn.run(train_cnn.main)
"""


def test_a_killed_process_is_restarted_and_ends_in_the_same_weights(tmp_path):
    argv = ["--dataset", "digits", "--epochs", "3", *TINY_CNN, "--pictures", "off", "--out-dir"]
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(root=str(ROOT)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [*torchrun, script, *argv, tmp_path / "killed"], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best validation accuracy") == 1 and "Traceback" not in done.stdout
    in_processes(2, call, train_cnn.main, *argv, str(tmp_path / "whole"))
    one, other = (load_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "killed"))
    assert len(other["history"]) == 3
    for key, value in one["model"].items():
        torch.testing.assert_close(other["model"][key], value, rtol=1e-6, atol=1e-6)
