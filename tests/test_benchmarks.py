"""Each script of benchmarks/ once, with its smallest settings, in this process."""

import importlib
import json
import os
import platform
import signal
import statistics
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY_CNN
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation
import alternatives
import common
import curves
import explain_cost
import gpu
import ingredients
import make_jpeg_copy
import originals
import peers
import seeds
import shortcut
import throughput
import unbalanced

import evaluate
import models
import train_cnn
import train_vit
import training
from checkpoint import load_checkpoint, load_model, save_checkpoint
from cli import UserError
from data import load_data

CLASSES = ["bright", "dark"]  # of the fixture `photos`
SCRIPTS = (
    "ablation alternatives curves explain_cost gpu make_jpeg_copy make_photos notebook originals "
    "seeds shortcut throughput unbalanced"
).split()
PACKAGES = {"make_photos": "skimage", "notebook": "lightning"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Recipes with small networks and batches of 8."""
    cnn = {"stem": 4, "widths": [8, 8], "depths": [0, 1]}
    vit = {"dim": 16, "depth": 2, "heads": 2, "patch_size": 8}
    for script, sizes in ((train_cnn, cnn), (train_vit, vit)):
        for key, value in (sizes | {"batch_size": 8}).items():
            monkeypatch.setitem(script.RECIPE, key, value)


@pytest.fixture
def results(tmp_path):
    """Flags for a file of results, and a function that reads its rows."""
    file = tmp_path / "results" / "rows.jsonl"
    read = lambda: [json.loads(line) for line in file.read_text().splitlines()]  # noqa: E731
    return SimpleNamespace(flags=["--results", str(file)], rows=read)


def load_script(name):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    return importlib.import_module(name)


def assert_environment(row):
    assert row["threads"] == torch.get_num_threads()
    assert row["torch"] == torch.__version__
    assert row["device"] and row["date"]


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name, capsys):
    script = load_script(name)
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])
    assert end.value.code == 0
    assert f"python benchmarks/{name}.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "argv"),
    [
        ("ablation", ["cnn", "--data-dir", "x", "--epochs", "0"]),
        ("ablation", ["cnn", "--data-dir", "x", "--threads", "many"]),
        ("gpu", ["plan", "--data-dir", "x", "--out-dir", "y", "--minutes", "0"]),
        ("notebook", ["--data-dir", "x", "--steps", "0"]),
        ("seeds", ["cnn", "--target", "83.1"]),
        ("seeds", ["cnn", "--target", ".5", "--seeds", "-1"]),
        ("throughput", ["cnn", "--rounds", "1.5"]),
    ],
)
def test_bad_number(name, argv, fails):
    error = fails(load_script(name).main, *argv)
    assert "is not a" in error
    assert argv[-1] in error


@pytest.mark.parametrize("name", ["make_jpeg_copy", "make_photos"])
def test_existing_folder_is_not_overwritten(name, fails, tmp_path):
    source = [tmp_path] if name == "make_jpeg_copy" else []
    assert "exists already" in fails(load_script(name).main, *source, tmp_path)


def test_unknown_variant(fails, photos):
    error = fails(ablation.main, "vit", "--data-dir", photos, "--variants", "plain", "relu")
    assert "'relu'" in error and "qk-norm" in error


def test_batch_larger_than_the_training_split(fails, photos, results, monkeypatch):
    monkeypatch.setitem(train_vit.RECIPE, "batch_size", 64)
    argv = ["vit", "--data-dir", photos, "--variants", "plain", *results.flags]
    assert "fewer images than a batch" in fails(ablation.main, *argv)


# ---------------------------------------------------------------- speed


@pytest.mark.parametrize(("model", "rounds", "compiled"), [("cnn", 1, True), ("vit", 2, False)])
def test_throughput(model, rounds, compiled, results, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "PEAK_SIZE", 32)
    networks = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: networks.append(network))
    flags = ["--steps", "2", "--rounds", str(rounds), "--peak"] + ["--compile"] * compiled
    flags += [] if compiled else ["--parts", "--amp", "off", "bf16"]
    throughput.main([model, *flags, *results.flags])
    (row,) = results.rows()
    assert_environment(row)
    ways = ["bare", "loop", "batches", "augmented"]
    if compiled:
        ways = [way + suffix for way in ways for suffix in ("", " compiled")]
    else:
        ways = [f"{way} {amp}" for way in ways for amp in ("off", "bf16")]
        parts = ["batch", "forward", "backward", "gradient norm", "Muon", "AdamW", "average"]
        assert list(row["parts"]) == parts and sum(row["parts"].values()) == pytest.approx(
            1, abs=1e-3
        )
    assert list(row["ways"]) == ways and len(networks) == 4 * compiled
    assert (row["model"], row["batch_size"], row["steps"]) == (model, 8, 2)
    for way, values in row["ways"].items():
        assert values["images_per_second"] > 0 and values["share_of_peak"] > 0
        assert len(values["ratios"]) == rounds and min(values["ratios"]) > 0
        assert values["times_bare"] == pytest.approx(statistics.mean(values["ratios"]), abs=2e-3)
        assert ("times_loop" in values) == way.startswith(("batches", "augmented"))
    assert row["ways"][ways[0]]["ratios"] == [1.0] * rounds
    table = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in table if line in ways] == ways


def test_step_flops_of_a_vit():
    settings = common.recipe_settings("vit", depth=1, heads=1, dim=8, patch_dropout=0.0)
    batch = torch.zeros(3, 3, 32, 32), torch.zeros(3, dtype=torch.long)
    per_image = 16 * 8 * 3 * 8 * 8  # patches
    per_image += 17 * 8 * 8 * 3 + 8 * 8 * (1 + 2 + 2)  # qkv; project, MLP of the class token
    linear = 3 * (2 * 3 * (per_image + 8 * 10))  # forward, and gradients of input and weight
    linear -= 3 * 2 * 16 * 8 * 3 * 8 * 8  # no gradient of the images
    attention = 3 * 3 * 2 * 2 * 17 * 8  # two products, of one query
    assert throughput.step_flops("vit", settings, batch) == linear + attention


def test_notebook(results, photos, monkeypatch):
    notebook = load_script("notebook")
    monkeypatch.setattr(notebook, "BATCH", 4)
    argv = ["--data-dir", str(photos), "--steps", "1", "--rounds", "1", "--epoch"]
    notebook.main([*argv, *results.flags])
    (row,) = results.rows()
    assert_environment(row)
    ways = ["notebook", "dataloader", "loop", "recipe"]
    assert list(row["images_per_second"]) == list(row["times_the_notebook"]) == ways
    assert min(row["images_per_second"].values()) > 0
    assert row["times_the_notebook"]["notebook"] == 1.0
    epoch = row["epoch"]
    assert 0 <= epoch["val_accuracy"] <= 1
    images = len(load_data("folder", photos, val_fraction=0.2).train)
    assert epoch["images_per_second"] * epoch["seconds"] == pytest.approx(images, rel=0.2)
    assert epoch["seconds_40_epochs"] == pytest.approx(40 * epoch["seconds"], abs=3)


# ---------------------------------------------------------------- accuracy


@pytest.fixture(scope="module")
def teacher(photos, tmp_path_factory):
    """A checkpoint with the classes of `photos`."""
    out = tmp_path_factory.mktemp("teacher")
    flags = ["--dataset", "folder", "--data-dir", str(photos), "--epochs", "1", "--batch-size", "8"]
    flags += ["--pictures", "off"]
    train_cnn.main([*flags, *TINY_CNN, "--out-dir", str(out)])
    return out / "best.pt"


@pytest.mark.parametrize("network", ["cnn", "vit"])
def test_all_variants(network, results, photos, teacher, monkeypatch):
    monkeypatch.setitem(ablation.VARIANTS["cnn"]["batch-64"].settings, "batch_size", 4)
    argv = [network, "--data-dir", str(photos), "--epochs", "1", "--limit-batches", "1"]
    ablation.main([*argv, "--seed", "3", "--teacher", str(teacher), *results.flags])
    rows = {row["variant"]: row for row in results.rows()}
    assert list(rows) == list(ablation.VARIANTS[network])
    for row in rows.values():
        assert_environment(row)
        assert row["network"] == network
        assert (row["epochs"], row["limit_batches"], row["seed"]) == (1, 1, 3)
        assert len(row["val_accuracy"]) == 1 and 0 <= row["val_accuracy"][0] <= 1
        assert 0 <= row["train_accuracy"] <= 1 and row["seconds"] >= 0
    plain = rows["plain"]["parameters"]
    more = {name: row["parameters"] - plain for name, row in rows.items()}
    expected = {"squeeze-excitation": (8 + 1) + (8 + 8), "qk-norm": 2 * 2 * 8}
    expected |= {"layer-scale": 2 * 2 * 16}
    assert more == {name: expected.get(name, 0) for name in rows}
    assert models.F is F and list(models.MODELS) == ["cnn", "vit"]


def test_changes_of_the_cnn(monkeypatch):
    monkeypatch.setattr(models, "F", F)
    model = common.new_model("cnn", common.recipe_settings("cnn")).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model.forward_features(x)
        ingredients.relu(model, None)
        after = model.forward_features(x)
        ingredients.gelu(model, None)
        assert torch.equal(model.forward_features(x), before)
    assert before.min() < 0 <= after.min()
    ingredients.whitened_start(model, [(x, None)])
    assert model.stem.weight.requires_grad
    ingredients.whitened_stem(model, [(x, None)])
    assert not model.stem.weight.requires_grad
    ingredients.zero_last_norm(model, None)
    block = model.stages[1].blocks[0]
    maps = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        assert torch.equal(block(maps), F.gelu(maps))


def test_alternating_flip_mirrors_each_image_in_every_second_epoch(photos):
    data = load_data("folder", photos)
    settings = common.recipe_settings("cnn", batch_size=7, shift=0, erase=0, flip=False)
    batches, _ = ablation.make_batches(data, settings, torch.device("cpu"))
    torch.manual_seed(0)
    plain = torch.cat([images for images, _ in batches])
    ingredients.alternating_flip(None, batches)
    epochs = []
    for _ in range(2):
        torch.manual_seed(0)  # the same order
        epochs.append(torch.cat([images for images, _ in batches]))
    assert len(plain) == 21
    mirrored = [[torch.equal(a, b.flip(2)) for a, b in zip(e, plain, strict=True)] for e in epochs]
    same = [[torch.equal(a, b) for a, b in zip(e, plain, strict=True)] for e in epochs]
    assert mirrored[0] == same[1] and mirrored[1] == same[0]
    assert 0 < sum(mirrored[0]) < 21 and sum(mirrored[0]) + sum(same[0]) == 21


def test_a_signal_ends_a_benchmark():
    class Interrupted(list):
        def __iter__(self):
            yield self[0]
            os.kill(os.getpid(), signal.SIGTERM)
            yield self[0]

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = Interrupted([(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))] * 2)
    with pytest.raises(SystemExit, match="143"):
        common.train_for(model, optimizer, batches, None, classes=2)


def test_train_for_uses_the_schedule_and_restores_what_it_replaces():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))] * 3
    history = common.train_for(
        model, optimizer, batches, batches[:1], classes=2, epochs=2, stem=99,
        lr_at=lambda step, total_steps, warmup, peak: peak / (1 + step) / total_steps,
    )  # fmt: skip
    assert [row["step"] for row in history] == [3, 6]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5 / 6 / 6)
    assert all(0 <= row["val_accuracy"] <= 1 for row in history)
    assert "benchmark" not in models.MODELS and training.lr_at(0, 1, 0, 0.5) == 0.5


def test_seeds(results, photos, tmp_path, monkeypatch, fails):
    argv = ["cnn", "--seeds", "0", "1", "0", "--target", "0", "--out-dir", str(tmp_path)]
    argv += results.flags
    flags = ["--dataset", "folder", "--data-dir", str(photos), "--epochs", "1", "--pictures", "off"]
    seeds.main([*argv, "--", *flags])
    with monkeypatch.context() as patched:
        patched.setattr(train_cnn, "main", None)  # existing runs are only measured
        seeds.main(argv)
    row, again = results.rows()
    assert_environment(row)
    assert row["runs"] == again["runs"]
    assert (row["network"], row["target"]) == ("cnn", 0) and row["settings"]["stem"] == 4
    assert [run["seed"] for run in row["runs"]] == [0, 1]
    for run in row["runs"]:
        assert run["test_accuracy"] * 8 == round(run["test_accuracy"] * 8)  # of 8 images
        assert 0 <= run["val_accuracy"] <= 1
        assert run["epochs"] == 1 and run["finished"] is True
        assert run["seconds_to_target"] == run["seconds"]  # any accuracy reaches 0
    line = fails(seeds.main, *argv, "--", *flags, "--lr", "0.5")
    assert "--lr 0.5 conflicts with the run" in line
    other = tmp_path / "cnn-seed1" / "last.pt"
    state = load_checkpoint(other)
    save_checkpoint(other, state | {"settings": state["settings"] | {"shift": 1}})
    assert "the runs differ in shift" in fails(seeds.main, *argv)
    save_checkpoint(other, state | {"settings": state["settings"] | {"amp": "other"}})
    assert "the runs differ in amp" in fails(seeds.main, *argv)
    save_checkpoint(other, state | {"dataset": state["dataset"] | {"content": "others"}})
    assert "the runs differ in images" in fails(seeds.main, *argv)
    tests = [run["test_accuracy"] for run in row["runs"]]
    assert row["test_mean"] == round(statistics.mean(tests), 4)
    assert (row["test_std"] or 0) == round(statistics.stdev(tests), 4)


def test_seeds_measures_what_evaluate_measures(trained, tmp_path, numbers_only):
    evaluate.main([str(trained["cnn"]), "--out-dir", str(tmp_path)])
    (row,) = json.loads((tmp_path / "metrics.json").read_text()).values()
    history, found = load_checkpoint(trained["cnn"])["history"], seeds.measure(trained["cnn"], 0)
    assert found["test_accuracy"] == pytest.approx(row["accuracy"])
    assert found["seconds_to_target"] == round(history[0]["seconds"], 1) < found["seconds"]
    assert seeds.measure(trained["cnn"], 1.01)["seconds_to_target"] is None


def test_seeds_refuses_an_unfinished_run(results, photos, tmp_path, fails, monkeypatch):
    argv = ["cnn", "--seeds", "0", "--target", "0", "--out-dir", str(tmp_path), *results.flags]

    def stop_after_an_epoch(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "remove_files", stop_after_an_epoch)
    with pytest.raises(SystemExit):
        seeds.main([*argv, "--", "--dataset", "folder", "--data-dir", str(photos)])
    assert "is not finished" in fails(seeds.main, *argv)


def test_alternatives(results, photos, tmp_path, monkeypatch, fails):
    monkeypatch.setitem(alternatives.PEERS["resnet-20"][2], "batch_size", 8)
    monkeypatch.setitem(alternatives.PEERS["tutorial-vit"][2], "batch_size", 8)
    monkeypatch.setitem(alternatives.PEERS["notebook-cnn"][2], "batch_size", 8)
    figure = tmp_path / "curves.png"
    argv = ["--data-dir", str(photos), "--minutes", "1e-9", "--steps", "1", "--limit-batches", "1"]
    alternatives.main([*argv, "--figure", str(figure), *results.flags])
    rows = results.rows()
    assert [row["name"] for row in rows] == [
        "cnn",
        "vit",
        "resnet-20",
        "tutorial-vit",
        "notebook-cnn",
    ]
    for row in rows:
        assert_environment(row)
        assert len(row["history"]) == 1 and 0 <= row["history"][0]["val_accuracy"] <= 1
    assert Image.open(figure).size[0] > 400
    assert f"{tmp_path}: cannot be written" in fails(
        alternatives.main, *argv, "--results", tmp_path
    )
    drawn, draw = [], alternatives.draw
    monkeypatch.setattr(alternatives, "draw", lambda rows, x: drawn.extend(rows) or draw(rows, x))
    for seed, limit in (("0", "2"), ("0", "1"), ("1", "1"), ("0", "1")):
        flags = ["--networks", "resnet-20", "--seed", seed, "--limit-batches", limit]
        alternatives.main([*argv, *flags, "--figure", str(figure), *results.flags])
    # the last time: the new row of ResNet-20 beside those of the others made in the same way
    assert drawn[-5:] == [*results.rows()[:2], results.rows()[-1], *results.rows()[3:5]]


def test_peers_are_as_published():
    """Parameters, as in the papers: .27M and 3.2M."""
    assert models.count_parameters(peers.ResNet20()) == 269_722
    assert models.count_parameters(peers.TutorialViT()) == pytest.approx(3.2e6, rel=0.01)
    rates = [alternatives.two_steps(step, 18, 0, 1.0) for step in (0, 9, 10, 14, 15, 17)]
    assert rates == [1, 1, 0.1, 0.1, 0.01, 0.01]
    net, x = peers.ResNet20().eval(), torch.randn(1, 16, 8, 8)
    y = net.blocks[3](x)
    assert y.shape == (1, 32, 4, 4)


def test_originals(results, teacher, photos, tmp_path, capsys, fails):
    """All test images twice: as they are, and as JPEG."""
    for path in sorted(photos.glob("test/*/*.png")):
        for kind, suffix in (("original", ".png"), ("jpeg", ".jpg")):
            copy = (tmp_path / kind / path.relative_to(photos)).with_suffix(suffix)
            copy.parent.mkdir(parents=True, exist_ok=True)
            Image.open(path).save(copy)
    folders = ["--originals", str(tmp_path / "original"), "--jpeg"]
    originals.main([str(teacher), *folders, str(tmp_path / "jpeg"), *results.flags])
    (row,) = results.rows()
    assert_environment(row)
    for mean, low, high in (row["originals"], row["jpeg"]):
        assert low <= mean <= high and mean * 8 == round(mean * 8)
    only = row["right_in_one_only"]
    assert (only[0] - only[1]) / 8 == row["originals"][0] - row["jpeg"][0]
    assert "95%" in capsys.readouterr().out
    copy.unlink()
    assert "not the images of" in fails(originals.main, teacher, *folders, tmp_path / "jpeg")


def assert_curves(folder, history):
    """The last point of each curve is that of the history."""
    for part in ("train", "val"):
        (file,) = (folder / part).iterdir()
        events = EventAccumulator(str(file)).Reload()
        assert events.Tags()["scalars"] == ["epoch/loss", "epoch/accuracy"]
        point = events.Scalars("epoch/accuracy")[-1]
        assert point.step == history[-1]["step"]
        assert point.wall_time == pytest.approx(history[-1]["seconds"])
        assert point.value == pytest.approx(history[-1][f"{part}_accuracy"])
        assert platform.node().encode() not in file.read_bytes() + file.name.encode()


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_published_curves_are_those_of_the_weights(name):
    folder = ROOT / "pretrained"
    assert_curves(folder / "curves" / name, load_checkpoint(folder / f"{name}.pt")["history"])


def test_curves(teacher, tmp_path, fails):
    curves.main([str(teacher), str(tmp_path / "curves")])
    history = load_checkpoint(teacher)["history"]
    assert_curves(tmp_path / "curves", history)
    assert "exists already" in fails(curves.main, teacher, tmp_path / "curves")
    history = [row | {"val_loss": None, "val_accuracy": None} for row in history]
    curves.write_curves(history, tmp_path / "without")
    assert [path.name for path in (tmp_path / "without").iterdir()] == ["train"]


# ---------------------------------------------------------------- gpu.py


def plan_of(tmp_path, photos, *lines, **settings):
    """The settings of gpu.main for a plan of these lines."""
    plan = tmp_path / "plan.txt"
    plan.write_text("# a comment\n\n" + "".join(f"{line}\n" for line in lines))
    values = {"plan": plan, "data_dir": photos, "out_dir": tmp_path / "out", "at_once": 2}
    return SimpleNamespace(**values | {"tiny": False} | settings)


def test_gpu(photos, tmp_path, capsys, fails):
    lines = "cnn-seed0: train_cnn.py", "vit: train_vit.py --teacher OUT/runs/cnn-seed0/best.pt"
    speed = "speed: benchmarks/throughput.py cnn --rounds 1 --steps 1 --results OUT/speed.jsonl"
    plan, out_dir = plan_of(tmp_path, photos, *lines, speed).plan, tmp_path / "out"
    argv = [str(plan), "--data-dir", str(photos), "--out-dir", str(out_dir), "--tiny"]
    gpu.main(argv)
    out = capsys.readouterr().out
    results = json.loads((out_dir / "results.json").read_text())
    assert list(results) == ["cnn-seed0", "vit"]
    for name, row in results.items():
        assert 0 <= row["test_accuracy"] <= 1 and row["epochs"] == 2 and row["finished"] is True
        assert f"\n{name} " in out and "best validation" in (out_dir / f"{name}.log").read_text()
        _, checkpoint = load_model(out_dir / f"{name}.pt")
        assert checkpoint["classes"] == CLASSES and checkpoint["optimizer"] is None
    assert json.loads((out_dir / "speed.jsonl").read_text())["model"] == "cnn"
    assert "has runs already" in fails(gpu.main, *argv)


def test_gpu_runs_side_by_side_until_the_time_is_up(photos, tmp_path, capsys):
    for name, code in (("good", ""), ("bad", "sys.exit(3)"), ("long", "time.sleep(60)")):
        text = f"import sys, time\nprint(sys.argv[1:], flush=True)\n{code}\n"
        (tmp_path / f"{name}.py").write_text(text)
    lines = [f"{name}: {tmp_path}/{name}.py --seed 1" for name in ("good", "bad", "long")]
    lines += [f"after: {tmp_path}/good.py --x=OUT/runs/long/best.pt", f"last: {tmp_path}/good.py"]
    started = time.time()
    args = plan_of(tmp_path, photos, *lines, deadline=started + 3)
    args.out_dir.mkdir()
    assert gpu.run_jobs(args, gpu.read_plan(args)) == {}
    assert 3 <= time.time() - started < 30
    out = capsys.readouterr().out
    assert "bad: failed with 3" in out and "long: stopped" in out and "no time for after" in out
    assert "good: failed" not in out and "long: failed" not in out
    assert (args.out_dir / "good.log").read_text() == "# good.py --seed 1\n['--seed', '1']\n"
    assert (args.out_dir / "last.log").exists() and not (args.out_dir / "after.log").exists()
    each = [f"{a}: {tmp_path}/good.py OUT/runs/{b}/best.pt" for a, b in ("ab", "ba")]
    args = plan_of(tmp_path, photos, *each, deadline=time.time() + 60)
    with pytest.raises(UserError, match="each of a, b waits for another"):
        gpu.run_jobs(args, gpu.read_plan(args))


def test_gpu_measures_what_is_there(trained, tmp_path, capsys):
    """Of a run that ended or was stopped; one without validation has no accuracy to record."""
    args, results = SimpleNamespace(out_dir=tmp_path), {}
    for name in ("whole", "unvalidated", "nothing"):
        job = gpu.Job(name, ROOT / "train_cnn.py", [])
        job.best(tmp_path).parent.mkdir(parents=True)
        if name != "nothing":
            checkpoint = load_checkpoint(trained["cnn"])
            checkpoint["best"] |= {"val_accuracy": None} if name == "unvalidated" else {}
            save_checkpoint(job.best(tmp_path), checkpoint)
        gpu.measure_run(args, job, results)
    assert list(results) == list(json.loads((tmp_path / "results.json").read_text())) == ["whole"]
    assert "unvalidated: not measured" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "whole.pt")["model"]["head.weight"].dtype == torch.float16


@pytest.mark.parametrize("plan", sorted((ROOT / "benchmarks" / "plans").iterdir()), ids=str)
def test_plans_are_understood(plan, photos, tmp_path, monkeypatch):
    class UnderstoodError(Exception):
        pass

    def stop(*args):
        raise UnderstoodError

    for script in (train_cnn, train_vit):
        monkeypatch.setattr(script, "prepare", stop)
    monkeypatch.setattr(throughput, "measure", stop)
    args = plan_of(tmp_path, photos, plan=plan)
    for job in gpu.read_plan(args):
        with pytest.raises(UnderstoodError):
            sys.modules[job.script.stem].main(job.argv)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("b train_cnn.py", "use `name: script flags`"),
        ("b:", "use `name: script flags`"),
        ("b: train_rnn.py", "use `name: script flags`"),
        ("..: train_cnn.py", "use `name: script flags`"),
        ("a: train_cnn.py", "two commands named a"),
    ],
)
def test_wrong_plan(line, says, photos, tmp_path, fails):
    plan = plan_of(tmp_path, photos, "a: train_vit.py", line).plan
    error = fails(gpu.main, plan, "--data-dir", photos, "--out-dir", tmp_path / "out")
    assert f"{plan}, line 4: " in error and says in error
    error = fails(gpu.main, tmp_path, "--data-dir", photos, "--out-dir", tmp_path / "out")
    assert f"{tmp_path}: cannot be read" in error


def test_gpu_means_leave_out_stopped_runs(capsys):
    row = {"val_accuracy": 0.5, "epochs": 2, "seconds": 9.0, "seconds_to_target": 3.0}
    rows = [row | {"test_accuracy": x, "finished": x < 0.9} for x in (0.5, 0.6, 0.9)]
    gpu.show({f"cnn-fast-seed{i}": row for i, row in enumerate(rows)})
    lines = capsys.readouterr().out.splitlines()
    assert "cnn-fast-seed2 did not finish: it counts in no mean" in lines
    assert lines[-1].split() == "cnn-fast 55.00% ± 7.07% to target 3.0 ± 0.0".split()


# ---------------------------------------------------------------- data


def test_make_photos(tmp_path):
    make_photos = load_script("make_photos")
    make_photos.main([str(tmp_path / "photos")])
    files = [file.relative_to(tmp_path / "photos") for file in tmp_path.rglob("*.png")]
    counts = {}
    for file in files:
        counts[str(file.parent)] = counts.get(str(file.parent), 0) + 1
        bottom = int(file.stem[:3]) + make_photos.SIDE
        assert bottom <= 384 if file.parts[0] == "train" else bottom > 384 + 32
    assert counts == {
        f"{part}/{name}": count
        for part, count in (("train", 11 * 15), ("test", 3 * 15))
        for name in ("brick", "grass", "gravel")
    }
    with Image.open(tmp_path / "photos" / files[0]) as image:
        assert image.size == (64, 64)


def test_make_jpeg_copy(tmp_path, monkeypatch):
    class Source(list):
        classes = ("cat", "dog")

    def cifar10(root, train, download):
        assert root == tmp_path / "data" and download
        labels = (1, 0, 1) if train else (0,)
        return Source(zip(pictures, labels, strict=False))

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in "123"]

    monkeypatch.setattr(make_jpeg_copy, "CIFAR10", cifar10)
    make_jpeg_copy.main([str(tmp_path / "data"), str(tmp_path / "copy")])
    written = sorted(p.relative_to(tmp_path / "copy").as_posix() for p in tmp_path.rglob("*.jpg"))
    assert written == [
        "test/cat/0000.jpg", "train/cat/0000.jpg", "train/dog/0000.jpg", "train/dog/0001.jpg",
    ]  # fmt: skip
    for picture, name in zip(pictures, ("dog/0000", "cat/0000", "dog/0001"), strict=True):
        picture.save(tmp_path / "expected.jpg", quality=75)
        found = (tmp_path / "copy" / "train" / f"{name}.jpg").read_bytes()
        assert found == (tmp_path / "expected.jpg").read_bytes()


# ---------------------------------------------------------------- explanations


def test_explain_cost(trained, capsys):
    threads = torch.get_num_threads()
    own = ["--cnn", str(trained["cnn"]), "--vit", str(trained["vit"])]
    explain_cost.main([*own, "--rounds", "1"])
    rows = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    ratios = {tuple(filter(None, map(str.strip, row)))[:3]: row for row in rows}
    assert "1.00" in " ".join(ratios["cnn", "64", "forward"])
    for key in (("cnn", "1", "grad-cam"), ("vit", "64", "relevance")):
        assert key in ratios
    explain_cost.main([*own, "--calls", "10"])
    assert capsys.readouterr().out.count("MiB after 10 calls") == 2
    assert torch.get_num_threads() == threads


def test_shortcut(capsys):
    images = torch.randint(200, (20, 3, 32, 32), dtype=torch.uint8)
    images = images[:, :1].repeat(1, 3, 1, 1)  # grey
    labels, before = torch.arange(20) % 10, images.clone()
    places = shortcut.plant(images, labels, torch.Generator().manual_seed(0))
    assert torch.equal(images[labels > 0], before[labels > 0])
    assert torch.equal(shortcut.find_squares(images[labels == 0]), places[labels == 0])
    y, x = divmod(places[0].item(), 8)
    assert (images[0, 0, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] == 255).all()
    shortcut.main(["--epochs", "1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line[:3] in ("cnn", "vit")]
    assert len(rows) == 4 + 7 and all(row.count("%") == 2 for row in rows)


def test_unbalanced(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "draw", lambda *_: {})  # figures take seconds
    unbalanced.write_digits(tmp_path / "images")
    counts = {d.name: len(list(d.iterdir())) for d in (tmp_path / "images" / "train").iterdir()}
    assert all(120 < counts[str(i)] < 140 for i in range(5)) and counts["7"] == 129 // 20
    unbalanced.main(["--epochs", "1", "--seeds", "1"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--")]
    assert len(rows) == 2 and all(row.count("%") == 2 for row in rows)
