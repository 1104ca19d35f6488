import contextlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_CNN, TINY_VIT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

import cli
import evaluate
import explain
import logs
import optimizers
import prepare
import settings as settings_module
import train_cnn
import train_vit
import training
from batches import Batches
from checkpoint import (
    load_checkpoint,
    load_model,
    make_metadata,
    rebuild,
    save_checkpoint,
    self_test,
)
from data import load_data
from models import CNN, MODELS, ViT, build_model
from optimizers import Muon, muon_and_adamw
from settings import choose_amp
from training import TrainingSettings, lr_at, mixed_seed, update_average

FAST = ["--dataset", "digits", "--recipe", "fast", "--device", "cpu", "--amp", "off"]
FAST += ["--limit-batches", "5", "--pictures", "off"]
RANDOM = ["--drop-path", "0.1", "--mix", "0.5", "--trivial-augment", "1"]


def test_lr_at_its_corners():
    rates = [lr_at(step, 100, 0.1, 0.5) for step in range(100)]
    assert rates[0] == pytest.approx(0.05) and rates[9] == rates[10] == 0.5 == max(rates)
    assert rates[55] == pytest.approx(0.25) and rates[99] == pytest.approx(0.5 / 90)
    assert lr_at(100, 100, 0.1, 0.5) == 0
    assert lr_at(0, 100, 0, 0.5) == 0.5  # no warm-up
    assert lr_at(0, 1, 0.1, 0.5) == 0.5  # one step in all


def test_seeds_differ():
    assert len({mixed_seed(s, e) for s in range(20) for e in range(20)}) == 400


def test_average_follows_a_constant_exactly_and_a_change_by_one_minus_d():
    model = torch.nn.BatchNorm1d(2)
    ema = torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(3)
        ema.weight.fill_(1)
        model.running_mean.fill_(5)
    update_average(ema, model, step=10_000, decay=0.9)
    assert ema.weight.tolist() == pytest.approx([1.2, 1.2])
    assert ema.running_mean.tolist() == pytest.approx([0.5, 0.5])
    update_average(ema, model, step=0, decay=0.9)  # (1 + 0) / (10 + 0) is less than .9
    assert ema.weight.tolist() == pytest.approx([0.12 + 2.7] * 2)


def test_muon_has_the_hidden_matrices_and_decay_spares_norms_biases_and_positions():
    settings = SimpleNamespace(lr=0.5, muon_lr=0.25, weight_decay=0.1)
    for model, matrices, weights in (
        (
            ViT(dim=16, depth=1, heads=2, patch_size=8),
            {"blocks.0.attention.qkv.weight", "blocks.0.attention.project.weight",
             "blocks.0.mlp.0.weight", "blocks.0.mlp.2.weight"},
            {"patchify.weight", "head.weight"},
        ),
        (
            CNN(stem=4, widths=(8,), depths=(1,)),
            {"stages.0.conv.weight", "stages.0.blocks.0.conv1.weight",
             "stages.0.blocks.0.conv2.weight"},
            {"stem.weight", "head.weight"},
        ),
    ):  # fmt: skip
        hidden = model.blocks if isinstance(model, ViT) else model.stages
        names = {id(p): n for n, p in model.named_parameters()}
        muon, decayed, rest = muon_and_adamw(model, hidden, settings).param_groups
        assert {names[id(p)] for p in muon["params"]} == matrices
        assert {names[id(p)] for p in decayed["params"]} == weights
        assert decayed["weight_decay"] == 0.1 and rest["weight_decay"] == 0
        assert (muon["lr"], decayed["lr"], rest["lr"]) == (0.25, 0.5, 0.5)
        assert sum(len(group["params"]) for group in (muon, decayed, rest)) == len(names)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 1, 3, 3), (64, 2, 3, 3), (6, 9), (9, 6)])
def test_muon_steps_are_those_of_pytorch(memory, shape, monkeypatch):
    """Three steps of three matrices in bfloat16, as torch.optim.Muon takes them one by one."""
    monkeypatch.setattr(optimizers, "fast_bfloat16", lambda device: True)
    torch.manual_seed(0)  # of random 9×6 matrices one in 150 differs by 3 units
    memory = {"memory_format": memory} if len(shape) == 4 else {}
    start = torch.randn(3, *shape)
    ours = [torch.nn.Parameter(w.clone(**memory)) for w in start]
    theirs = [torch.nn.Parameter(w.flatten(1).clone()) for w in start]
    muon = Muon(ours, lr=0.1, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1)
    for lr in (0.1, 0.3, 0.2):
        before = [
            (w.detach().flatten(1).clone(), r.detach().clone())
            for w, r in zip(ours, theirs, strict=True)
        ]
        for w, r in zip(ours, theirs, strict=True):
            gradient = torch.randn(shape)
            w.grad, r.grad = gradient.to(**memory), gradient.flatten(1).clone()
        for optimizer in (muon, reference):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        for w, r, (w_before, r_before) in zip(ours, theirs, before, strict=True):
            update, expected = w.detach().flatten(1) - w_before, r.detach() - r_before
            ulp = expected.abs().max().bfloat16()
            ulp = torch.nextafter(ulp, torch.tensor(torch.inf).bfloat16()) - ulp
            assert (update - expected).abs().max() <= 2 * ulp
            cosine = torch.nn.functional.cosine_similarity
            assert cosine(update.flatten(), expected.flatten(), dim=0) > 0.9999
    assert all((w - s).norm() > 0.1 for w, s in zip(ours, start, strict=True))


