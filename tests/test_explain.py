import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

import attribution
import explain
import figures
from checkpoint import load_checkpoint, load_model, save_checkpoint
from data import Split
from explain import Examples, read_photographs
from models import CNN, ViT
from prepare import load_models


@pytest.fixture
def cnn():
    torch.manual_seed(0)
    model = CNN(stem=8, widths=(16, 24), depths=(1, 1))
    for module in model.modules():  # statistics other than 0 and 1
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return ViT(dim=24, depth=3, heads=3).eval()


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


TARGETS = torch.tensor([0, 3, 9, 1, 1, 7])


def test_grad_cam_equals_captums(cnn, images):
    attr = pytest.importorskip("captum.attr")
    theirs = attr.LayerGradCam(cnn, cnn.stages[-1]).attribute(
        images, target=TARGETS, relu_attributions=True
    )
    ours = attribution.grad_cam(cnn, images, TARGETS)
    assert ours.max() > 1e-3
    torch.testing.assert_close(ours, theirs[:, 0], rtol=1e-5, atol=1e-7)


def test_grad_cam_equals_pytorch_grad_cams(cnn, images):
    cam = pytest.importorskip("pytorch_grad_cam")
    targets = [cam.utils.model_targets.ClassifierOutputTarget(t.item()) for t in TARGETS]
    theirs = cam.GradCAM(cnn, [cnn.stages[-1]])(images, targets)
    ours, compared = attribution.grad_cam(cnn, images, TARGETS), 0
    for heat, expected in zip(ours, theirs, strict=True):
        if heat.max() > 0:
            compared += 1
            small = torch.tensor(figures.scaled(heat))[None, None]
            big = torch.nn.functional.interpolate(small, 32, mode="bilinear")[0, 0]
            np.testing.assert_allclose(figures.scaled(big), expected, atol=1e-4)
    assert compared >= 3


def test_vit_grad_cam_has_the_gradients_that_captum_finds(vit, images):
    attr = pytest.importorskip("captum.attr")
    raw = attr.LayerGradientXActivation(vit, vit.blocks[-1].norm1).attribute(images, target=TARGETS)
    _, found = vit.forward_features(images, return_intermediates=True)
    gradient, A = (
        tokens[:, 1:].unflatten(1, (8, 8)).movedim(-1, 1)
        for tokens in (raw / found["tokens"][-1], found["tokens"][-1])
    )
    expected = (gradient.mean((2, 3), keepdim=True) * A).sum(1).relu()
    ours = attribution.grad_cam(vit, images, TARGETS)
    assert ours.max() > 0
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


def test_grad_cam_equals_the_closed_form_class_map(cnn, images):
    """A map, its average, a linear layer: dz_c/dA is W_c / (h w), so the sum is W_c . A / (h w)."""
    A = cnn.forward_features(images)
    closed = torch.einsum("bk,bkhw->bhw", cnn.head.weight[TARGETS], A).relu() / 64
    torch.testing.assert_close(
        attribution.grad_cam(cnn, images, TARGETS), closed, rtol=1e-5, atol=1e-7
    )


def test_last_blocks_output_would_give_the_vit_no_gradient(vit, images):
    """The trap that `tokens` avoids: after the last attention patches no longer matter."""
    x, found = vit.forward_features(images, return_intermediates=True)
    score = vit.forward_head(x).gather(1, TARGETS[:, None]).sum()
    after, before = torch.autograd.grad(score, [x, found["tokens"][-1]])
    assert (after[:, 1:] == 0).all() and (before[:, 1:] != 0).any()


@pytest.mark.parametrize("method", ["grad-cam", "attention", "rollout", "input-x-gradient"])
def test_batch_equals_single_images_and_leaves_the_model_alone(vit, images, method):
    state = torch.get_rng_state()
    maps = attribution.METHODS[method].compute(vit, images, TARGETS)
    side = 32 if method == "input-x-gradient" else 8
    assert maps.shape == (6, side, side) and not maps.requires_grad and maps.abs().max() > 0
    for i in range(6):
        one = attribution.METHODS[method].compute(vit, images[i : i + 1], TARGETS[i : i + 1])
        torch.testing.assert_close(maps[i], one[0], rtol=1e-4, atol=1e-6)
    assert all(p.grad is None and p.requires_grad for p in vit.parameters())
    assert not vit.training and torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        assert torch.equal(attribution.METHODS[method].compute(vit, images, TARGETS), maps)


