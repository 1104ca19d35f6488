"""Many processes against one, with gloo. Processes are forked, which saves their imports."""

import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT, TINY_CNN

import distributed
import train_cnn
import train_vit
import training
from batches import Batches, mixed_seed
from checkpoint import load_checkpoint, make_metadata, save_checkpoint
from cli import UserError
from data import Split
from models import CNN, ViT
from prepare import load_data_for, load_models
from training import TrainingSettings, train

CLASSES = ["a", "b", "c"]
VIT = {"dim": 16, "depth": 2, "heads": 2, "patch_size": 8, "classes": 3}
SMALL_CNN = {"stem": 4, "widths": (8,), "depths": (1,), "classes": 3}


def in_processes(number: int, function, *args, limit: float = 120, **more) -> None:
    """Call function(*args) in `number` processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    environment |= more
    context = mp.start_processes(
        _start, (environment, function, args), number, join=False, start_method="fork"
    )
    for process in context.processes:  # `context.join` would end the others when one fails
        process.join(limit)
    context.join(timeout=1, grace_period=1)
    assert not any(process.is_alive() for process in context.processes), "they hang"


def _start(rank, environment, function, args):
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), TORCHELASTIC_RUN_ID="test")
    distributed.start(torch.device("cpu"))
    function(*args)
    torch.distributed.destroy_process_group()


def train_steps(name: str, folder, val_images: int, draws: list | None = None, frozen=True) -> dict:
    """Three steps of SGD with batches of 12, half of them mixed; what last.pt has is returned.

    draws: where a number is put that the network draws at each step. frozen: norms of the CNN.
    """
    torch.manual_seed(0)
    images = torch.randint(0, 256, (36, 3, 32, 32), dtype=torch.uint8)
    split = Split.of(images, torch.arange(36) % 3)
    normal = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    batches = Batches(split, 12, train=True, flip=True, shift=2, mix=0.5, classes=3, **normal)
    val = Batches(split.subset(torch.arange(val_images)), 5, **normal)
    config = VIT if name == "vit" else SMALL_CNN
    model = {"vit": ViT, "cnn": CNN}[name](**config)
    if draws is not None:
        model.register_forward_hook(
            lambda network, *_: draws.append(torch.rand(()).item()) if network.training else None
        )
    if name == "cnn" and frozen:  # a batch's statistics would be of each part alone
        real, model.train = model.train, lambda mode=True: real(False)
    metadata = make_metadata(
        name, config, classes=CLASSES, mean=normal["mean"], std=normal["std"],
        dataset={"name": "digits", "data_dir": ".", "image_size": 32, "val_fraction": 0.1,
                 "sizes": [36, val_images, 0]},
    )  # fmt: skip
    settings = TrainingSettings(
        out_dir=folder, epochs=1, label_smoothing=0.1, clip=1.0, ema_decay=0.9
    )
    return train(model, torch.optim.SGD(model.parameters(), 0.1), batches, val, settings, metadata)


@pytest.mark.parametrize(("name", "number"), [("vit", 2), ("vit", 3), ("cnn", 2)])
def test_weights_and_scores_are_those_of_one_process(tmp_path, name, number):
    """With 11 validation images in batches of 5, which no number of processes divides."""
    train_steps(name, tmp_path / "one", 11)
    in_processes(number, train_steps, name, tmp_path / "many", 11)
    one, many = (load_checkpoint(tmp_path / run / "last.pt") for run in ("one", "many"))
    for part in ("model", "ema"):
        for key, value in one[part].items():
            torch.testing.assert_close(many[part][key], value, rtol=1e-5, atol=1e-5)
    (row,), (other,) = one["history"], many["history"]
    for key in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "grad_norm"):
        assert other[key] == pytest.approx(row[key], rel=1e-4), key


def drawing(folder) -> None:
    """Write what a network draws in three steps of training."""
    draws = []
    train_steps("vit", folder, 13, draws)
    torch.save(draws, folder / f"{distributed.rank()}.pt")


def test_a_network_draws_other_numbers_in_each_process(tmp_path):
    in_processes(2, drawing, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert len(one) == 3 and len({*one, *other}) == 6


def test_batches_are_the_same_whatever_the_network_draws():
    """Also where batches draw at each step, as those of a DataLoader without workers."""
    torch.manual_seed(5)
    expected = [torch.rand(2) for _ in range(3)]
    torch.manual_seed(5)
    found, own = [], []
    for step in range(3):
        found.append(torch.rand(2))
        with training.own_random_numbers(torch.device("cpu"), 1, step):
            own.append(torch.rand(1 + step))
    assert all(map(torch.equal, found, expected))
    for step, numbers in enumerate(own):
        torch.manual_seed(mixed_seed(1, step, 1))
        assert torch.equal(numbers, torch.rand(1 + step))


def statistics() -> None:
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(distributed.rank())
    distributed.average_statistics(norm, None)
    assert norm.running_mean.tolist() == [0.5, 0.5] and norm.num_batches_tracked == 0
    with pytest.raises(UserError, match="3 images is not divisible by 2 processes"):
        distributed.own_part(torch.zeros(3))


def test_statistics_of_norms_are_averaged_and_odd_batches_refused():
    in_processes(2, statistics)


def statistics_of_a_training(folder) -> None:
    last = train_steps("cnn", folder, 11, frozen=False)
    for part in ("model", "ema"):
        mean = last[part]["stem_norm.running_mean"]
        first = mean.clone()
        torch.distributed.broadcast(first, 0)
        torch.testing.assert_close(mean, first)


def test_after_an_epoch_all_processes_have_the_same_statistics(tmp_path):
    in_processes(2, statistics_of_a_training, tmp_path)


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


def test_the_run_id_of_an_older_run_is_refused(tmp_path, monkeypatch, trained, fails):
    """A restart would resume the older run."""
    saved = load_checkpoint(trained["cnn"])
    save_checkpoint(tmp_path / "last.pt", saved | {"settings": saved["settings"] | {"run_id": "x"}})
    environment = {"TORCHELASTIC_RUN_ID": "x", "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    said = fails(train_cnn.main, "--dataset", "digits", "--out-dir", tmp_path, "--overwrite")
    assert "torchrun: --rdzv-id x was used before, for the run in" in said
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # torchrun starts the command again
    said = fails(train_cnn.main, "--dataset", "digits", "--out-dir", tmp_path, "--overwrite")
    assert "torchrun: --rdzv-id x was used before, for the run in" in said
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "y")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setattr(train_cnn, "prepare", started)
    argv = ["--dataset", "digits", "--out-dir", tmp_path, "--overwrite"]
    assert "started" in fails(train_cnn.main, *argv)
    assert not (tmp_path / ".refused").exists()


def test_a_restart_does_not_replace_a_run_that_was_refused(tmp_path, monkeypatch, trained, fails):
    """With --max-restarts torchrun starts again after any failure, also after a refusal."""
    saved = load_checkpoint(trained["cnn"])
    for name in ("best", "last"):
        save_checkpoint(tmp_path / f"{name}.pt", saved)
    environment = {"TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": 1}
    for name, value in (environment | {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}).items():
        monkeypatch.setenv(name, str(value))
    argv = ["--dataset", "digits", "--out-dir", tmp_path]
    assert "holds a run already" in fails(train_cnn.main, *argv)
    # Killed between the two files of its own first epoch, it does start again.
    (tmp_path / "last.pt").unlink()
    saved["settings"]["run_id"] = "x"
    save_checkpoint(tmp_path / "best.pt", saved)
    monkeypatch.setattr(train_cnn, "prepare", started)
    assert "started" in fails(train_cnn.main, *argv)


def started(*_):
    raise UserError("started")


def start_apart() -> None:
    distributed.check_same(5)
    with pytest.raises(UserError, match="start at different steps: --out-dir must be on a disk"):
        distributed.check_same(distributed.rank())


def test_processes_that_start_at_different_steps_are_refused():
    in_processes(2, start_apart)


def test_a_signal_that_comes_to_one_process_first(tmp_path, capfd):
    """The other one loses it in the middle of a step, and also says how to resume."""
    with pytest.raises(mp.ProcessExitedException):
        in_processes(2, signalled, *THREE_EPOCHS, str(tmp_path / "run"))
    err = capfd.readouterr().err
    assert "Traceback" not in err and "--resume" in err
    in_processes(2, call, train_cnn.main, "--resume", "--out-dir", str(tmp_path / "run"))
    assert len(load_checkpoint(tmp_path / "run" / "last.pt")["history"]) == 3


def signalled(*argv) -> None:
    """Train; SIGTERM comes to process 1 in step 50, to process 0 in step 51."""
    real = training.update_average

    def update_average(ema, network, step, decay):
        if step == 51 - distributed.rank():
            os.kill(os.getpid(), signal.SIGTERM)
        real(ema, network, step, decay)

    training.update_average = update_average
    call(train_cnn.main, *argv)


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_too_few_gpus_are_refused_by_every_process(local_rank, monkeypatch):
    """Only the first one prints, so it must be refused too."""
    values = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "1"}
    for key, value in (values | {"RANK": local_rank, "LOCAL_RANK": local_rank}).items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="a GPU of its own"):
        distributed.start(torch.device("cuda"))


def test_a_batch_that_does_not_divide_is_refused(tmp_path, monkeypatch, fails):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    said = fails(train_cnn.main, "--dataset", "digits", "--out-dir", tmp_path / "x")
    assert "a batch of 32 images is not divisible by 3 processes: choose another --batch" in said


def killed(*argv) -> None:
    """Train; process 1 dies in the second epoch, unless it has been restarted."""
    real = training.log_epoch

    def log_epoch(logs, row, points):
        if row["epoch"] == 2 and distributed.rank() == 1 and not distributed.restarts():
            os.kill(os.getpid(), signal.SIGKILL)
        real(logs, row, points)

    training.log_epoch = log_epoch
    call(train_cnn.main, *argv)


THREE_EPOCHS = ["--dataset", "digits", "--recipe", "fast", "--amp", "off", "--epochs", "3"]
THREE_EPOCHS += [*TINY_CNN, "--pictures", "off", "--out-dir"]


def same_weights(one, other) -> None:
    one, other = (load_checkpoint(run / "last.pt") for run in (one, other))
    assert len(one["history"]) == len(other["history"]) == 3
    for key, value in one["model"].items():
        torch.testing.assert_close(other["model"][key], value, rtol=1e-6, atol=1e-6)


def test_a_killed_process_is_restarted_and_ends_in_the_same_weights(tmp_path, capfd):
    """What torchrun does: a process dies, the others end, and all start again, as typed."""
    argv = [*THREE_EPOCHS, str(tmp_path / "killed")]
    with pytest.raises(mp.ProcessExitedException):
        in_processes(2, killed, *argv)
    assert "--resume" in capfd.readouterr().err  # of process 0, which may get a signal as well
    in_processes(2, killed, *argv, TORCHELASTIC_RESTART_COUNT="1")
    in_processes(2, call, train_cnn.main, *THREE_EPOCHS, str(tmp_path / "whole"))
    same_weights(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("times", range(5))
def test_torchrun_restarts_a_killed_process(tmp_path, times):
    script = tmp_path / "killed.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import test_distributed\ntest_distributed.killed(*sys.argv[1:])\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "--max-restarts", "1"]
    done = subprocess.run(
        [*torchrun, script, *THREE_EPOCHS, tmp_path / "killed"], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best validation accuracy") == 1 and "Traceback" not in done.stderr
    in_processes(2, call, train_cnn.main, *THREE_EPOCHS, str(tmp_path / "whole"))
    same_weights(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("script", [train_cnn, train_vit])
def test_recipes_reach_the_same_accuracy(tmp_path, script):
    """With the recipe's optimizers: digits, two processes against one."""
    argv = ["--dataset", "digits", "--recipe", "fast", "--pictures", "off", "--out-dir"]
    script.main([*argv, str(tmp_path / "one")])
    in_processes(2, call, script.main, *argv, str(tmp_path / "two"), limit=300)
    accuracies = []
    for run in ("one", "two"):
        models = load_models([str(tmp_path / run / "best.pt")], torch.device("cpu"))
        data = load_data_for(models, None, None)
        labels = data.test.labels[data.test.indices]
        right = models[0].logits(data.test, data.classes).argmax(1) == labels
        accuracies.append(100 * right.float().mean().item())
    print(accuracies)
    assert abs(accuracies[0] - accuracies[1]) <= 1.5