def test_muon_in_float32_agrees_with_bfloat16_and_with_the_singular_vectors(monkeypatch):
    matrix = torch.randn(24, 60, generator=torch.Generator().manual_seed(0))
    found = {}
    for fast in (False, True):
        monkeypatch.setattr(optimizers, "fast_bfloat16", lambda device, fast=fast: fast)
        # One batch: each matrix is divided by its own norm.
        found[fast], scaled = optimizers.orthogonalise(torch.stack([matrix, 100 * matrix]))
        torch.testing.assert_close(found[fast], scaled, atol=0.02 if fast else 1e-5, rtol=0)
    ours, half = found[False], found[True]
    assert half.dtype == torch.bfloat16 and ours.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(ours.flatten(), half.flatten(), dim=0) > 0.999
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.T @ ours @ vt.T  # diagonal, since only the singular values change
    assert (inside - inside.diag().diag()).abs().max() < 1e-4
    assert inside.diag().min() > 0.6 and inside.diag().max() < 1.3


@pytest.mark.parametrize("stem", [6, 5])
def test_stem_gives_the_principal_components_of_patches_and_is_frozen(stem):
    """Against NumPy's singular values of all patches, cut out one by one."""
    images = torch.nn.functional.avg_pool2d(torch.randn(8, 3, 12, 12), 3, stride=1)
    model = CNN(stem=stem, widths=(8,), depths=(0,))
    train_cnn.whiten(model, images)
    patches = [images[:, :, y : y + 3, x : x + 3].flatten(1) for y in range(8) for x in range(8)]
    singular = np.linalg.svd(torch.cat(patches).numpy(), compute_uv=False)[:3]
    filters = model.stem.weight
    components = torch.nn.functional.conv2d(images, filters[:3]).transpose(0, 1).flatten(1)
    expected = torch.tensor(singular**2).diag()
    torch.testing.assert_close(components @ components.T, expected, atol=1e-3, rtol=1e-4)
    assert torch.equal(filters[3:], -filters[: stem - 3]) and not filters.requires_grad


def history_but_times(checkpoint):
    times = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in times} for row in checkpoint["history"]]