def random_attention(L, N=17):
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, N, N, generator=generator).softmax(-1) for _ in range(L)]


def test_rollout_rows_sum_to_one_and_equal_numpys_product():
    attentions = random_attention(4)
    R = attribution.rollout(attentions)
    torch.testing.assert_close(R.sum(-1), torch.ones(2, 17), rtol=1e-5, atol=1e-5)
    for b in range(2):
        expected = np.linalg.multi_dot(
            [(a[b].double().mean(0).numpy() + np.eye(17)) / 2 for a in reversed(attentions)]
        )
        np.testing.assert_allclose(R[b], expected, atol=1e-6)


def test_attention_maps_are_the_class_tokens_rows_in_reading_order(vit, images):
    _, found = vit.forward_features(images, return_intermediates=True)
    maps = attribution.attention_maps(vit, images)
    assert maps.shape == (6, 3, 3, 8, 8)
    for y, x in ((0, 0), (0, 7), (5, 2)):
        expected = found["attention"][1][:, 2, 0, 1 + 8 * y + x]
        torch.testing.assert_close(maps[:, 1, 2, y, x], expected)
    last = found["attention"][-1][:, :, 0, 1:].mean(1).reshape(6, 8, 8)
    torch.testing.assert_close(attribution.last_attention(vit, images), last)
    whole = attribution.rollout(found["attention"])
    rolled = attribution.attention_rollout(vit, images)
    for y, x in ((0, 0), (0, 7), (5, 2)):
        torch.testing.assert_close(rolled[:, y, x], whole[:, 0, 1 + 8 * y + x])


def test_photographs_are_cut_to_their_middle(trained, tmp_path):
    photo = Image.new("RGB", (120, 40), "red")
    photo.paste("lime", (40, 0, 80, 40))
    photo.save(tmp_path / "wide.png")
    photo.rotate(90, expand=True).save(tmp_path / "tall.png")
    models = load_models([str(trained["cnn"])], "cpu")
    found = read_photographs([tmp_path / "wide.png", tmp_path / "tall.png"], models)
    pictures, images = found.pictures, found.split.images
    assert [p.shape for p in pictures] == [(40, 40, 3)] * 2 and images.shape == (2, 3, 32, 32)
    for i in range(2):
        for inner in (
            pictures[i][2:-2, 2:-2].reshape(-1, 3),
            images[i, :, 2:-2, 2:-2].flatten(1).T,
        ):
            assert (np.asarray(inner) == (0, 255, 0)).all()


def test_a_map_lies_where_its_pixels_are():
    """A toy CNN that sees nothing but brightness: the map's peak is where the bright patch is."""
    model = CNN(stem=1, widths=(1, 1), depths=(0, 0)).eval()
    with torch.no_grad():
        for p in (model.stem.weight, model.stages[0].conv.weight, model.stages[1].conv.weight):
            p.zero_()[:, :, 1, 1] = 1
        model.head.weight.fill_(1)
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 20:24, 4:8] = 1
    heat = attribution.grad_cam(model, images, torch.tensor([0]))[0]
    assert divmod(heat.argmax().item(), 8) == (5, 1)
    picture = figures.overlay(np.zeros((320, 320, 3), dtype=np.uint8), heat)
    assert picture[220, 60, 0] > picture[60, 220, 0]  # red where it is hot, blue elsewhere
    assert picture[60, 220, 2] > picture[60, 220, 0]


def test_signed_maps_are_red_for_and_blue_against():
    heat = torch.tensor([[1.0, -1.0], [0.0, 0.5]])
    (red, blue), (white, pale) = figures.colored(heat, signed=True)
    assert red[0] > 2 * red[2] and blue[2] > 2 * blue[0] and white.min() > 0.95
    assert pale[0] > pale[2]
    column = {"header": ("", ""), "maps": heat[None], "titles": [""], "colors": ["black"]}
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    figure = figures.plot_explanations([picture], [""], [column | {"signed": True}])
    raw = figure.axes[1].images[0].get_array()
    np.testing.assert_allclose(raw, figures.colored(heat, signed=True))
    texts = " ".join(text.get_text() for text in figure.texts)
    assert "blue against" in texts and "dark blue" not in texts


