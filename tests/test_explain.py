import re

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import attribution
import examples
import explain
import figures
import train_vit
from checkpoint import load_checkpoint, load_model, save_checkpoint
from data import Split, load_data
from examples import Column, Examples, compute_columns, read_photographs
from prepare import load_models


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


def test_signed_maps_are_red_for_and_blue_against():
    scale, heat = figures.SCALES["signed"], torch.tensor([[1.0, -1.0], [0.0, 0.5]])
    (red, blue), (white, pale) = scale.colors(scale.norm(heat[None])(heat.numpy()))[:, :, :3]
    assert red[0] > 2 * red[2] and blue[2] > 2 * blue[0] and white.min() > 0.95
    assert pale[0] > pale[2]


def test_uniform_attention_is_pale_and_twice_is_orange():
    scale = figures.SCALES["uniform"]
    norm = scale.norm(torch.tensor([[[1.0, 0.9], [1.1, 1.0]]]))
    assert (norm.vmin, norm.vmax) == (0.5, 2)  # never less than from half to twice
    one, twice = scale.colors(norm([1.0, 2.0]))[:, :3]
    assert one.min() > 0.9 and twice[0] > 2 * twice[2]
    assert scale.strength(np.asarray(norm([0.5, 1, 2]))).tolist() == [0, 0, 1]


def test_overlay_leaves_the_neutral_photograph_grey():
    scale, heat = figures.SCALES["signed"], torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    image = np.full((64, 64, 3), 100, dtype=np.uint8)
    picture = figures.overlay(image, heat, scale, scale.norm(heat[None]))
    assert (picture[60, 60] == 100).all() and picture[3, 3, 0] > picture[3, 3, 2] + 50


def columns_of(count, images):
    column = Column("cnn", "grad-cam", "predicted")
    column.maps = torch.rand(images, 8, 8) - 0.5
    column.titles = ["✓ x (90%)"] * images
    return [column] * count


@pytest.mark.parametrize(
    ("maps", "images", "photographs", "pages"),
    [(1, 1, False, 1), (4, 1, True, 1), (12, 1, True, 1), (3, 11, False, 2), (3, 6, True, 2)],
)
def test_figures_are_of_readable_size(maps, images, photographs, pages):
    pictures = [np.zeros((32, 32, 3), dtype=np.uint8)] * images
    names, inputs = ["true: x"] * images, pictures if photographs else None
    found = figures.plot_explanations(pictures, inputs, names, columns_of(maps, images))
    assert len(found) == pages
    shown = sum(axes.get_title() == "true: x" for figure in found for axes in figure.axes)
    assert shown == images
    for figure in found:
        width, height = figure.get_size_inches() * 110
        assert width < 1700 and height < 2700 and width / height < 4
        boxes = [axes.get_position() for axes in figure.axes]
        assert all(b.x0 >= 0 and b.x1 <= 1 and b.y0 > 0 and b.y1 < 1 for b in boxes)
        assert not any(
            a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1
            for i, a in enumerate(boxes) for b in boxes[:i]
        )  # fmt: skip
    page = found[0]
    texts = " ".join(" ".join(text.get_text() for text in page.texts).split())
    assert "Red is evidence for the class" in texts and "✓ right, ✗ wrong." in texts


