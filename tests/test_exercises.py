"""Each patch of EXERCISES.md, applied to a copy of the scripts and run; is its effect there?"""

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_VIT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import models as original_models
import training as original_training

PATCHES = ROOT / "tests" / "exercises"
SHORT = ["--dataset", "digits", "--device", "cpu", "--pictures", "off", "--epochs", "2"]
SMALL_CNN = ["--stem", "8", "--widths", "16", "32", "--depths", "0", "1"]

pytestmark = pytest.mark.skipif(not shutil.which("git"), reason="needs git")


def apply(name, folder):
    for file in (*ROOT.glob("*.py"), ROOT / "report.html"):
        shutil.copy(file, folder)
    subprocess.run(["git", "apply", PATCHES / f"{name}.patch"], cwd=folder, check=True)


@pytest.fixture
def edited(tmp_path, monkeypatch):
    """`edited(name)` applies a patch to a copy; returns a function that imports its modules."""
    ours = set()

    def make(name):
        apply(name, tmp_path)
        ours.update(file.stem for file in tmp_path.glob("*.py"))
        for module in ours:
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module

    yield make
    for module in ours:
        sys.modules.pop(module, None)


@pytest.fixture
def run(edited, tmp_path):
    """`run(name, script, ...)` trains with the patched script; returns (import, last.pt)."""

    def call(name, script="train_cnn", *flags):
        module = edited(name)
        tiny = {"train_cnn": SMALL_CNN, "train_vit": TINY_VIT}.get(script, [])
        out = ["--out-dir", str(tmp_path / "run")]
        module(script).main([*SHORT, *tiny, *out, *flags])
        return module, module("checkpoint").load_checkpoint(tmp_path / "run" / "last.pt")

    return call


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """The same training without any edit."""
    import train_cnn
    from checkpoint import load_checkpoint

    folder = tmp_path_factory.mktemp("before")
    train_cnn.main([*SHORT, *SMALL_CNN, "--out-dir", str(folder)])
    return load_checkpoint(folder / "last.pt")


def scalars(tmp_path):
    events = EventAccumulator(str(tmp_path / "run" / "train"))
    events.Reload()
    return {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}


def test_edits_are_small_and_each_is_explained():
    text = (ROOT / "EXERCISES.md").read_text()
    sizes = []
    for file in sorted(PATCHES.glob("*.patch")):
        assert file.stem in text, file.stem
        lines = file.read_text().splitlines()
        files = sum(line.startswith("+++") for line in lines)
        assert files == 1 + (file.stem == "11-network"), f"{file.stem}: one file each"
        added, removed = (
            sum(line[:1] == sign and line[:3] != 3 * sign for line in lines) for sign in "+-"
        )
        sizes.append(max(added, removed))
    assert len(sizes) == 22 and sorted(sizes[:13])[6] <= 4


def test_optimizer(run, before):
    _, last = run("01-optimizer")
    assert {"exp_avg_sq"} < set(last["optimizer"]["state"][1])
    assert set(before["optimizer"]["state"][0]) == {"momentum_buffer"}


def test_schedule(run, before):
    module, last = run("02-schedule")
    ends = [run["optimizer"]["param_groups"][0]["lr"] for run in (last, before)]
    assert ends[0] < ends[1] / 2
    lr_at = module("training").lr_at
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    scheduler = cosine(optimizer, 90)
    for step in range(10, 100):
        assert lr_at(step, 100, 0.1, 0.5) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_mixup(run, before):
    """Blended images are harder, and the loss of their labels cannot get near 0."""
    _, last = run("03-mixup")
    for old, new in zip(before["history"], last["history"], strict=True):
        assert new["train_loss"] > 1.05 * old["train_loss"]
        assert new["train_accuracy"] < old["train_accuracy"]


def test_scalar(run, tmp_path):
    module, last = run("04-scalar")
    points = scalars(tmp_path)["weight norm"]
    model = module("models").build_model(last["model_name"], last["model_config"])
    model.load_state_dict(last["model"])
    expected = torch.nn.utils.parameters_to_vector(model.parameters()).norm().item()
    assert [p.step for p in points] == [40, 80]
    assert points[-1].value == pytest.approx(expected, rel=1e-5)


def test_stage(edited):
    module = edited("05-stage")
    recipe, models = module("train_cnn").RECIPE, module("models")
    model = models.CNN(**{key: recipe[key] for key in ("stem", "widths", "depths")})
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 112, 4, 4)
    assert models.count_parameters(model) < 559_178


def test_attention_scale(run, tmp_path, capsys, monkeypatch):
    """The attention is as asked for, and a checkpoint of it warns where the edit is taken back."""
    module, _ = run("06-attention-scale", "train_vit")
    attention = module("models").Attention(8, 2)
    x = torch.randn(1, 5, 8)
    out, weights = attention(x, return_attention=True)
    q, k, _ = attention.qkv(x).view(5, 3, 2, 4).permute(1, 2, 0, 3)
    torch.testing.assert_close(weights[0], (q @ k.mT).softmax(-1))
    torch.testing.assert_close(attention(x), out)

    path = tmp_path / "run" / "best.pt"
    capsys.readouterr()
    module("checkpoint").load_model(path)
    assert capsys.readouterr().err == ""  # the network that was trained
    monkeypatch.setattr(module("checkpoint"), "build_model", original_models.build_model)
    module("checkpoint").load_model(path)
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {path}: its network computes other logits")
    assert err.count("\n") == 1