def leaves(tree) -> list:
    """All that dicts and lists hold, however deep."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [x for part in tree for x in leaves(part)] if isinstance(tree, list) else [tree]


@pytest.mark.parametrize(
    ("script", "tiny"), [(train_cnn, TINY_CNN), (train_vit, [*TINY_VIT, *RANDOM])]
)
def test_killed_and_resumed_is_the_run_that_was_never_killed(tmp_path, interrupted, script, tiny):
    argv = [*FAST, *tiny, "--epochs", "3", "--erase", "4"]
    script.main([*argv, "--out-dir", str(tmp_path / "whole")])
    interrupted(script.main, *argv, "--out-dir", tmp_path / "parts")
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["epoch"] == 1
    torch.manual_seed(12345)  # the state of the generator must not matter
    script.main(["--resume", "--out-dir", str(tmp_path / "parts"), "--device", "cpu"])

    whole, parts = (load_checkpoint(tmp_path / d / "last.pt") for d in ("whole", "parts"))
    assert parts["epoch"] == 3 and parts["step"] == 15 and parts["best"] == whole["best"]
    assert history_but_times(whole) == history_but_times(parts)
    for key in ("model", "ema"):
        for name, tensor in whole[key].items():
            assert torch.equal(tensor, parts[key][name]), (key, name)
    bests = [load_checkpoint(tmp_path / d / "best.pt") for d in ("whole", "parts")]
    assert len(bests[0]["history"]) == 3
    for name, tensor in bests[0]["model"].items():
        assert torch.equal(tensor, bests[1]["model"][name]), name
    for a, b in zip(leaves(whole["optimizer"]), leaves(parts["optimizer"]), strict=True):
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    for run in (whole, parts):  # 5 batches of 32 in an epoch
        seconds = np.diff([0, *(row["seconds"] for row in run["history"])])
        assert [row["images_per_second"] for row in run["history"]] * seconds == pytest.approx(160)


def test_checkpoints_rebuild_their_model_and_say_what_they_saw(trained):
    for name, path in trained.items():
        best, last = load_checkpoint(path), load_checkpoint(path.with_name("last.pt"))
        assert best["model_name"] == name and best["classes"] == list("0123456789")
        assert best["dataset"]["name"] == "digits" and best["ema"] is best["optimizer"] is None
        assert last["optimizer"] is not None and len(last["history"]) == last["epoch"] == 2
        json.dumps({k: last[k] for k in ("history", "settings", "best", "versions")})
        model, _ = load_model(path)
        assert not model.training
        x = torch.randn(2, 3, 32, 32)
        model2 = type(model)(**best["model_config"]).eval()
        model2.load_state_dict(best["model"])
        assert torch.equal(model(x), model2(x))


def test_validation_scores_the_weights_of_best_pt(trained):
    """The row of the best epoch, measured again from best.pt alone."""
    for path in trained.values():
        model, c = load_model(path)
        batches = Batches(load_data("digits", ".").val, 64, mean=c["mean"], std=c["std"])
        right = sum((model(x).argmax(1) == y).sum().item() for x, y in batches)
        assert right / 144 == pytest.approx(c["best"]["val_accuracy"])


def test_other_seed_other_run_same_splits(tmp_path, monkeypatch):
    rows, splits = [], []

    def load(*args, **kwargs):
        data = load_data(*args, **kwargs)
        splits.append([p.indices.tolist() for p in (data.train, data.val, data.test)])
        return data

    monkeypatch.setattr(prepare, "load_data", load)
    for i, seed in enumerate(("0", "0", "1")):
        argv = [*FAST, *TINY_CNN, "--epochs", "1", "--seed", seed, "--out-dir", tmp_path / str(i)]
        train_cnn.main(list(map(str, argv)))
        rows.append(history_but_times(load_checkpoint(tmp_path / str(i) / "last.pt")))
    assert rows[0] == rows[1] != rows[2]
    assert splits[0] == splits[1] == splits[2]


def test_without_validation_best_is_the_last_epoch(tmp_path):
    argv = [*FAST, *TINY_CNN, "--epochs", "2", "--val-fraction", "0", "--out-dir", str(tmp_path)]
    train_cnn.main(argv)
    best = load_checkpoint(tmp_path / "best.pt")
    assert best["epoch"] == 2 and best["history"][-1]["val_accuracy"] is None


def test_a_dataloader_swaps_in_and_is_seeded_by_the_loop(tmp_path):
    images, labels = torch.randn(96, 3, 32, 32), torch.arange(96) % 10
    loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
    metadata = make_metadata(
        "cnn", {"classes": 10, "stem": 4, "widths": [8, 8], "depths": [0, 0]},
        classes=list("0123456789"), mean=[0.5] * 3, std=[0.25] * 3,
    )  # fmt: skip
    histories = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        torch.manual_seed(1)
        model = CNN(stem=4, widths=(8, 8), depths=(0, 0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.rand(len(folder.name) + len(histories))  # what was drawn before does not matter
        settings = TrainingSettings(out_dir=folder, epochs=2, warmup=0.2, ema_decay=0.9)
        state = training.train(model, optimizer, loader, loader, settings, metadata)
        assert load_model(folder / "best.pt")[1]["best"] == state["best"]
        assert state["step"] == 6
        histories.append(history_but_times(state))
    assert histories[0] == histories[1]


class Linear(torch.nn.Sequential):
    """A network of one layer, for images of 2×2 pixels."""

    def __init__(self, classes: int):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(12, classes))


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setitem(MODELS, "linear", Linear)


def train_linear(folder, batches, model, optimizer, **changes) -> dict:
    """The loop called by hand on a small network, without averaging or warm-up."""
    settings = {"epochs": 2, "clip": 0.05, "label_smoothing": 0.2, "out_dir": folder}
    metadata = make_metadata(
        "linear", {"classes": 5}, classes=list("abcde"), mean=[0.5] * 3, std=[0.25] * 3,
        dataset={"image_size": 2}, settings={"epochs": 2},
    )  # fmt: skip
    settings = TrainingSettings(**settings | changes)
    return training.train(model, optimizer, batches, None, settings, metadata)


def test_best_pt_has_the_weights_that_were_best_on_validation(tmp_path, monkeypatch):
    model, batches, optimizer = linear_and_batches()
    accuracies, weights = iter([0.5, 0.9, 0.7]), []

    def scripted(model, *_):
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"val_loss": 1.0, "val_accuracy": next(accuracies)}, None

    monkeypatch.setattr(training, "validate", scripted)
    train_linear(tmp_path, batches, model, optimizer, epochs=3)
    best, last = (load_checkpoint(tmp_path / f"{name}.pt") for name in ("best", "last"))
    for state, epoch in ((best, 2), (last, 3)):
        assert state["epoch"] == epoch and len(state["history"]) == 3
        assert state["best"] == {"epoch": 2, "val_accuracy": 0.9}
        for name, value in weights[epoch - 1].items():
            assert torch.equal(state["model"][name], value)


SIZE = {"dataset": {"image_size": 2}}  # what validation needs of the metadata


def test_validation_is_the_plain_loss_and_accuracy_of_all_images():
    model, batches, _ = linear_and_batches()
    batches[2] = tuple(part[:3] for part in batches[2])  # an incomplete batch counts as much less
    settings = TrainingSettings(out_dir="", label_smoothing=0.2)
    found, answers = training.validate(model, batches, SIZE, settings, contextlib.nullcontext())
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    log_p = model(images).log_softmax(1)
    plain = -log_p[torch.arange(len(labels)), labels].mean().item()
    assert found["val_loss"] == pytest.approx(plain, rel=1e-5)
    assert found["val_accuracy"] == (log_p.argmax(1) == labels).sum().item() / 19
    torch.testing.assert_close(answers[0], model(images))
    assert torch.equal(answers[1], labels)
    settings = TrainingSettings(out_dir="", limit_batches=2)
    _, answers = training.validate(model, batches, SIZE, settings, contextlib.nullcontext())
    assert torch.equal(answers[1], labels[:16])


def test_a_tie_makes_the_later_epoch_the_best():
    for accuracy, expected in ((0.4, False), (0.5, True), (0.6, True), (None, True)):
        row, best = {"val_accuracy": accuracy}, {"epoch": 1, "val_accuracy": 0.5}
        assert training.is_best(row, best) == expected
    assert training.is_best({"val_accuracy": 0.1}, None)


def test_validation_leaves_batch_norm_alone():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 5)).train()
    before = model[0].running_mean.clone()
    settings, batches = (
        TrainingSettings(out_dir=""),
        [(torch.randn(8, 12) + 3, torch.arange(8) % 5)],
    )
    training.validate(model, batches, SIZE, settings, contextlib.nullcontext())
    assert torch.equal(model[0].running_mean, before)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx2": True, "avx512_bf16": False}, "off"),
    ],
)
def test_bfloat16_where_it_is_fast(capabilities, expected, monkeypatch):
    fast = optimizers.fast_bfloat16.__wrapped__  # not from the cache
    monkeypatch.setattr(settings_module, "fast_bfloat16", fast)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_amp("auto", torch.device("cpu")) == expected
    assert choose_amp("auto", torch.device("mps")) == "off"
    for half, type_name in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, h=half: h)
        assert choose_amp("auto", torch.device("cuda")) == type_name


def test_amp_chosen():
    cpu = torch.device("cpu")
    assert [choose_amp(name, cpu) for name in ("off", "bf16")] == ["off", "bf16"]
    with pytest.raises(cli.UserError, match="--amp fp16"):
        choose_amp("fp16", cpu)


def test_the_type_of_a_run_is_stored_and_kept(tmp_path, monkeypatch, capsys, interrupted):
    """`auto` is resolved when a run starts. Where it would differ on resuming, one line says so."""
    argv = ["--dataset", "digits", *TINY_CNN, "--epochs", "2", "--device", "cpu"]
    argv += ["--limit-batches", "2", "--pictures", "off", "--out-dir", str(tmp_path / "run")]
    monkeypatch.setattr(settings_module, "fast_bfloat16", lambda device: True)
    interrupted(train_cnn.main, *argv)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["settings"]["amp"] == "bf16"
    monkeypatch.setattr(settings_module, "fast_bfloat16", lambda device: False)
    capsys.readouterr()
    train_cnn.main([*argv, "--resume"])
    printed = capsys.readouterr().out
    assert "bfloat16" in printed and "--amp off is faster" in printed
    assert load_checkpoint(tmp_path / "run" / "last.pt")["settings"]["amp"] == "bf16"


@pytest.mark.parametrize(("script", "flag"), [(train_cnn, "mix"), (train_vit, "patch-dropout")])
def test_a_flag_that_an_older_run_lacks_has_its_default(script, flag, trained, tmp_path, fails):
    """For the network that of its constructor: the recipe may have changed since."""
    model = script.__name__.removeprefix("train_")
    run = shutil.copytree(trained[model].parent, tmp_path / "run")
    state = load_checkpoint(run / "last.pt")
    del state["settings"][flag.replace("-", "_")]
    save_checkpoint(run / "last.pt", state)
    script.main(["--resume", f"--{flag}", "0", "--out-dir", str(run)])  # finished, no conflict
    error = fails(script.main, "--resume", f"--{flag}", 0.5, "--out-dir", run)
    assert f"--{flag} 0.5 conflicts" in error


@pytest.mark.parametrize("argv", [["--recipe", "plain"], ["--dataset", "digits"]])
def test_the_plain_recipe_leaves_out_no_patch(argv, tmp_path):
    parser = settings_module.training_parser("", train_vit.RECIPE, train_vit.CHANGES)
    parser.add_argument("--patch-dropout", type=float)
    typed = [*argv, "--out-dir", str(tmp_path)]
    flags, _ = settings_module.parse_flags(parser, typed, "vit", train_vit.CHANGES)
    assert flags.patch_dropout == 0 and train_vit.RECIPE["patch_dropout"] == 0.5


def test_batches_for_training_have_the_flags_of_augmentation():
    flags = {"batch_size": 8, "flip": True, "shift": 3, "erase": 5, "trivial_augment": 0.5}
    flags |= {"mix": 0.25, "balance": True}
    batches, val_batches = prepare.make_batches(
        load_data("digits", "."), SimpleNamespace(**flags), torch.device("cpu")
    )
    assert {key: getattr(batches, key) for key in flags} == flags
    assert batches.train and not val_batches.train


def test_forward_is_in_the_type_of_amp(tmp_path):
    for amp, dtype in (("bf16", torch.bfloat16), ("off", torch.float32)):
        model, batches, optimizer = linear_and_batches()
        found = []
        model.register_forward_hook(lambda *args, found=found: found.append(args[-1].dtype))
        train_linear(tmp_path / amp, batches, model, optimizer, amp=amp)
        assert found[-6:] == [dtype] * 6  # two epochs of three batches


def test_every_epoch_has_its_own_seed(tmp_path):
    model, batches, optimizer = linear_and_batches()
    drawn = []

    class Recorded(list):
        def __iter__(self):
            drawn.append(torch.initial_seed())
            return super().__iter__()

    train_linear(tmp_path, Recorded(batches), model, optimizer, epochs=3, seed=5)
    assert drawn == [mixed_seed(5, epoch) for epoch in (1, 2, 3)] and len(set(drawn)) == 3


def test_a_schedule_may_return_numbers_of_numpy(tmp_path, monkeypatch):
    """Those would be in last.pt, which could not be loaded again."""
    monkeypatch.setattr(training, "lr_at", lambda step, total, warmup, peak: np.float64(peak / 2))
    model, batches, optimizer = linear_and_batches()
    train_linear(tmp_path, batches, model, optimizer)
    (group,) = load_checkpoint(tmp_path / "last.pt")["optimizer"]["param_groups"]
    assert (group["initial_lr"], group["lr"]) == (0.5, 0.25)


def test_a_group_may_have_a_learning_rate_of_its_own(tmp_path):
    model, batches, _ = linear_and_batches()
    slow = {"params": [model[1].weight], "lr": 0.125}
    optimizer = torch.optim.SGD([slow, {"params": [model[1].bias]}], lr=0.5)
    train_linear(tmp_path, batches, model, optimizer)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.125 / 6, 0.5 / 6])


def linear_and_batches():
    torch.manual_seed(0)
    model = Linear(5)
    batches = [(torch.randn(8, 3, 2, 2), torch.randint(5, (8,))) for _ in range(3)]
    return model, batches, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def test_steps_are_those_of_gradient_descent_written_out(tmp_path):
    """Rate, smoothed loss, clipping, momentum and average, from their definitions."""
    model, batches, optimizer = linear_and_batches()
    w, b = (p.detach().clone() for p in model.parameters())
    state = train_linear(tmp_path / "hard", batches, model, optimizer, ema_decay=0.2)
    velocity, norms = [torch.zeros_like(w), torch.zeros_like(b)], []
    average, right = w.clone(), []
    for step in range(6):
        x, y = batches[step % 3]
        x = x.flatten(1)
        right.append(((x @ w.T + b).argmax(1) == y).sum().item())
        targets = 0.8 * torch.eye(5)[y] + 0.2 / 5
        error = ((x @ w.T + b).softmax(1) - targets) / 8  # gradient of the mean cross-entropy
        gradients = [error.T @ x, error.sum(0)]
        norms.append(sum(g.square().sum() for g in gradients).sqrt().item())
        lr = 0.5 * (6 - step) / 6
        for parameter, g, v in zip((w, b), gradients, velocity, strict=True):
            v.mul_(0.9).add_(g * min(1, 0.05 / norms[-1]))
            parameter -= lr * v
        average.lerp_(w, 1 - min(0.2, (2 + step) / (11 + step)))
    torch.testing.assert_close(state["ema"]["1.weight"], average, atol=1e-5, rtol=0)
    torch.testing.assert_close(state["model"]["1.weight"], w, atol=1e-5, rtol=0)
    torch.testing.assert_close(state["model"]["1.bias"], b, atol=1e-5, rtol=0)
    means = [sum(norms[:3]) / 3, sum(norms[3:]) / 3]
    assert min(norms) > 0.05  # each was clipped
    assert [row["grad_norm"] for row in state["history"]] == pytest.approx(means, rel=1e-4)
    accuracies = [row["train_accuracy"] for row in state["history"]]
    assert accuracies == [sum(right[:3]) / 24, sum(right[3:]) / 24]
    model, batches, optimizer = linear_and_batches()
    soft = [(x, torch.eye(5)[y]) for x, y in batches]  # class probabilities
    state = train_linear(tmp_path / "soft", soft, model, optimizer)
    assert [row["train_accuracy"] for row in state["history"]] == accuracies


def test_a_network_draws_other_numbers_in_each_step_epoch_and_seed(tmp_path):
    drawn = []

    def draw(network, *_):
        if network.training:
            drawn.append(torch.rand(()).item())

    for seed in (0, 1):
        model, batches, optimizer = linear_and_batches()
        model.register_forward_hook(draw)
        train_linear(tmp_path / str(seed), batches, model, optimizer, seed=seed)
    assert len(drawn) == len(set(drawn)) == 2 * 2 * 3


def test_gradients_are_unscaled_before_they_are_clipped(tmp_path, monkeypatch):
    """One step at rate 1 in float16, whose scaler multiplies by 65,536, is as long as `clip`."""
    model, batches, _ = linear_and_batches()
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    monkeypatch.setattr(training, "choose_amp", lambda name, device: "fp16")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    train_linear(tmp_path, batches[:1], model, optimizer, epochs=1)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.05, rel=1e-3)


def test_muon_gets_unscaled_gradients_and_skips_infinite_ones():
    torch.manual_seed(0)
    model = CNN(stem=4, widths=(8,), depths=(0,))
    settings = SimpleNamespace(lr=0.1, muon_lr=0.1, weight_decay=0.1)
    optimizer = muon_and_adamw(model, model.stages, settings)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    (gradient,) = torch.autograd.grad(loss, model.stages[0].conv.weight, retain_graph=True)
    scaler = torch.amp.GradScaler("cpu")
    for factor, moves in ((float("inf"), False), (1.0, True)):
        scaler.scale(loss * factor).backward(retain_graph=True)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = [not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)]
        assert all(moved) if moves else not any(moved)
    momentum = optimizer.parts[0].state[model.stages[0].conv.weight]["momentum_buffer"]
    torch.testing.assert_close(momentum.view_as(gradient), 0.05 * gradient, atol=1e-6, rtol=1e-4)


def test_tensorboard_has_the_curves_and_a_resumed_run_no_zigzag(tmp_path, monkeypatch):
    argv = [*FAST, *TINY_CNN, "--epochs", "3", "--out-dir", str(tmp_path)]
    real = training.save_epoch

    def killed_before_the_second_save(out_dir, checkpoint):
        if checkpoint["epoch"] == 2:
            raise KeyboardInterrupt
        real(out_dir, checkpoint)

    monkeypatch.setattr(training, "save_epoch", killed_before_the_second_save)
    with pytest.raises(SystemExit):
        train_cnn.main(argv)
    monkeypatch.undo()
    train_cnn.main(["--resume", "--out-dir", str(tmp_path)])
    history = load_checkpoint(tmp_path / "last.pt")["history"]
    for part in ("train", "val"):
        events = EventAccumulator(str(tmp_path / part)).Reload()
        for tag in ("loss", "accuracy"):
            points = events.Scalars(f"epoch/{tag}")
            assert [p.step for p in points] == [5, 10, 15]
            assert [p.value for p in points] == pytest.approx([r[f"{part}_{tag}"] for r in history])
    train_events = EventAccumulator(str(tmp_path / "train")).Reload()
    tags = train_events.Tags()
    rates = {"step/learning rate Muon", "step/learning rate AdamW"}
    assert {"step/loss", "step/gradient norm", *rates} < set(tags["scalars"])
    losses = train_events.Scalars("step/loss")
    assert [p.step for p in losses] == list(range(1, 16))
    mean = np.mean([p.value for p in losses[5:10]])
    assert mean == pytest.approx(history[1]["train_loss"], rel=1e-5)
    rate = train_events.Scalars("step/learning rate Muon")[-1].value
    assert rate == pytest.approx(0.02 / (15 - round(0.2 * 15)), rel=1e-5)  # the last step's
    (tag,) = (tag for tag in tags["tensors"] if "settings" in tag)
    assert b"|batch_size|`32`|" in train_events.Tensors(tag)[0].tensor_proto.string_val[0]


def test_curves_of_learning_rates_keep_their_names():
    """By their peaks, also where a schedule has both groups at 0 for a step."""
    one, two = (torch.nn.Parameter(torch.zeros(1)) for _ in "ab")
    sgd = torch.optim.SGD([{"params": [one], "lr": 0.1}, {"params": [two], "lr": 0.2}])
    names = {"learning rate SGD 1": 0.1, "learning rate SGD 2": 0.2}
    assert optimizers.learning_rates(sgd) == names
    for group in sgd.param_groups:
        group["initial_lr"], group["lr"] = group["lr"], 0.0
    assert optimizers.learning_rates(sgd).keys() == names.keys()


@pytest.mark.parametrize(("script", "tiny"), [(train_cnn, TINY_CNN), (train_vit, TINY_VIT)])
def test_larger_images_of_a_folder(photos, tmp_path, script, tiny, numbers_only):
    """Both networks adapt, and what reads the checkpoint knows."""
    argv = ["--dataset", "folder", "--data-dir", photos, "--image-size", 64, "--batch-size", 8]
    argv += [
        "--epochs",
        1,
        "--device",
        "cpu",
        "--out-dir",
        tmp_path / "run",
        *tiny,
        "--pictures",
        "off",
    ]
    script.main([str(a) for a in argv])
    checkpoint = tmp_path / "run" / "best.pt"
    model, content = load_model(checkpoint)
    if isinstance(model, ViT):
        assert model.positions.shape == (1, 1 + 8 * 8, 16)
    else:
        assert model.forward_features(torch.zeros(1, 3, 64, 64)).shape == (1, 8, 16, 16)
    assert content["dataset"]["image_size"] == 64
    evaluate.main([str(checkpoint), "--out-dir", str(tmp_path / "evaluation")])
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert metrics[str(checkpoint)]["images"] == 8
    explain.main([str(checkpoint), "--save-maps", "--out-dir", str(tmp_path / "maps")])
    method = "attention" if isinstance(model, ViT) else "grad-cam_predicted"
    maps = np.load(next((tmp_path / "maps").glob("*.npz")))[f"run_{method}"]
    assert maps.shape == ((8, 8, 8) if isinstance(model, ViT) else (8, 16, 16))


def test_sizes_are_not_mixed(trained, photos, tmp_path, fails):
    """Checkpoints of 64-pixel images beside, on, or as teachers of 32-pixel ones."""
    state = load_checkpoint(trained["cnn"])
    state["dataset"]["image_size"] = 64
    network = rebuild(state, state["ema"] or state["model"])
    state["self_test"] = self_test(network, state)  # it was of 32 pixels
    large = tmp_path / "large.pt"
    save_checkpoint(large, state)
    photo = photos / "test" / "dark" / "03.png"
    line = fails(explain.main, trained["cnn"], large, "--images", photo)
    assert "differ in their image size" in line
    assert "images of 64×64; digits has 32×32" in fails(evaluate.main, large)
    argv = [*FAST, *TINY_VIT, "--teacher", large, "--out-dir", tmp_path / "run"]
    assert "trained on other images, sizes" in fails(train_vit.main, *argv)


def test_a_test_split_that_has_changed_is_refused(photos, tmp_path, fails, numbers_only):
    """A folder of one level: an image renamed after the training, which moves all the others."""
    root = shutil.copytree(photos / "train", tmp_path / "photos")
    argv = ["--dataset", "folder", "--data-dir", root, "--batch-size", 8, "--epochs", 1]
    argv += ["--pictures", "off"]
    train_cnn.main([*map(str, argv), *TINY_CNN, "--out-dir", str(tmp_path / "run")])
    best = tmp_path / "run" / "best.pt"
    evaluate.main([str(best), "--out-dir", str(tmp_path / "evaluation")])
    (root / "dark" / "05.png").rename(root / "dark" / "zz.png")
    assert "files were added, removed or changed" in fails(evaluate.main, best)
    other_words = root / ".." / "photos"
    assert "files were added" in fails(evaluate.main, best, "--data-dir", other_words)
    (root / "dark" / "zz.png").rename(root / "dark" / "05.png")
    evaluate.main([str(best), "--out-dir", str(tmp_path / "evaluation")])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_good_epoch(tmp_path, fails, monkeypatch):
    real = training.lr_at
    monkeypatch.setattr(training, "lr_at", lambda step, *a: 1e30 if step > 6 else real(step, *a))
    line = fails(train_cnn.main, *FAST, *TINY_CNN, "--epochs", 3, "--out-dir", tmp_path)
    assert (
        "in epoch 2 (by step 10): start again with a lower --lr" in line and "keeps epoch 1" in line
    )
    for name in ("best.pt", "last.pt"):
        state = load_checkpoint(tmp_path / name)
        assert state["epoch"] == 1
        assert all(t.isfinite().all() for t in state["model"].values())


@pytest.mark.parametrize(("lr", "fraction"), [("1e30", 0), ("1e20", 0.1)])
def test_weights_ruined_by_the_last_step_are_not_saved(tmp_path, fails, lr, fraction):
    argv = ["--dataset", "digits", "--limit-batches", 1, "--epochs", 1, "--val-fraction", fraction]
    argv += [*TINY_CNN, "--weight-decay", "1e30"]  # a decay of 1e60
    line = fails(train_cnn.main, *argv, "--lr", lr, "--out-dir", tmp_path)
    assert "the weights are no longer finite" in line and not list(tmp_path.glob("*.pt"))


def test_statistics_of_batch_norm_that_are_not_finite_are_not_saved(tmp_path, fails):
    """The norms hide the scale of the weights, so the loss stays finite. Loading would refuse."""
    argv = ["--dataset", "digits", "--recipe", "fast", "--limit-batches", 4, "--epochs", 1]
    argv += [*TINY_CNN, "--val-fraction", 0, "--muon-lr", "1e25", "--out-dir", tmp_path]
    line = fails(train_cnn.main, *argv)
    assert "or the weights are no longer finite" in line and "--muon-lr" in line
    assert not list(tmp_path.glob("*.pt"))


def test_overwrite_removes_a_runs_own_files_only(tmp_path):
    (tmp_path / "train").mkdir()
    mine = ("notes.txt", "train/cat.png", "train/events.txt")
    for name in mine:
        (tmp_path / name).write_text("mine")
    argv = [*FAST, *TINY_CNN, "--epochs", "1", "--out-dir", str(tmp_path)]
    train_cnn.main(argv)
    train_cnn.main([*argv, "--overwrite", "--seed", "1"])
    assert all((tmp_path / name).exists() for name in mine)
    assert len(list(tmp_path.glob("train/events.out.*"))) == 1
    (point,) = EventAccumulator(str(tmp_path / "train")).Reload().Scalars("epoch/loss")
    history = load_checkpoint(tmp_path / "last.pt")["history"]
    assert point.value == pytest.approx(history[0]["train_loss"])  # the new run's


def test_rows_are_as_wide_as_their_head():
    row = {
        "epoch": 3, "step": 12345, "train_loss": 2.3, "train_accuracy": 1.0, "val_loss": None,
        "val_accuracy": None, "grad_norm": math.pi, "images_per_second": 123456.0,
        "seconds": 12345.6,
    }  # fmt: skip
    assert len(logs.table_row(row)) == len(logs.TABLE_HEAD)


def test_a_vit_learns_from_a_teacher(trained, photos, tmp_path, fails):
    argv = [*FAST, *TINY_VIT, "--epochs", "1", "--teacher", str(trained["cnn"])]
    train_vit.main([*argv, "--out-dir", str(tmp_path / "taught")])
    train_vit.main([*argv[:-2], "--out-dir", str(tmp_path / "alone")])
    taught, alone = (load_checkpoint(tmp_path / d / "best.pt") for d in ("taught", "alone"))
    assert taught["settings"]["teacher"] == str(trained["cnn"])
    model = build_model("vit", taught["model_config"])
    prepare.load_teacher(trained["cnn"], tmp_path, taught, model)
    taught["dataset"]["teacher"][0] += 1
    with pytest.raises(cli.UserError, match="it has changed since this run was started"):
        prepare.load_teacher(trained["cnn"], tmp_path, taught, model)
    assert taught["history"][0]["train_loss"] != alone["history"][0]["train_loss"]

    state = load_checkpoint(trained["cnn"])
    state["mean"] = [mean + 0.1 for mean in state["mean"]]
    save_checkpoint(tmp_path / "other.pt", state)
    other = [*argv[:-1], tmp_path / "other.pt", "--out-dir", tmp_path / "refused"]
    assert "trained on other images" in fails(train_vit.main, *other)

    before = (tmp_path / "taught" / "last.pt").read_bytes()
    others = ["--dataset", "folder", "--data-dir", photos, "--batch-size", 8, "--overwrite"]
    line = fails(train_vit.main, *argv, *others, "--out-dir", tmp_path / "taught")
    assert "--teacher" in line and "(digits, 10 classes)" in line
    own = ["--teacher", tmp_path / "taught" / "best.pt", "--overwrite"]
    line = fails(train_vit.main, *argv[:-2], *own, "--out-dir", tmp_path / "taught")
    assert "is in --out-dir" in line
    assert (tmp_path / "taught" / "last.pt").read_bytes() == before


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--epochs", "0"], "--epochs"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--batch-size", "99999"], "--batch-size 99999 is more than the 1293"),
        (["--dataset", "digits", "--image-size", "64"], "--image-size"),
        (["--dataset", "imagenet"], "--dataset"),
        (["--patch-size", "5"], "--patch-size 5 does not divide an image of 32"),
        (["--heads", "7"], "--heads 7 does not divide --dim 16"),
        (["--nonsense"], "--nonsense"),
        (["--amp", "fp16"], "--amp fp16"),
        (["--seed", str(2**64)], "--seed"),
        (["--resume", "--overwrite"], "not allowed with"),
        (["--resume"], "last.pt: no such checkpoint"),
        (["--dataset", "folder", "--data-dir", "no/such/place"], "--data-dir no/such/place"),
        (["--val-fraction", "0.001"], "--val-fraction 0.001"),
        (["--dim", "400000000"], "--dim 400000000 --depth 2"),
        (["--mlp-ratio", "1e300"], "is too large"),
        (["--mlp-ratio", "1e308"], "is too large"),
        (["--weight-decay", "1e39"], "--weight-decay: '1e39' is not a number from 0"),
    ],
)
def test_bad_flags(tmp_path, fails, argv, says):
    line = fails(train_vit.main, *FAST, *TINY_VIT, "--out-dir", tmp_path / "run", *argv)
    assert says in line
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_here(tmp_path, fails):
    line = fails(train_cnn.main, "--dataset", "digits", "--device", "cuda", "--out-dir", tmp_path)
    assert "--device cuda" in line


def test_no_network(tmp_path, fails, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "url", "https://localhost:1/cifar-10-python.tar.gz")
    line = fails(train_cnn.main, "--data-dir", tmp_path / "d", "--out-dir", tmp_path / "run")
    assert "cannot get CIFAR-10" in line and "--dataset digits" in line


def test_occupied_out_dir(trained, fails):
    before = trained["cnn"].read_bytes()
    line = fails(train_cnn.main, "--dataset", "digits", "--out-dir", trained["cnn"].parent)
    assert "--resume" in line and "--overwrite" in line
    assert trained["cnn"].read_bytes() == before


def test_out_dir_that_cannot_be_written(tmp_path, fails):
    (tmp_path / "file").write_text("")
    line = fails(train_cnn.main, "--dataset", "digits", "--out-dir", tmp_path / "file" / "run")
    assert str(tmp_path / "file") in line


def test_resume_conflicts_are_named(trained, fails):
    out_dir = trained["cnn"].parent
    line = fails(train_cnn.main, "--resume", "--out-dir", out_dir, "--lr", "0.7")
    assert "--lr 0.7 conflicts" in line
    line = fails(train_cnn.main, "--resume", "--out-dir", out_dir, "--image-size", "64")
    assert "--image-size 64 conflicts" in line and "has 32" in line
    line = fails(train_vit.main, "--resume", "--out-dir", trained["vit"].parent, "--teacher", "x")
    assert "--teacher x conflicts" in line
    assert "is a cnn" in fails(train_vit.main, "--resume", "--out-dir", out_dir)


@pytest.mark.parametrize("other", ["groups", "optimizers", "AdamW for SGD", "Muon for SGD"])
def test_resume_refuses_other_groups_and_other_optimizers(trained, tmp_path, fails, other):
    state = load_checkpoint(trained["vit"].with_name("last.pt"))
    state["settings"]["epochs"] += 1
    if other == "groups":
        state["optimizer"][1]["param_groups"].pop()
    elif other == "AdamW for SGD":
        groups = state["optimizer"][1]["param_groups"]
        for group in groups:
            del group["betas"]
    elif other == "Muon for SGD":
        del state["optimizer"][0]["param_groups"][0]["momentum"]
    else:
        state["optimizer"] = state["optimizer"][1]
    save_checkpoint(tmp_path / "last.pt", state)
    assert "best.pt is missing" in fails(train_vit.main, "--resume", "--out-dir", tmp_path)
    shutil.copy(trained["vit"], tmp_path)
    line = fails(train_vit.main, "--resume", "--out-dir", tmp_path)
    assert "last.pt does not fit" in line


def test_published_weights_are_no_training_to_resume(trained, tmp_path, fails):
    shutil.copy(trained["cnn"], tmp_path / "last.pt")
    assert "weights only" in fails(train_cnn.main, "--resume", "--out-dir", tmp_path)


def test_an_overwriting_run_that_fails_leaves_the_old_one(tmp_path, fails):
    argv = [*FAST, *TINY_CNN, "--epochs", "1", "--out-dir", str(tmp_path)]
    train_cnn.main(argv)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) == 4  # checkpoints and curves
    fails(train_cnn.main, *argv, "--overwrite", "--lr", "1e30")
    assert before == {path: path.read_bytes() for path in before}
    for part in ("train", "val"):
        assert EventAccumulator(str(tmp_path / part)).Reload().Scalars("epoch/loss")  # not hidden


def test_what_is_typed_goes_before_digits_and_digits_before_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there are no runs
    changes = train_cnn.CHANGES | {"best": {"clip": 3.0, "lr": 0.1, "warmup": 0.5}}
    parser = settings_module.training_parser("", train_cnn.RECIPE, changes)
    argv = ["--recipe", "best", "--dataset", "digits", "--lr", "0.3"]
    settings, _ = settings_module.parse_flags(parser, argv, "cnn", changes)
    assert settings.clip == 3.0 and settings.warmup == 0.5
    assert settings.out_dir == Path("runs/digits-cnn-best")
    assert settings.lr == 0.3 and settings.flip is False
    assert settings.batch_size == changes["digits"]["batch_size"]
    assert settings.weight_decay == train_cnn.RECIPE["weight_decay"]
    settings, _ = settings_module.parse_flags(parser, ["--lr", "0.3"], "cnn", changes)
    assert settings.clip == train_cnn.RECIPE["clip"] and settings.lr == 0.3
    assert settings.flip is True and settings.batch_size == train_cnn.RECIPE["batch_size"]