def test_long_names_of_classes_do_not_overlap():
    """Titles of one line, with two long class names each, and headers."""
    classes = ["a_very_long_name_of_a_class", "another_very_long_name_of_one"]
    p, labels = torch.tensor([[0.55, 0.45]]), torch.tensor([0])
    columns = []
    for _ in range(3):
        column = Column("a-run-with-a-long-name-indeed", "grad-cam", "true", classes[1], layer=2)
        column.maps, (goal, rival) = torch.rand(1, 8, 8), column.choose(p, labels, classes)
        column.write(p, labels, goal, rival, classes)
        columns.append(column)
    picture, name = np.zeros((32, 32, 3), np.uint8), figures.shorten(["true: " + classes[0]])
    (figure,) = figures.plot_explanations([picture], None, name, columns)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    texts = [axes.title for axes in figure.axes if axes.get_title()] + figure.texts[1:]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts]
    assert len(boxes) == 1 + 3 + 3 and max(box.x1 for box in boxes) < figure.bbox.x1
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_attention_has_one_scale_in_every_panel():
    maps = 3 * torch.rand(2, 3, 4, 4)
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    figure = figures.plot_attention([picture], ["x"], maps, ["layer 1", "layer 2"], list("abc"), "")
    for i in range(2):
        panels = figure.axes[4 * i : 4 * i + 4]  # picture or nothing, maps
        for j in range(3):
            (image,) = panels[1 + j].images
            np.testing.assert_allclose(image.get_array(), maps[i, j], atol=1e-6)
            assert (image.norm.vmin, image.norm.vmax) == pytest.approx(
                (1 / maps.max().item(), maps.max().item())
            )
        assert panels[1].get_ylabel() == f"layer {i + 1}"


def test_columns_know_their_classes_and_who_is_right(trained):
    (model,) = load_models([str(trained["cnn"])], "cpu")
    labels = torch.tensor([1, 0, -1])
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    names = list("0123456789")
    images_to_explain = Examples(Split.of(images, labels), labels, names, [], [], [])
    columns = [
        Column("", "grad-cam", "predicted"),
        Column("", "grad-cam", "3", "predicted"),
        Column("", "input-x-gradient", "predicted"),
    ]
    p = compute_columns(model, columns, images_to_explain)
    top = p.topk(2, dim=1).indices
    for i, (label, best) in enumerate(zip(labels, top[:, 0], strict=True)):
        mark = "" if label < 0 else "✓ " if label == best else "✗ "
        assert columns[0].titles[i] == f"{mark}{best} ({p[i, best]:.0%})"
        rival = top[i, 1] if best == 3 else best
        assert columns[1].titles[i].startswith("3 (") and f", not {rival} (" in columns[1].titles[i]
    run = attribution.forward_pass(
        model.network, next(iter(model.batches(images_to_explain.split)))[0]
    )
    rows, rival = torch.arange(3), torch.where(top[:, 0] == 3, top[:, 1], top[:, 0])
    every = torch.einsum("ck,bkhw->bchw", model.network.head.weight, run.layers["map"][-1]) / 64
    torch.testing.assert_close(
        columns[1].maps, every[:, 3] - every[rows, rival], rtol=1e-3, atol=1e-5
    )


# ---------------------------------------------------------------- the script


