"""torch.compile and DataParallel leave no trace in checkpoints; metadata are checked first."""

import shutil

import numpy as np
import pytest
import torch
from conftest import TINY_CNN, TINY_VIT
from torch import nn

import explain
import optimizers
import train_cnn
import train_vit
import training
from attribution import attribute
from checkpoint import load_checkpoint, load_model, make_metadata, restore, save_checkpoint
from cli import UserError
from models import CNN, MODELS, unwrap
from training import TrainingSettings

DIGITS = ["--dataset", "digits", "--device", "cpu", "--amp", "off", "--limit-batches", "5"]
DIGITS += ["--recipe", "fast", "--pictures", "off"]
CONFIG = {"classes": 10, "stem": 4, "widths": [8, 8], "depths": [0, 0]}
FACTS = {"classes": list("0123456789"), "mean": [0.5] * 3, "std": [0.25] * 3}
IMAGES = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def aot_eager(monkeypatch):
    """Replace the compiler, which takes minutes, by one that only captures the graphs."""
    compile_in_place, compiled = nn.Module.compile, []

    def compile_quickly(model):
        compiled.append(type(model).__name__)
        compile_in_place(model, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_quickly)
    return compiled


def same(a: dict, b: dict, tolerance=1e-5):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=tolerance, rtol=1e-4)


@pytest.mark.parametrize(("script", "tiny"), [(train_cnn, TINY_CNN), (train_vit, TINY_VIT)])
def test_compiled_and_eager_runs_are_interchangeable(
    tmp_path, monkeypatch, interrupted, script, tiny
):
    """A run begun eagerly and resumed compiled has the weights of the eager run."""
    argv = [*DIGITS, *tiny, "--epochs", "2"]
    script.main([*argv, "--out-dir", str(tmp_path / "eager")])
    interrupted(script.main, *argv, "--out-dir", tmp_path / "mixed")
    compiled = aot_eager(monkeypatch)
    script.main(["--resume", "--compile", "--out-dir", str(tmp_path / "mixed")])
    assert compiled == ["CNN" if script is train_cnn else "ViT"]
    eager, mixed = (load_checkpoint(tmp_path / d / "last.pt") for d in ("eager", "mixed"))
    same(eager["model"], mixed["model"], tolerance=1e-3)
    same(eager["ema"], mixed["ema"], tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "tiny"), [(train_cnn, TINY_CNN), (train_vit, TINY_VIT)])
def test_the_real_compiler(tmp_path, script, tiny, capsys, monkeypatch):
    """With the random numbers of eager code, and Muon in float32: bfloat16 enlarges rounding."""
    from torch._inductor import config

    monkeypatch.setattr(optimizers, "fast_bfloat16", lambda device: False)
    argv = [*DIGITS, *tiny, "--epochs", "1", "--out-dir"]
    with config.patch(fallback_random=True):
        for flags, name in (([], "eager"), (["--compile"], "compiled")):
            script.main([*argv, str(tmp_path / name), *flags])
    eager, compiled = (load_checkpoint(tmp_path / d / "best.pt") for d in ("eager", "compiled"))
    same(eager["model"], compiled["model"], tolerance=1e-3)
    explain.main([str(tmp_path / "compiled" / "best.pt"), "--out-dir", str(tmp_path / "maps")])
    assert "warning" not in capsys.readouterr().err


