import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2.functional import gaussian_blur

import attribution
import faithfulness
from checkpoint import load_checkpoint
from faithfulness import CELLS, Hiding, area, curve, curves_of, ranked, saco, score
from metrics import interval
from models import ViT, build_model
from prepare import load_data_for, load_models


class Evidence:
    """A fake `Hiding`: the probability is the sum of the weights (B, 64) of the shown cells."""

    def __init__(self, weights):
        self.weights = weights
        self.with_all, self.with_none = weights.sum(1), torch.zeros(len(weights))

    def __call__(self, hidden):
        return self.weights.scatter(1, hidden, 0.0).sum(1)


@pytest.fixture
def three_patches():
    """Cells 10, 20 and 30 matter."""
    weights = torch.zeros(1, CELLS)
    weights[0, [10, 20, 30]] = torch.tensor([0.5, 0.3, 0.2])
    return weights


def generator():
    return torch.Generator().manual_seed(0)


def test_deletion_and_insertion_of_three_patches_by_hand(three_patches):
    """Four cells are hidden at a time: all three are in the first four of the best order."""
    order = ranked(three_patches.view(1, 8, 8), generator())
    assert order[0, :3].tolist() == [10, 20, 30] and order[0].sort().values.equal(torch.arange(64))
    found = curves_of(order, Evidence(three_patches))
    assert found["deletion"][0].tolist() == pytest.approx([1] + [0] * 16, abs=1e-6)
    assert found["insertion"][0].tolist() == pytest.approx([0] + [1] * 16, abs=1e-6)
    assert area(found["deletion"]).item() == pytest.approx(1 / 32, abs=1e-6)
    assert area(found["insertion"]).item() == pytest.approx(1 - 1 / 32, abs=1e-6)
    # Two of them first, the third last.
    third = order[0, 2].item()
    late = torch.cat([order[:, :2], order[:, 3:], torch.tensor([[third]])], dim=1)
    assert curve(late, Evidence(three_patches))[0].tolist() == pytest.approx(
        [1] + [0.2] * 15 + [0], abs=1e-6
    )


def test_scores_are_differences_from_chance(three_patches):
    weights = three_patches.expand(400, -1)
    noise = torch.rand(400, 8, 8, generator=generator())
    chance = curves_of(ranked(torch.rand(400, 8, 8), generator()), Evidence(weights))
    for maps, low, high in ((noise, -0.05, 0.05), (weights.view(-1, 8, 8), 0.4, 0.5)):
        order = ranked(maps, generator())
        found = score(maps, order, Evidence(weights), chance)
        for kind in ("deletion", "insertion"):
            assert low < found[kind].mean() < high, kind
    assert found["SaCo"].min() > 0.9


def test_ties_are_broken_at_random():
    orders = ranked(torch.zeros(500, 8, 8), generator())
    first = torch.bincount(orders[:, 0], minlength=CELLS)
    assert (orders.sort(1).values == torch.arange(CELLS)).all() and first.max() < 30
    assert not torch.equal(orders[0], orders[1])


def test_saco_by_loops_and_its_ends():
    values = torch.rand(5, 16, generator=generator()).sort(1, descending=True).values
    falls = torch.randn(5, 16, generator=generator())
    for b in range(5):
        total = weight = 0.0
        for i in range(16):
            for j in range(i + 1, 16):
                difference = (values[b, i] - values[b, j]).item()
                total += difference if falls[b, i] >= falls[b, j] else -difference
                weight += abs(difference)
        assert saco(values, falls)[b].item() == pytest.approx(total / weight, abs=1e-5)
    assert saco(values, values).tolist() == pytest.approx([1] * 5, abs=1e-5)
    assert saco(values, -values).tolist() == pytest.approx([-1] * 5, abs=1e-5)
    many = torch.rand(500, 16, generator=generator()).sort(1, descending=True).values
    assert abs(saco(many, torch.rand(500, 16)).mean()) < 0.06  # random order
    assert saco(torch.ones(1, 16), falls[:1]).item() == 0  # a constant map ranks nothing


class Brightness(torch.nn.Module):
    """The logit of class 0 is the sum of the image's first channel."""

    def forward(self, x):
        return torch.stack([x[:, 0].sum((1, 2)), torch.zeros(len(x))], dim=1)