def test_the_last_panel_of_the_heads_is_their_mean():
    attention = torch.rand(2, 3, 4, 4)
    figure = figures.plot_attention_heads(np.zeros((8, 8, 3), dtype=np.uint8), "", attention, "")
    for layer in range(2):
        panels = figure.axes[5 * layer : 5 * layer + 5]  # picture or nothing, heads, mean
        shown = panels[4].images[0].get_array()
        np.testing.assert_allclose(shown, figures.scaled(attention[layer].mean(0)), atol=1e-6)
        np.testing.assert_allclose(
            panels[2].images[0].get_array(), figures.scaled(attention[layer, 1]), atol=1e-6
        )


def test_methods_of_each_network(cnn, vit):
    assert attribution.methods_for(cnn, 32) == ["grad-cam"]
    assert attribution.methods_for(vit, 32) == ["grad-cam", "attention", "rollout"]
    assert attribution.methods_for(cnn, 32, ["rollout", "input-x-gradient"]) == ["input-x-gradient"]


def test_columns_know_signs_and_who_is_right(trained):
    (model,) = load_models([str(trained["cnn"])], "cpu")
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([1, 0, -1])
    examples = Examples(Split.of(images, labels), labels, list("0123456789"), [], [], [])
    p = torch.full((3, 10), 0.1)
    p[:, 0] = 0.2
    names = ["grad-cam", "input-x-gradient"]
    columns = explain.make_columns(model, names, ["predicted"], examples, p)
    assert [column["signed"] for column in columns] == [False, True]
    assert columns[1]["colors"] == ["firebrick", "green", "black"]  # wrong, right, unknown


def test_constant_map_is_scaled_to_zero():
    assert figures.scaled(torch.full((2, 2), 3.0)).tolist() == [[0, 0], [0, 0]]


# ---------------------------------------------------------------- the script