def test_both_checkpoints_in_one_figure(trained, tmp_path, capsys):
    argv = [*trained.values(), "--count", 3, "--target", "predicted", "true", "7", "--save-maps"]
    explain.main([*map(str, argv), "--out-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.count("digits-cnn: ") == out.count("digits-vit: ") == 3
    figure = tmp_path / "digits-cnn+digits-vit_explanations-any.png"
    assert 1000 < Image.open(figure).width < 1700
    assert {p.name for p in tmp_path.glob("digits-vit_*")} == {
        "digits-vit_attention-layers-any.png",
        "digits-vit_attention-heads-any.png",
        "digits-vit_attention-statistics-any.png",
    }
    assert "rank correlation" not in out  # of two methods
    maps = np.load(tmp_path / "digits-cnn+digits-vit_maps-any.npz")
    assert maps["labels"].shape == maps["indices"].shape == (3,)
    assert maps["predictions"].shape == (2, 3)

    images, labels = load_data("digits", ".").test.rows(torch.tensor(maps["indices"]))
    assert labels.tolist() == maps["labels"].tolist()
    model, checkpoint = load_model(trained["cnn"])
    mean, std = (255 * torch.tensor(checkpoint[key]).view(3, 1, 1) for key in ("mean", "std"))
    x = (images - mean) / std
    assert model(x).argmax(1).tolist() == maps["predictions"][0].tolist()
    a, b, c = model(x)[0].topk(3).indices.tolist()
    assert re.search(rf"digits-cnn: {a} \S+  {b} \S+  {c} \S+\n", out)
    seven = attribution.attribute(model, x, torch.full((3,), 7))
    np.testing.assert_allclose(maps["digits-cnn_grad-cam_7"], seven, rtol=1e-4, atol=1e-6)
    assert maps["digits-vit_attention"].shape == (3, 4, 4)


def test_why_one_class_and_not_another(trained, tmp_path):
    argv = [
        str(trained["cnn"]),
        "--count",
        "2",
        "--save-maps",
        "--no-figures",
        "--out-dir",
        str(tmp_path),
    ]
    explain.main([*argv, "--target", "all"])
    every = dict(np.load(tmp_path / "digits-cnn_maps-any.npz"))
    assert len([key for key in every if "grad-cam" in key]) == 10
    explain.main([*argv, "--target", "3", "--versus", "8", "--layer", "1"])
    first = np.load(tmp_path / "digits-cnn_maps-any.npz")
    assert first["digits-cnn_grad-cam-layer1_3-versus-8"].shape == (2, 16, 16)
    explain.main([*argv, "--target", "3", "--versus", "8"])
    maps = np.load(tmp_path / "digits-cnn_maps-any.npz")["digits-cnn_grad-cam_3-versus-8"]
    expected = every["digits-cnn_grad-cam_3"] - every["digits-cnn_grad-cam_8"]
    np.testing.assert_allclose(maps, expected, rtol=1e-3, atol=1e-6)
    assert not list(tmp_path.glob("*.png"))


def test_wrong_images_show_predicted_true_and_their_difference(trained, tmp_path, capsys):
    argv = [str(trained["vit"]), "--show", "wrong", "--count", "3", "--method", "grad-cam"]
    explain.main([*argv, "--save-maps", "--no-figures", "--out-dir", str(tmp_path)])
    maps = np.load(tmp_path / "digits-vit_maps-wrong.npz")
    a, b, difference = (maps[f"digits-vit_grad-cam_{target}"]
                        for target in ("predicted", "true", "predicted-versus-true"))  # fmt: skip
    np.testing.assert_allclose(difference, a - b, rtol=1e-3, atol=1e-6)
    argv = [str(trained["cnn"]), "--show", "correct", "--count", "2"]
    explain.main([*argv, "--target", "predicted", "true", "--out-dir", str(tmp_path)])
    said = "digits-cnn_grad-cam_true: the same maps as digits-cnn_grad-cam_predicted"
    assert said in capsys.readouterr().out


def test_classes_match_by_name_not_by_place(trained, tmp_path, capsys):
    """A checkpoint whose classes are in another order, its head likewise, explains the same."""
    state = load_checkpoint(trained["cnn"])
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    state["classes"] = [str(i) for i in order.tolist()]
    for key in ("head.weight", "head.bias"):
        state["model"][key] = state["model"][key][order]
    save_checkpoint(tmp_path / "shuffled.pt", state)
    argv = [trained["cnn"], tmp_path / "shuffled.pt", "--save-maps", "--no-figures"]
    argv += ["--target", "predicted", "3"]
    explain.main([*map(str, argv), "--out-dir", str(tmp_path)])
    said = "rank correlation of digits-cnn_grad-cam_3 and shuffled_grad-cam_3"
    assert re.search(rf"{said}.*: \+1\.00", capsys.readouterr().out)
    maps = np.load(tmp_path / "digits-cnn+shuffled_maps-any.npz")
    assert (maps["predictions"][0] == maps["predictions"][1]).all()
    for target in ("predicted", "3"):
        a, b = (maps[f"{name}_grad-cam_{target}"] for name in ("digits-cnn", "shuffled"))
        assert abs(a).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("show", ["correct", "wrong"])
def test_show_chooses_by_what_the_models_say(trained, tmp_path, show):
    argv = [*trained.values(), "--show", show, "--count", 20, "--save-maps", "--method", "grad-cam"]
    argv.append("--no-figures")
    explain.main([*map(str, argv), "--out-dir", str(tmp_path)])
    maps = np.load(tmp_path / f"digits-cnn+digits-vit_maps-{show}.npz")
    right = maps["labels"] == maps["predictions"]  # (2, 20)
    assert right.shape == (2, 20) and (right.all(0) == (show == "correct")).all()
    assert show == "correct" or (right.sum(0) == 1).any()  # one network alone is wrong


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
    assert (out_dir / "03_digits-vit_attention.png").exists()


def test_a_method_that_one_of_two_networks_has(trained, tmp_path, capsys):
    argv = [*map(str, trained.values()), "--method", "rollout", "--count", "1"]
    argv += ["--save-maps", "--no-figures"]
    explain.main([*argv, "--out-dir", str(tmp_path)])
    assert "rank correlation" not in capsys.readouterr().out
    maps = np.load(tmp_path / "digits-cnn+digits-vit_maps-any.npz")
    assert [key for key in maps if "digits" in key] == ["digits-vit_rollout"]


def test_images_have_no_true_class(trained, photos, tmp_path, fails):
    photo = photos / "test" / "dark" / "03.png"
    argv = ["--images", photo, "--target", "true", "--out-dir", tmp_path]
    assert "--target true" in fails(explain.main, trained["cnn"], *argv)


def test_more_images_than_a_figure_shows(trained, tmp_path, capsys, monkeypatch):
    assert explain.MAX_PICTURES == 32
    monkeypatch.setattr(explain, "MAX_PICTURES", 4)
    explain.main([str(trained["vit"]), "--count", "5", "--save-maps", "--out-dir", str(tmp_path)])
    assert "the figures show the first 4 of 5 images" in capsys.readouterr().out
    assert np.load(tmp_path / "digits-vit_maps-any.npz")["digits-vit_attention"].shape == (5, 4, 4)
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
        (["--method", "rollout", "--target", "3"], "--target is for grad-cam, "),
        (["--method", "rollout", "--versus", "3"], "--versus is for grad-cam, "),
        (
            ["--method", "occlusion", "--layer", "1"],
            "--layer is for grad-cam, layer-cam, attention",
        ),
        (["--method", "gradcam"], "invalid choice: 'gradcam'"),
        (["--target", "3", "--versus", "3"], "--versus 3: that is the --target"),
        (["--versus", "dog"], "--versus dog: the 10 classes are"),
        (["--layer", "3"], "--layer 3: digits-cnn has 2 layers; use a lower one"),
        (["--count", "0"], "--count"),
        (["--method", "rollout"], "--method rollout: digits-cnn has no attention; use grad-cam, "),
        (["--dataset", "folder", "--data-dir", "nowhere"], "--data-dir nowhere"),
    ],
)
def test_bad_flags(trained, tmp_path, fails, argv, says):
    assert says in fails(explain.main, trained["cnn"], "--out-dir", tmp_path / "x", *argv)