def test_data_set(run):
    _, last = run("07-data-set", "train_cnn", "--dataset", "stripes")
    assert last["classes"] == ["upright", "lying"]
    assert last["best"]["val_accuracy"] > 0.95


def test_freeze(run):
    module, last = run("08-freeze", "train_vit")
    torch.manual_seed(last["settings"]["seed"])
    start = module("models").build_model("vit", last["model_config"]).state_dict()
    same = {name for name, value in last["model"].items() if torch.equal(value, start[name])}
    assert same == {"patchify.weight", "patchify.bias"}


def test_gradient_norms(run, tmp_path):
    _, last = run("09-gradient-norms", "train_cnn", "--recipe", "fast")
    points = scalars(tmp_path)
    layers = [tag for tag in points if tag.startswith("gradient norm/")]
    assert "gradient norm/head.weight" in layers and "gradient norm/stem.weight" not in layers
    trained = {n for n in last["model"] if n.endswith(("weight", "bias"))} - {"stem.weight"}
    assert {tag.removeprefix("gradient norm/") for tag in layers} == trained
    assert all(points[tag][0].value > 0 for tag in layers)


def test_cam(edited, trained):
    """HiResCAM is Grad-CAM where the gradient is the same all over the map: for the CNN."""
    module = edited("10-cam")
    new = module("attribution")
    images = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for name, path in trained.items():
        model, _ = module("checkpoint").load_model(path)
        features, inside = model.forward_features(images, return_intermediates=True)
        A = inside["tokens" if name == "vit" else "map"][-1]
        (gradient,) = torch.autograd.grad(model.forward_head(features).diag().sum(), A)
        if name == "vit":
            A, gradient = new.token_map(A), new.token_map(gradient)
        weighted = gradient.mean((2, 3), keepdim=True) * A
        maps = new.attribute(model, images, torch.arange(10))
        torch.testing.assert_close(maps, (gradient * A).sum(1), rtol=1e-4, atol=1e-6)
        assert torch.allclose(maps, weighted.sum(1), atol=1e-6) == (name == "cnn")
        assert maps.max() > 1e-3


def test_grad_cam_plus_plus(edited, trained):
    """Equation 19, by loops."""
    module = edited("15-grad-cam-plus-plus")
    model, _ = module("checkpoint").load_model(trained["cnn"])
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(4)
    maps = module("attribution").attribute(model, images, targets, layer=0)
    features, inside = model.forward_features(images, return_intermediates=True)
    A = inside["map"][0]
    score = model.forward_head(features)[torch.arange(4), targets].sum()
    (gradient,) = torch.autograd.grad(score, A)
    A, g = A.detach().double().numpy(), gradient.double().numpy()
    expected = np.zeros((4, *A.shape[2:]))
    for b, k in np.ndindex(A.shape[:2]):
        weight = 0
        for i, j in np.argwhere(g[b, k] > 0):
            g2 = g[b, k, i, j] ** 2
            weight += g2 / (2 * g2 + A[b, k].sum() * g2 * g[b, k, i, j]) * g[b, k, i, j]
        expected[b] += weight * A[b, k]
    np.testing.assert_allclose(maps, expected, rtol=1e-3, atol=1e-5)


def test_network_of_ones_own(run, tmp_path, capsys):
    """An MLP-Mixer trains, resumes, is evaluated and explained by the scripts as they are."""
    tiny = ["--dim", "16", "--depth", "1", "--patch-size", "8"]
    module, last = run("11-network", "train_mixer", *tiny)
    assert last["model_name"] == "mixer" and last["history"][1]["train_loss"] < 2.3
    best = str(tmp_path / "run" / "best.pt")
    assert f"python explain.py {best}" in capsys.readouterr().out
    module("evaluate").main([best, "--out-dir", str(tmp_path / "evaluation")])
    (found,) = json.loads((tmp_path / "evaluation" / "metrics.json").read_text()).values()
    assert found["accuracy"] > 0.2 and found["model"] == "mixer"
    module("explain").main([best, "--count", "2", "--save-maps", "--out-dir", str(tmp_path)])
    maps = np.load(tmp_path / "run_maps-any.npz")["run_grad-cam_predicted"]
    assert maps.shape == (2, 4, 4) and maps.max() > 0


def test_range_test(edited):
    lr_at = edited("12-range-test")("training").lr_at
    rates = [lr_at(step, 500, 0.2, 10.0) for step in range(501)]
    assert rates[0] == pytest.approx(1e-4) and rates[500] == pytest.approx(10)
    ratios = [b / a for a, b in itertools.pairwise(rates)]
    assert ratios == pytest.approx([1e5 ** (1 / 500)] * 500)