WRAPPERS = {
    "torch.compile": lambda model: torch.compile(model, backend="aot_eager"),
    "DataParallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="aot_eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_leaves_no_prefix(tmp_path, wrapper):
    batches = [(IMAGES, torch.arange(16) % 10)] * 2
    results = []
    for name, wrap in (("plain", lambda model: model), ("wrapped", WRAPPERS[wrapper])):
        torch.manual_seed(0)
        network = CNN(**CONFIG)
        model = wrap(network)
        assert unwrap(model) is network
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        settings = TrainingSettings(out_dir=tmp_path / name, ema_decay=0.9)
        metadata = make_metadata("cnn", CONFIG, **FACTS)
        training.train(model, optimizer, batches, batches, settings, metadata)
        results.append([load_checkpoint(tmp_path / name / f"{f}.pt") for f in ("best", "last")])
    for plain, wrapped in zip(*results, strict=True):
        same(plain["model"], wrapped["model"])
        assert plain["history"][0]["val_loss"] == pytest.approx(wrapped["history"][0]["val_loss"])
    load_model(tmp_path / "wrapped" / "best.pt")


def test_a_training_by_hand_can_go_on_from_what_train_returns(tmp_path):
    batches = [(IMAGES, torch.arange(16) % 10)] * 2
    torch.manual_seed(0)
    model = CNN(**CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metadata, last = make_metadata("cnn", CONFIG, **FACTS), None
    for epochs in (1, 2):
        settings = TrainingSettings(out_dir=tmp_path, epochs=epochs)
        last = training.train(model, optimizer, batches, None, settings, metadata, last)
        same(last["model"], load_checkpoint(tmp_path / "last.pt")["model"])
        assert last.keys() == load_checkpoint(tmp_path / "last.pt").keys()
    assert [row["epoch"] for row in last["history"]] == [1, 2]
    with pytest.raises(UserError, match="is of another run"):  # begun again: nothing is replaced
        training.train(model, optimizer, batches, None, settings, metadata)
    best = load_checkpoint(tmp_path / "best.pt")
    best["best"]["epoch"] = 3  # last.pt was not written after it
    save_checkpoint(tmp_path / "best.pt", best)
    found = restore(last, model, optimizer, torch.amp.GradScaler("cpu"), None, tmp_path)
    assert found == (4, best["best"], last["history"])
    settings = TrainingSettings(out_dir=tmp_path, epochs=3)
    with pytest.raises(UserError, match="has 2 steps; with these batches it has 1: use"):
        training.train(model, optimizer, batches[:1], None, settings, metadata, last)


def test_images_of_another_size_than_the_metadata_say_are_refused(tmp_path):
    """evaluate.py would scale to 32 pixels what was chosen at 64. Training may use other sizes."""
    small, batches = ([(torch.randn(8, 3, size, size), torch.arange(8))] for size in (32, 64))
    model = CNN(**CONFIG)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = TrainingSettings(out_dir=tmp_path)
    with pytest.raises(UserError, match="have 64×64 pixels, the metadata say 32×32"):
        training.train(
            model, optimizer, small, batches, settings, make_metadata("cnn", CONFIG, **FACTS)
        )
    metadata = make_metadata("cnn", CONFIG, **FACTS, dataset={"image_size": 64})
    training.train(model, optimizer, small, batches, settings, metadata)
    assert load_model(tmp_path / "best.pt")[1]["dataset"]["image_size"] == 64


def test_decay_spares_the_positions_of_a_wrapped_vit():
    vit = MODELS["vit"](dim=16, depth=1, heads=2, patch_size=8)
    compiled = torch.compile(vit, backend="aot_eager")
    groups = [optimizers.parameter_groups(m.named_parameters(), 0.1) for m in (vit, compiled)]
    ids = [[[id(p) for p in group["params"]] for group in pair] for pair in groups]
    assert ids[0] == ids[1] and id(vit.positions) in ids[1][1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": None}, "'mean'"),
        ({"model_config": CONFIG | {"stem": 5}}, "size mismatch for stem.weight"),
        ({"model_config": {"classes": 10, "colour": "red"}}, "colour"),
        ({"model_name": "rnn"}, "unknown model 'rnn'"),
    ],
)
def test_metadata_are_checked_before_the_first_step(tmp_path, changes, message):
    model = CNN(**CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metadata = make_metadata("cnn", CONFIG, **FACTS) | changes
    settings, batches = TrainingSettings(out_dir=tmp_path), [(IMAGES, torch.arange(16) % 10)]
    with pytest.raises(UserError, match=message):
        training.train(
            model, torch.optim.SGD(model.parameters()), batches, None, settings, metadata
        )
    same(before, model.state_dict())
    assert not list(tmp_path.iterdir())


class OnlyForward(nn.Sequential):
    """A network without `forward_features`."""

    def __init__(self, classes: int = 10):
        super().__init__(
            nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 7 * 7, classes)
        )


def test_a_network_of_forward_alone_is_explained(tmp_path, monkeypatch, fails):
    """By occlusion, or input × gradient: for one linear layer, the product with the weight."""
    monkeypatch.setitem(MODELS, "only-forward", OnlyForward)
    metadata = make_metadata("only-forward", {"classes": 10}, **FACTS)
    model, batches = OnlyForward(), [(IMAGES, torch.arange(16) % 10)]
    settings = TrainingSettings(out_dir=tmp_path / "run")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training.train(model, optimizer, batches, None, settings, metadata)
    argv = [tmp_path / "run" / "best.pt", "--dataset", "digits", "--count", 2, "--save-maps"]
    explain.main([*map(str, argv), "--out-dir", str(tmp_path / "maps")])
    maps = np.load(tmp_path / "maps" / "run_maps-any.npz")["run_occlusion_predicted"]
    assert maps.shape == (2, 8, 8) and maps.min() < 0 < maps.max()
    argv += ["--out-dir", tmp_path / "maps", "--layer", "7"]
    assert "--layer 7: occlusion has no choice of layers" in fails(explain.main, *argv)

    linear = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    images, targets = torch.randn(5, 3, 8, 8), torch.arange(5)
    expected = (linear[1].weight[targets].view(5, 3, 8, 8) * images).sum(1)
    ours = attribute(linear, images, targets, "input-x-gradient")
    torch.testing.assert_close(ours, expected)


class Detached(CNN):
    def forward_features(self, x, return_intermediates=False):
        x = super().forward_features(x)
        return (x, {"map": [x.detach()]}) if return_intermediates else x


class NoList(CNN):
    def forward_features(self, x, return_intermediates=False):
        x = super().forward_features(x)
        return (x, {"map": x}) if return_intermediates else x


class UnknownKey(CNN):
    def forward_features(self, x, return_intermediates=False):
        x = super().forward_features(x)
        return (x, {"maps": [x]}) if return_intermediates else x


class OtherForward(CNN):
    def forward(self, x):
        return super().forward(x.flip(1))


class OtherHeads(CNN):
    def forward_features(self, x, return_intermediates=False):
        x = super().forward_features(x)
        layers = [x.mean() * torch.ones(len(x), heads, 17, 17) for heads in (2, 3)]
        return (x, {"attention": layers}) if return_intermediates else x


class NoHead(nn.Sequential):
    def __init__(self, classes: int = 10, **_):
        super().__init__(nn.Flatten(), nn.Linear(3072, classes))

    def forward_features(self, x, return_intermediates=False):
        x = x.flatten(1)
        return (x, {"map": [self[1].weight * 2]}) if return_intermediates else x


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OtherHeads, "'attention' differ in shape from layer to layer"),
        (NoHead, "no forward_head: define both"),
        (Detached, "'map' are detached"),
        (NoList, "'map' are not a list of tensors"),
        (UnknownKey, "unknown intermediates 'maps'"),
        (OtherForward, "is not forward_head"),
    ],
)
def test_intermediates_are_checked_before_the_first_step(tmp_path, monkeypatch, kind, message):
    monkeypatch.setitem(MODELS, "own", kind)
    model, batches = kind(**CONFIG), [(IMAGES, torch.arange(16) % 10)]
    metadata, settings = make_metadata("own", CONFIG, **FACTS), TrainingSettings(out_dir=tmp_path)
    with pytest.raises(UserError, match=message):
        training.train(
            model, torch.optim.SGD(model.parameters()), batches, None, settings, metadata
        )