def test_a_map_of_one_cell_is_refused(tmp_path, fails):
    """A ViT of one patch has nothing to show but by methods that use pixels."""
    tiny = ["--dim", "8", "--heads", "1", "--depth", "1", "--patch-size", "32"]
    argv = [
        "--dataset",
        "digits",
        "--epochs",
        "1",
        "--limit-batches",
        "1",
        *tiny,
        "--pictures",
        "off",
    ]
    train_vit.main([*argv, "--out-dir", str(tmp_path / "run")])
    argv = [tmp_path / "run" / "best.pt", "--count", "1", "--out-dir", tmp_path / "out"]
    line = fails(explain.main, *argv, "--method", "attention")
    assert "--method attention: run has a map of one cell there; use occlusion" in line
    explain.main(list(map(str, [*argv, "--save-maps"])))
    assert "run_occlusion_predicted" in np.load(tmp_path / "out" / "run_maps-any.npz")


def test_no_map_of_the_default_methods_is_blank(trained, photos):
    """On digits, and on photographs of noise."""
    digits = load_data("digits", ".").test.subset(torch.arange(40))
    noise = load_data("folder", photos).test
    for model in load_models(list(map(str, trained.values())), torch.device("cpu")):
        names, _ = attribution.methods_for(model.network, 32)
        for split in (digits, noise):
            images, labels = split.rows(torch.arange(len(split)))
            shown = Examples(Split.of(images, labels), labels, list("0123456789"), [], [], [])
            columns = examples.plan_columns(model, names, [("predicted", None)], None)
            compute_columns(model, columns, shown)
            for column in columns:
                assert (column.maps.flatten(1).std(1) > 0).all(), column.key