def test_hidden_cells_get_the_mean_or_the_blurred_image():
    images, goal = torch.randn(2, 3, 32, 32, generator=generator()), torch.tensor([0, 1])
    hidden = torch.tensor([[0, 9], [63, 1]])
    for fill, filling in (
        ("mean", torch.zeros_like(images)),
        ("blur", gaussian_blur(images, [17, 17], [4.0, 4.0])),
    ):
        expected = images.clone()
        for b, cells in enumerate(hidden.tolist()):
            for cell in cells:
                y, x = 4 * (cell // 8), 4 * (cell % 8)
                expected[b, :, y : y + 4, x : x + 4] = filling[b, :, y : y + 4, x : x + 4]
        found = Hiding(Brightness(), images, goal, fill)(hidden)
        torch.testing.assert_close(found, Brightness()(expected).softmax(1)[[0, 1], goal])


def test_patches_that_are_left_out():
    torch.manual_seed(0)
    vit, images = ViT(dim=24, depth=2, heads=3).eval(), torch.randn(2, 3, 32, 32)
    goal, hidden = torch.tensor([4, 7]), torch.tensor([[0, 9, 11], [63, 1, 2]])
    hiding = Hiding(vit, images, goal, "dropped")
    torch.testing.assert_close(hiding.with_all, vit(images).softmax(1)[[0, 1], goal].detach())
    for b in range(2):
        x = vit.patchify(images[b : b + 1]).flatten(2).transpose(1, 2)
        x = torch.cat([vit.class_token, x], dim=1) + vit.positions
        kept = [0] + [1 + p for p in range(64) if p not in hidden[b].tolist()]
        logits = vit.head(vit.norm(torch.nn.Sequential(*vit.blocks)(x[:, kept]))[:, 0])
        expected = logits.softmax(1)[0, goal[b]].detach()
        torch.testing.assert_close(hiding(hidden)[b], expected)


def test_patches_are_dropped_only_where_they_are_the_cells():
    def network(grid):
        return SimpleNamespace(forward=None, forward_features=lambda x, keep=None: x, **grid)

    for grid, last in (({"grid": 8}, "dropped"), ({"grid": 4}, "blur"), ({}, "blur")):
        assert faithfulness.fills_for(SimpleNamespace(network=network(grid)))[-1] == last


def test_interval_is_about_two_standard_errors():
    x = torch.randn(400, generator=generator())
    mean, low, high = interval(x)
    error = x.std().item() / 20
    assert mean == pytest.approx(x.mean().item(), abs=1e-6)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert interval(torch.full((3,), 2.0)) == (2, 2, 2)


def test_the_edge_detector_finds_edges():
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, :, 18:] = 1
    maps = faithfulness.control_maps(images, generator())
    assert set(maps["edges"][0].argmax(1).tolist()) == {4}
    assert maps["center"][0, 3:5, 3:5].min() == maps["center"].max()


def test_the_command(trained, tmp_path, capsys, monkeypatch):
    untrained = []
    monkeypatch.setattr(
        faithfulness, "build_model", lambda *a: untrained.append(build_model(*a)) or untrained[-1]
    )
    argv = [*map(str, trained.values()), "--count", "10", "--out-dir", str(tmp_path)]
    faithfulness.main([*argv, "--method", "grad-cam", "attention"])
    out = capsys.readouterr().out
    assert "digits: 10 of 360 test images" in out and re.search(r"edges +1\.000 +0\.\d{3}\n", out)
    assert "deletion, mean: best grad-cam" in out
    found = json.loads((tmp_path / "faithfulness.json").read_text())
    assert found["images"] == 10 and found["split"] == "test"
    vit = found["checkpoints"][str(trained["vit"])]
    assert set(vit["scores"]) == {"grad-cam", "attention", "random", "center", "edges"}
    cell = vit["scores"]["attention"]["SaCo"]["blur"]
    assert -1 <= cell["low"] <= cell["mean"] <= cell["high"] <= 1
    assert len(vit["curves"]["mean"]["chance"]["deletion"]) == 17
    assert vit["random_weights"]["edges"] == pytest.approx(1)
    assert 0 < vit["another_image"]["edges"] < 0.9
    assert vit["random_weights"]["grad-cam"] < 0.99
    torch.manual_seed(0)  # that of the training
    start = build_model("vit", load_checkpoint(trained["vit"])["model_config"])
    assert not torch.equal(start.patchify.weight, untrained[1].patchify.weight)
    assert {file.name for file in tmp_path.glob("*.png")} == {
        "digits-cnn_faithfulness.png", "digits-vit_faithfulness.png"
    }  # fmt: skip