def test_metadata_may_have_numbers_of_numpy(tmp_path):
    """Those could not be loaded again."""
    numbers = {"mean": np.full(3, 0.5), "std": np.full(3, 0.25, dtype=np.float32)}
    metadata = make_metadata("cnn", CONFIG, **FACTS | numbers, settings={"lr": np.float64(0.1)})
    model, batches = CNN(**CONFIG), [(IMAGES, torch.arange(16) % 10)]
    optimizer, settings = torch.optim.SGD(model.parameters()), TrainingSettings(out_dir=tmp_path)
    training.train(model, optimizer, batches, None, settings, metadata)
    assert load_checkpoint(tmp_path / "last.pt")["std"] == [0.25] * 3


def test_a_network_changed_after_it_was_built_is_refused(tmp_path):
    """Same parameters, other function: its checkpoint would load as another network."""
    config = {"classes": 10, "dim": 16, "depth": 1, "heads": 2, "patch_size": 8}
    model = MODELS["vit"](**config)
    model.blocks[0].mlp[1] = nn.Tanh()
    nn.init.normal_(model.blocks[0].mlp[0].weight)
    metadata, settings = make_metadata("vit", config, **FACTS), TrainingSettings(out_dir=tmp_path)
    batches = [(IMAGES, torch.arange(16) % 10)]
    with pytest.raises(UserError, match="computes other logits"):
        training.train(
            model, torch.optim.SGD(model.parameters()), batches, None, settings, metadata
        )


@pytest.mark.parametrize("change", ["momentum", "weight_decay", "betas"])
def test_resuming_with_other_optimizer_arguments_is_refused(trained, tmp_path, fails, change):
    shutil.copytree(trained["vit"].parent, tmp_path / "run")
    state = load_checkpoint(tmp_path / "run" / "last.pt")
    state["settings"]["epochs"] += 1
    part = 0 if change == "momentum" else 1
    state["optimizer"][part]["param_groups"][0][change] = (0.5, 0.6) if change == "betas" else 0.5
    torch.save(state, tmp_path / "run" / "last.pt")
    line = fails(train_vit.main, "--resume", "--out-dir", tmp_path / "run")
    assert f"the optimizer's {change} was" in line