def test_both_checkpoints_in_one_figure(trained, tmp_path, capsys):
    argv = [*trained.values(), "--count", 3, "--target", "predicted", "true", "7", "--save-maps"]
    explain.main([*map(str, argv), "--out-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("digits-cnn: ") == out.count("digits-vit: ") == 3
    figure = tmp_path / "digits-cnn+digits-vit_explanations-any.png"
    assert Image.open(figure).width > 1500
    assert {p.name for p in tmp_path.glob("*attention*")} == {
        "digits-vit_attention-layers-any.png",
        "digits-vit_attention-heads-any.png",
    }
    maps = np.load(tmp_path / "digits-cnn+digits-vit_maps-any.npz")
    assert maps["labels"].shape == maps["indices"].shape == (3,)
    assert maps["predictions"].shape == (2, 3)

    from data import load_data

    images, labels = load_data("digits", ".").test.rows(torch.tensor(maps["indices"]))
    assert labels.tolist() == maps["labels"].tolist()
    model, checkpoint = load_model(trained["cnn"])
    mean, std = (255 * torch.tensor(checkpoint[key]).view(3, 1, 1) for key in ("mean", "std"))
    x = (images - mean) / std
    assert model(x).argmax(1).tolist() == maps["predictions"][0].tolist()
    seven = attribution.grad_cam(model, x, torch.full((3,), 7))
    np.testing.assert_allclose(maps["digits-cnn_grad-cam_7"], seven, rtol=1e-5)
    assert maps["digits-vit_rollout"].shape == (3, 4, 4)


def test_classes_match_by_name_not_by_place(trained, tmp_path):
    """A checkpoint whose classes are in another order, its head likewise, explains the same."""
    state = load_checkpoint(trained["cnn"])
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    state["classes"] = [str(i) for i in order.tolist()]
    for key in ("head.weight", "head.bias"):
        state["model"][key] = state["model"][key][order]
    save_checkpoint(tmp_path / "shuffled.pt", state)
    argv = [trained["cnn"], tmp_path / "shuffled.pt", "--save-maps", "--target", "predicted", "3"]
    explain.main([*map(str, argv), "--out-dir", str(tmp_path)])
    maps = np.load(tmp_path / "digits-cnn+shuffled_maps-any.npz")
    assert (maps["predictions"][0] == maps["predictions"][1]).all()
    for target in ("predicted", "3"):
        a, b = (maps[f"{name}_grad-cam_{target}"] for name in ("digits-cnn", "shuffled"))
        assert a.max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("show", ["correct", "wrong"])
def test_show_chooses_by_what_the_models_say(trained, tmp_path, show):
    argv = [trained["vit"], "--show", show, "--count", 5, "--save-maps", "--method", "grad-cam"]
    explain.main([*map(str, argv), "--out-dir", str(tmp_path)])
    maps = np.load(tmp_path / f"digits-vit_maps-{show}.npz")
    assert len(maps["labels"]) == 5
    assert (maps["labels"] == maps["predictions"][0]).all() == (show == "correct")
    assert (maps["labels"] != maps["predictions"][0]).all() == (show == "wrong")


def test_users_own_images(trained, photos, tmp_path, capsys):
    grey = tmp_path / "grey photo.png"
    Image.effect_mandelbrot((300, 200), (-2, -1, 1, 1), 50).save(grey)
    bad = tmp_path / "bad.jpg"
    bad.write_text("no picture")
    argv = [*trained.values(), "--images", grey, bad, photos / "test" / "dark" / "03.png"]
    out_dir = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        explain.main([*map(str, argv), "--out-dir", str(out_dir)])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and err.count("error: ") == 1 and "bad.jpg" in err
    assert "grey photo.png  digits-cnn: " in out and "03.png  digits-vit: " in out
    assert Image.open(out_dir / "grey photo_digits-cnn_grad-cam_predicted.png").size == (200, 200)
    assert (out_dir / "digits-cnn+digits-vit_explanations-images.png").exists()
    assert (out_dir / "03_digits-vit_rollout.png").exists()


def test_images_have_no_true_class(trained, photos, tmp_path, fails):
    photo = photos / "test" / "dark" / "03.png"
    argv = ["--images", photo, "--target", "true", "--out-dir", tmp_path]
    assert "--target true" in fails(explain.main, trained["cnn"], *argv)


def test_more_images_than_a_figure_shows(trained, tmp_path, capsys, monkeypatch):
    assert explain.LARGEST_FIGURE[0] == 32
    monkeypatch.setattr(explain, "LARGEST_FIGURE", (4, 12))
    explain.main([str(trained["vit"]), "--count", "5", "--save-maps", "--out-dir", str(tmp_path)])
    assert "the figures show the first 4 of 5 images" in capsys.readouterr().out
    assert np.load(tmp_path / "digits-vit_maps-any.npz")["digits-vit_rollout"].shape == (5, 4, 4)
    assert (tmp_path / "digits-vit_attention-heads-any.png").exists()


def test_same_names_and_dollars_are_kept_apart(trained, photos, tmp_path):
    names = [tmp_path / d / "a$_$.png" for d in ("one", "two")]
    for name, part in zip(names, ("dark", "bright"), strict=True):
        name.parent.mkdir()
        name.write_bytes((photos / "test" / part / "03.png").read_bytes())
    explain.main([str(trained["cnn"]), "--images", *map(str, names), "--out-dir", str(tmp_path)])
    assert len(list(tmp_path.glob("?-a$_$_digits-cnn_grad-cam_predicted.png"))) == 2
    assert matplotlib.rcParams["text.parse_math"]  # of the process, such as a notebook's


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--target", "dog"], "--target dog: the 10 classes are '0', '1'"),
        (["--images", "no-such.jpg"], "no-such.jpg"),
        (["--images", "README.md", "no-such.jpg", "--count", "3"], "--count is for test images"),
        (["--method", "rollout", "--target", "3"], "--target is for grad-cam and"),
        (["--count", "0"], "--count"),
        (["--method", "rollout"], "--method rollout: digits-cnn does not offer what it needs"),
        (["--dataset", "folder", "--data-dir", "nowhere"], "--data-dir nowhere"),
    ],
)
def test_bad_flags(trained, tmp_path, fails, argv, says):
    assert says in fails(explain.main, trained["cnn"], "--out-dir", tmp_path / "x", *argv)