def test_what_is_said_of_methods_and_controls(capsys):
    """ "good" is above the centre, "weak" is not above chance."""
    noise = torch.linspace(-0.1, 0.1, 50)
    values = {"good": noise + 0.3, "weak": noise, "random": noise, "center": noise + 0.1}
    scores = {"mean": {name: dict.fromkeys(("deletion", "insertion", "SaCo"), value)
                       for name, value in values.items()}}  # fmt: skip
    faithfulness.print_scores("cnn", scores, faithfulness.summarise(scores))
    out = capsys.readouterr().out
    for kind in ("deletion", "insertion", "SaCo"):
        assert (
            f"{kind}, mean: best good; not significantly better than: weak" not in out
            and f"{kind}, mean: best good; not significantly above chance: weak; not significantly "
            "above center: weak\n"
            in out
        )
    assert "not corrected for their number" in out
    few = {"mean": {name: dict.fromkeys(("deletion", "insertion", "SaCo"), value[:9])
                    for name, value in values.items()}}  # fmt: skip
    faithfulness.print_scores("cnn", few, faithfulness.summarise(few))
    out = capsys.readouterr().out
    assert "fewer than 10 images" in out and "best good" not in out


def test_identical_maps_are_scored_once(trained, monkeypatch, capsys):
    monkeypatch.setitem(attribution.METHODS, "copy", attribution.METHODS["grad-cam"])
    models = load_models([str(trained["cnn"])], torch.device("cpu"))
    split = load_data_for(models, None, None).test.subset(torch.arange(4))
    scores, maps = faithfulness.measure(models[0], split, ["grad-cam", "copy"])
    assert "copy ranks all cells as grad-cam does" in capsys.readouterr().out
    assert "copy" not in scores["mean"] and torch.equal(maps["copy"], maps["grad-cam"])
    # Against the network itself, image by image.
    p = models[0].logits(split, list("0123456789")).softmax(1).amax(1)
    curves = scores["mean"]["grad-cam"]["curves"]
    torch.testing.assert_close(curves["deletion"][:, 0], p, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(curves["insertion"][:, -1], p, rtol=1e-4, atol=1e-5)
    chance = scores["mean"]["chance"]["curves"]["deletion"][:, 0]
    torch.testing.assert_close(chance, p, rtol=1e-4, atol=1e-5)
    network, ((images, _),) = models[0].network, models[0].batches(split)
    predicted, A = network(images).argmax(1), network.forward_features(images)
    weights = network.head.weight[predicted] / A[0, 0].numel()  # the mean over the map, then linear
    torch.testing.assert_close(
        maps["grad-cam"], torch.einsum("bk,bkhw->bhw", weights, A), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--method", "rollout"], "--method rollout: digits-cnn has no attention; use grad-cam"),
        (["--method", "gradcam"], "invalid choice: 'gradcam'"),
        (["--count", "1"], "--count"),
    ],
)
def test_bad_flags(trained, tmp_path, fails, argv, says):
    assert says in fails(faithfulness.main, trained["cnn"], "--out-dir", tmp_path / "x", *argv)


def test_a_cell_of_a_map_is_a_cell_of_the_image():
    """Maps of 16×16 are averaged, maps of 4×4 are repeated."""
    maps = torch.arange(256.0).view(1, 16, 16)
    expected = F.avg_pool2d(maps[None], 2)[0]
    torch.testing.assert_close(attribution.on_grid(maps), expected)
    small = torch.arange(16.0).view(1, 4, 4)
    np.testing.assert_array_equal(attribution.on_grid(small)[0, ::2, 1::2], small[0])


def test_a_repeated_method_is_one(trained, tmp_path, capsys):
    argv = [str(trained["cnn"]), "--count", "3", "--out-dir", str(tmp_path)]
    faithfulness.main([*argv, "--method", "grad-cam", "grad-cam", "rollout"])
    assert "rollout" in capsys.readouterr().out
    found = json.loads((tmp_path / "faithfulness.json").read_text())
    assert "grad-cam" in found["checkpoints"][str(trained["cnn"])]["scores"]