def test_untrained(tmp_path):
    """At a rate of nearly 0 the weights stay those of the start."""
    import train_cnn
    from checkpoint import load_checkpoint
    from models import build_model

    rates = ["--lr", "1e-30"]
    out = ["--out-dir", str(tmp_path / "untrained")]
    train_cnn.main([*SHORT[:-1], "1", *SMALL_CNN, *rates, *out])
    best = load_checkpoint(tmp_path / "untrained" / "best.pt")
    torch.manual_seed(0)
    start = build_model("cnn", best["model_config"])
    for name, parameter in start.named_parameters():
        torch.testing.assert_close(best["model"][name], parameter.detach())


def test_permuted_patches(edited):
    """Each image has the same patches elsewhere. Only the ViT's positions could tell."""
    module = edited("16-permuted-patches")
    pixels = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    numbers = {"mean": [0.5] * 3, "std": [0.25] * 3}
    split = module("data").Split.of(pixels, torch.arange(4))
    ((new, _),) = module("batches").Batches(split, 4, **numbers)
    old = (pixels / 255 - 0.5) / 0.25
    before, after = (x.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3) for x in (old, new))
    differ = (after[0, :, :, None] - before[0, :, None]).abs().amax((0, 3, 4))  # (16, 16)
    order = differ.argmin(1).tolist()  # where each square was
    assert sorted(order) == list(range(16)) != order
    torch.testing.assert_close(after, before[:, :, order])
    vit = original_models.ViT(dim=16, depth=2, heads=2, patch_size=8)
    with torch.no_grad():
        expected = vit(old)
        vit.positions[:, 1:] = vit.positions[:, 1:][:, order]
        torch.testing.assert_close(vit(new), expected, atol=1e-5, rtol=1e-4)


def test_accumulation(edited, tmp_path):
    """Four batches of 8 images take the step that one batch of 32 takes."""
    module = edited("14-accumulation")
    training, models = module("training"), module("models")
    make_metadata = module("checkpoint").make_metadata
    images, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 10
    config = {"classes": 10, "dim": 16, "depth": 1, "heads": 2, "patch_size": 8}
    metadata = make_metadata(
        "vit", config, classes=list("0123456789"), mean=[0.5] * 3, std=[0.25] * 3
    )
    weights = []
    for train, size in ((training.train, 8), (original_training.train, 32)):
        torch.manual_seed(0)
        model = models.ViT(**config)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        batches = list(zip(images.split(size), labels.split(size), strict=True))
        settings = training.TrainingSettings(out_dir=tmp_path / str(size), epochs=2)
        assert train(model, optimizer, batches, None, settings, metadata)["step"] == 4
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------- break it


def test_bug_no_zero_grad(run, before):
    _, last = run("bug-1-no-zero-grad")
    grows = [row["grad_norm"] for row in last["history"]]
    assert grows[1] > 3 * before["history"][1]["grad_norm"]


def test_bug_softmax_twice(run, before):
    """Of 10 numbers from 0 to 1 the cross-entropy is never below ln(e + 9) - 1 = 1.46."""
    _, last = run("bug-4-softmax-twice")
    assert last["history"][-1]["train_loss"] > 1.8 > before["history"][-1]["train_loss"]


CAUGHT_BY = {
    "bug-1-no-zero-grad": "training::test_steps_are_those_of_gradient_descent_written_out",
    "bug-2-clip-scaled": "training::test_gradients_are_unscaled_before_they_are_clipped",
    "bug-3-validate-in-train-mode": "training::test_validation_leaves_batch_norm_alone",
    "bug-4-softmax-twice": "training::test_steps_are_those_of_gradient_descent_written_out",
    "bug-5-test-statistics": "data::test_statistics_are_those_of_the_pixels",
    "bug-6-same-draws": "distributed::test_a_network_draws_other_numbers_in_each_process",
    "bug-7-validate-one-part": "distributed::test_weights_and_scores_are_those_of_one_process",
}


def run_tests(folder, test: str) -> None:
    """Run a test of the copy of this project in `folder`, and write what pytest says."""
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent in (ROOT, ROOT / "tests"):
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    os.chdir(folder)
    with Path("said.txt").open("w") as said, contextlib.redirect_stdout(said):
        sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--capture=no", test]))


@pytest.mark.parametrize("bug", CAUGHT_BY)
def test_bug_is_caught(bug, tmp_path):
    apply(bug, tmp_path)
    shutil.copytree(ROOT / "tests", tmp_path / "tests")
    file, test = CAUGHT_BY[bug].split("::")
    # Forked: importing torch and torchvision again would take longer than the test.
    process = multiprocessing.get_context("fork").Process(
        target=run_tests, args=(tmp_path, f"tests/test_{file}.py::{test}")
    )
    process.start()
    process.join()
    text = (tmp_path / "said.txt").read_text()
    said = re.search(r"^E +(AssertionError|assert |.*(not close|not equal))", text, re.M)
    assert process.exitcode == 1 and said, text
    assert test in (ROOT / "EXERCISES.md").read_text()