def test_agreement_is_the_rank_correlation_of_the_same_method_and_class(capsys):
    """Of predicted classes those images count where both networks predict one class."""
    maps = torch.rand(4, 8, 8)
    columns = [Column("a", name, target, maps=maps) for name, target in (
        ("attention", None), ("grad-cam", "true"), ("occlusion", "predicted")
    )]  # fmt: skip
    half = torch.cat([maps[:2], -maps[2:]])
    columns += [Column("b", "rollout", None, maps=half), Column("b", "grad-cam", "true", maps=half)]
    columns += [Column("b", "occlusion", "predicted", maps=half)]
    labels = torch.tensor([0, 0, 1, 1])
    for column in columns:
        b_predicts = column.model == "b" and column.target == "predicted"
        column.compared = [(labels * (not b_predicts))[:, None].expand(4, 2)]
    explain.print_agreement(columns, {"a": labels, "b": torch.zeros(4, dtype=int)}, labels)
    one, other = capsys.readouterr().out.splitlines()
    assert one == (
        "rank correlation of a_grad-cam_true and b_grad-cam_true, mean (images): "
        "-1.00 where one is right (2), +1.00 where both are right (2)"
    )
    assert other.endswith("b_occlusion_predicted, mean (images): +1.00 where both are right (2)")


def test_the_ends_of_a_colour_bar_say_where_values_are_clipped():
    axes, maps = figures.Figure().subplots(), torch.linspace(-2, 4, 9).view(1, 3, 3)
    for scale, ends in (("positive", ["≤0", "4"]), ("signed", ["−4", "0", "4"])):
        norm = figures.SCALES[scale].norm(maps)
        figures._color_bar(axes.imshow(maps[0].numpy(), norm=norm), ax=axes)
        bar = axes.figure.axes[-1]
        assert [text.get_text() for text in bar.get_yticklabels()] == ends
    uniform = figures.SCALES["uniform"].norm(maps)
    figures._color_bar(axes.imshow(maps[0].abs().numpy(), norm=uniform), ax=axes)
    assert axes.figure.axes[-1].get_yticklabels()[0].get_text() == "≤0.25"


def test_a_map_of_zeros_is_neutral():
    scale = figures.SCALES["signed"]
    assert scale.strength(np.asarray(scale.norm(torch.zeros(1, 2, 2))(0.0))) == 0


@pytest.mark.parametrize("heads", [figures.MAX_HEADS, figures.MAX_HEADS + 1])
def test_many_heads_have_a_scale_instead_of_numbers(heads):
    tables = dict.fromkeys(("entropy", "distance"), (torch.rand(2, heads), 1.0))
    axes = figures.plot_statistics(tables, None, "vit").axes
    many = heads > figures.MAX_HEADS
    assert (len(axes[0].texts), len(axes)) == ((0, 4) if many else (2 * heads, 2))
