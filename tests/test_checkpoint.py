import os
import pickle
import shutil
import zipfile

import pytest
import torch
from conftest import ROOT

import checkpoint
import evaluate
import train_vit
from cli import UserError
from prepare import load_data_for, load_models


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def damaged(kind, good, folder):
    path = folder / "bad.pt"
    content = bytearray(good.read_bytes())
    if kind == "missing":
        return path
    if kind == "directory":
        path.mkdir()
        return path
    if kind == "empty":
        content = b""
    elif kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "text":
        content = b"accuracy: 83.1%\n"
    elif kind == "bit flipped":
        content[len(content) // 2] ^= 4
    elif kind == "compressed":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a", bytes(range(256)) * 100)
        content = bytearray(path.read_bytes())
        content[60:80] = bytes(20)
    elif kind == "pickle":
        content = pickle.dumps(RunsCode())
    elif kind == "torch pickle":
        torch.save({"model": RunsCode()}, path)
        return path
    elif kind == "other project's":
        torch.save({"state_dict": {"w": torch.zeros(2)}}, path)
        return path
    elif kind == "tensor":
        torch.save(torch.zeros(2), path)
        return path
    else:
        state = checkpoint.load_checkpoint(good)
        if kind == "other shapes":
            state["model_config"]["widths"] = [8, 9]
        elif kind == "lacks a tensor":
            del state["model"]["head.bias"]
        elif kind == "unknown model":
            state["model_name"] = "rnn"
        elif kind == "unknown argument":
            state["model_config"]["colour"] = "red"
        elif kind == "no history":
            state["history"] = []
        elif kind == "two means":
            state["mean"].pop()
        elif kind == "a deviation of 0":
            state["std"][1] = 0.0
        elif kind == "equal classes":
            state["classes"] = ["a"] * 10
        elif kind == "too few classes":
            state["classes"].pop()
        elif kind == "NaN":
            state["model"]["head.bias"][3] = float("nan")
        elif kind == "no data set":
            state["dataset"] = None
        checkpoint.save_checkpoint(path, state)
        return path
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing", "no such checkpoint"),
        ("directory", "is a folder"),
        ("empty", "not a checkpoint"),
        ("truncated", "not a checkpoint"),
        ("text", "not a checkpoint"),
        ("bit flipped", "damaged"),
        ("pickle", "not a checkpoint"),
        ("torch pickle", "which could run code"),
        ("other project's", "'model_name' missing or wrong"),
        ("tensor", "not a checkpoint of this project"),
        ("other shapes", "do not fit"),
        ("lacks a tensor", "head.bias"),
        ("unknown model", "unknown model 'rnn'"),
        ("unknown argument", "colour"),
        ("no history", "not finished an epoch"),
        ("no data set", "'dataset' missing or wrong"),
        ("two means", "'mean' missing or wrong"),
        ("a deviation of 0", "'std' missing or wrong"),
        ("equal classes", "'classes' missing or wrong"),
        ("too few classes", "it names 9 classes"),
        ("NaN", "not finite"),
        ("compressed", "not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(
    kind, says, trained, tmp_path, fails, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = damaged(kind, trained["cnn"], tmp_path)
    line = fails(evaluate.main, path)
    assert says in line and str(path) in line
    assert not (tmp_path / "it-ran").exists()


def test_a_failed_save_leaves_the_old_file(trained, tmp_path, monkeypatch):
    state = checkpoint.load_checkpoint(trained["cnn"])
    path = tmp_path / "last.pt"
    checkpoint.save_checkpoint(path, state)
    before = path.read_bytes()

    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=f"{path}: cannot be written .No space left on device"):
        checkpoint.save_checkpoint(path, state)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_published_weights_are_half_as_large_and_load_as_float32(trained, tmp_path):
    target = tmp_path / "small.pt"
    last = trained["vit"].with_name("last.pt")
    checkpoint.main([str(last), str(target)])
    whole, full = checkpoint.load_model(last)
    half, small = checkpoint.load_model(target)
    assert small["optimizer"] is None and small["history"] == full["history"]
    with pytest.raises(SystemExit):
        checkpoint.main([str(last), str(last)])  # would destroy what it reads
    assert checkpoint.load_checkpoint(last)["optimizer"] is not None
    assert small["model"]["head.weight"].dtype == torch.float16
    assert all(p.dtype == torch.float32 for p in half.parameters())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(half(x), whole(x), atol=1e-2, rtol=1e-2)


def test_load_model_prefers_averaged_weights(trained):
    state = checkpoint.load_checkpoint(trained["cnn"].with_name("last.pt"))
    model, _ = checkpoint.load_model(trained["cnn"].with_name("last.pt"))
    assert torch.equal(model.head.weight, state["ema"]["head.weight"])
    assert not torch.equal(model.head.weight, state["model"]["head.weight"])


def test_models_of_different_data_are_not_compared(trained, photos, tmp_path):
    state = checkpoint.load_checkpoint(trained["cnn"])
    state["dataset"]["name"] = "cifar10"
    other = tmp_path / "other.pt"
    checkpoint.save_checkpoint(other, state)
    models = load_models([str(trained["cnn"]), str(other)], "cpu")
    with pytest.raises(UserError, match="differ in their data set"):
        load_data_for(models, None, None)
    with pytest.raises(UserError, match="class 'bright' is none of the checkpoint's 10"):
        load_data_for(models, "folder", photos)


def test_published_networks_load_and_carry_their_test(capsys, tmp_path, monkeypatch):
    """The self-test passes on the networks as they are, and fails where one layer is changed."""
    for name in ("cnn", "vit"):
        path = ROOT / "pretrained" / f"{name}.pt"
        model, content = checkpoint.load_model(path)
        assert len(content["self_test"]) == 10
        assert capsys.readouterr().err == ""
        logits = model(checkpoint.formula_image(32))[0]
        torch.testing.assert_close(logits, torch.tensor(content["self_test"]), atol=1e-3, rtol=0)
    monkeypatch.setattr(torch.nn.functional, "gelu", torch.nn.functional.relu)
    checkpoint.load_model(ROOT / "pretrained" / "cnn.pt")
    assert "computes other logits" in capsys.readouterr().err


@pytest.mark.parametrize(("scale", "warns"), [(1.03, True), (1.002, False)])
def test_self_test_warns_above_one_percent(trained, scale, warns):
    model, content = checkpoint.load_model(trained["cnn"])
    with torch.no_grad():
        model.head.weight *= scale
        model.head.bias *= scale
    changed = checkpoint.changed_network(model, content)
    assert changed.startswith("its network computes other logits") == warns


def test_self_test_is_of_the_weights_as_stored(trained, tmp_path):
    """Also after halving, and of the averaged weights in last.pt."""
    checkpoint.main([str(trained["vit"]), str(tmp_path / "half.pt")])
    for path in (tmp_path / "half.pt", trained["vit"], trained["vit"].with_name("last.pt")):
        model, content = checkpoint.load_model(path)
        logits = model(checkpoint.formula_image(32))[0].tolist()
        assert content["self_test"] == pytest.approx(logits, abs=1e-6)


def test_the_best_epoch_is_written_before_the_last(trained, tmp_path, monkeypatch):
    """If the second file fails, last.pt is of the epoch before, and resuming repeats this one."""
    state = checkpoint.load_checkpoint(trained["cnn"].with_name("last.pt"))
    checkpoint.save_epoch(tmp_path, state)
    real, written = checkpoint.save_checkpoint, []

    def save(path, state, **named):
        written.append(path.name)
        real(path, state, **named)

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    checkpoint.save_epoch(tmp_path, state)
    assert written == ["best.pt", "last.pt"]


def test_resuming_compares_the_self_test(trained, tmp_path, fails):
    run = shutil.copytree(trained["vit"].parent, tmp_path / "run")
    state = checkpoint.load_checkpoint(run / "last.pt")
    state["settings"]["epochs"] += 1
    state["self_test"] = [2 * logit for logit in state["self_test"]]
    checkpoint.save_checkpoint(run / "last.pt", state)
    error = fails(train_vit.main, "--resume", "--out-dir", run)
    assert f"--resume: {run / 'last.pt'}: its network computes other logits" in error


@pytest.mark.parametrize("value", ["x", None, [], [[1.0] * 10], [1] * 10])
def test_a_malformed_self_test_is_refused(trained, tmp_path, value):
    state = checkpoint.load_checkpoint(trained["cnn"]) | {"self_test": value}
    checkpoint.save_checkpoint(tmp_path / "x.pt", state)
    with pytest.raises(UserError, match="'self_test' missing or wrong"):
        checkpoint.load_checkpoint(tmp_path / "x.pt")
    checkpoint.save_checkpoint(tmp_path / "x.pt", state | {"self_test": [1.0]})
    with pytest.raises(UserError, match="1 logits in its self-test, 10 of its network"):
        checkpoint.load_model(tmp_path / "x.pt")


def test_a_checkpoint_of_another_models_py_is_not_published(trained, tmp_path, fails):
    state = checkpoint.load_checkpoint(trained["cnn"])
    state["self_test"] = [2 * logit for logit in state["self_test"]]
    checkpoint.save_checkpoint(tmp_path / "x.pt", state)
    error = fails(checkpoint.main, tmp_path / "x.pt", tmp_path / "y.pt")
    assert "models.py has changed" in error and not (tmp_path / "y.pt").exists()
