import copy
import dataclasses
import html.parser
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_CNN
from PIL import Image
from sklearn import metrics as sk

import batches
import charts
import checkpoint
import evaluate
import report
import train_cnn
from data import load_data
from metrics import fit_temperature, measure
from prepare import load_models


def test_metrics_worked_out_by_hand():
    labels, predictions = np.array([0, 0, 0, 1, 1, 2]), [0, 0, 1, 1, 0, 2]
    logits = math.log(8) * np.eye(3)[predictions]  # probabilities .8, .1, .1
    ours = measure(logits, labels, ["a", "b", "c"])
    assert ours["confusion_matrix"] == [[2, 1, 0], [1, 1, 0], [0, 0, 1]]
    by_class = {"a": (2 / 3, 2 / 3, 2 / 3, 3), "b": (1 / 2, 1 / 2, 1 / 2, 2), "c": (1, 1, 1, 1)}
    for name, expected in by_class.items():
        found = [ours["per_class"][name][k] for k in ("precision", "recall", "f1", "support")]
        assert found == pytest.approx(expected)
    assert ours["accuracy"] == pytest.approx(4 / 6)
    assert ours["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert ours["weighted_f1"] == pytest.approx((3 * 2 / 3 + 2 * 1 / 2 + 1) / 6)
    assert ours["log_loss"] == pytest.approx(-(4 * math.log(0.8) + 2 * math.log(0.1)) / 6)
    assert ours["brier"] == pytest.approx((4 * 0.06 + 2 * (0.9**2 + 0.8**2 + 0.1**2)) / 6)
    assert ours["ece"] == pytest.approx(0.8 - 4 / 6)


def test_rows_of_the_confusion_figure_are_true_classes():
    ours = measure(np.eye(2)[[0, 0, 1]], np.array([0, 1, 1]), ["a", "b"])
    (axes,) = charts.plot_confusion({"m": ours}, ["a", "b"]).axes
    cells = {(round(t.get_position()[1]), round(t.get_position()[0])): [] for t in axes.texts}
    for text in axes.texts:
        x, y = text.get_position()
        cells[round(y), round(x)].append(text.get_text())
    assert cells == {(0, 0): ["1", "100.0%"], (1, 0): ["1", "50.0%"], (1, 1): ["1", "50.0%"]}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_large_confusion_matrices_have_a_scale_instead_of_numbers():
    labels = np.arange(charts.MAX_BARS + 1)
    names = [f"c{label}" for label in labels]
    axes, scale = charts.plot_confusion(
        {"m": measure(np.eye(len(labels)), labels, names)}, names
    ).axes
    assert not axes.texts and scale.get_ylabel() == "fraction of the true class"


def test_a_folder_with_test_alone_is_measured_whole(photos, tmp_path, numbers_only):
    """Trained on one folder, measured on all of another, which has nothing to train on."""
    argv = ["--dataset", "folder", "--data-dir", photos, "--batch-size", 8, "--epochs", 1]
    argv += ["--pictures", "off"]
    train_cnn.main([*map(str, argv), *TINY_CNN, "--out-dir", str(tmp_path / "run")])
    shutil.copytree(photos / "train", tmp_path / "other" / "test")
    argv = [tmp_path / "run" / "best.pt", "--data-dir", tmp_path / "other"]
    evaluate.main([*map(str, argv), "--out-dir", str(tmp_path / "out")])
    (found,) = json.loads((tmp_path / "out" / "metrics.json").read_text()).values()
    assert found["images"] == 24


@pytest.fixture(scope="module")
def results(trained, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("evaluation")
    argv = ["--robustness", "--robustness-images", "40", "--out-dir", str(out_dir)]
    evaluate.main([*map(str, trained.values()), *argv])
    return out_dir


def test_files_say_what_the_models_do(results, trained):
    written = json.loads((results / "metrics.json").read_text())
    assert list(written) == [str(path) for path in trained.values()]
    test, val = (getattr(load_data("digits", "."), part) for part in ("test", "val"))
    for path, found in written.items():
        model, c = checkpoint.load_model(path)
        images, labels = test.rows(slice(None))
        mean, std = (torch.tensor(c[k]).view(3, 1, 1) for k in ("mean", "std"))
        logits = model((images / 255 - mean) / std)
        p = logits.argmax(1)
        assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, p))
        fitted = found["temperature"]  # on validation images
        divided = torch.nn.functional.cross_entropy(logits / fitted["temperature"], labels)
        assert fitted["log_loss"] == pytest.approx(divided.item(), rel=1e-4)
        x, y = val.rows(slice(None))
        T = fit_temperature(model((x / 255 - mean) / std).detach().numpy(), y.numpy())
        assert fitted["temperature"] == pytest.approx(T, rel=1e-3)
        few = torch.randperm(360, generator=torch.Generator().manual_seed(0))[:40]

        def accuracy(*versions, model=model, labels=labels[few], mean=mean, std=std):
            p = sum(model((x / 255 - mean) / std).softmax(1) for x in versions)
            return (p.argmax(1) == labels).float().mean().item()

        robust, x = found["robustness"], images[few]
        one = {"abs": 0.026}  # image of 40
        for kind, values in robust["corruptions"].items():
            expected = [accuracy(batches.corrupt(x, kind, severity)) for severity in range(1, 6)]
            assert values == pytest.approx(expected, **one)
        mean_of_kinds = np.mean([*robust["corruptions"].values()])
        assert robust["corruption_mean"] == pytest.approx(mean_of_kinds)
        assert robust["shifts"][0] == pytest.approx(accuracy(x), **one)
        for n in range(1, 5):
            moves = ((-n, 0), (n, 0), (0, -n), (0, n))
            expected = np.mean([accuracy(batches.shifted(x, *move)) for move in moves])
            assert robust["shifts"][n] == pytest.approx(expected, **one)
        assert robust["flip_averaged"] == pytest.approx(accuracy(x, x.flip(3)), **one)
        assert sum(found["per_class"][d]["support"] for d in "0123456789") == 360
    report = (results / "classification_report.txt").read_text()
    assert "digits-cnn" in report and "macro avg" in report
    found = json.loads((results / "comparison.json").read_text())
    (pair,), rows = found["pairs"], list(written.values())
    assert pair["difference"] == pytest.approx(rows[0]["accuracy"] - rows[1]["accuracy"])
    assert (
        found["about"]["caveats"] == []
        and found["about"]["images"] == 360
        and "--robustness-images 40" in found["about"]["command"]
    )
    for row in rows:
        assert row["timing"]["training_seconds"] > 0 and row["robustness"]["images"] == 40
    lines = (results / "predictions.csv").read_text().splitlines()
    assert lines[0] == (
        "image,true,digits-cnn: predicted,digits-cnn: probability,"
        "digits-vit: predicted,digits-vit: probability"
    )
    right = [line.split(",")[1] == line.split(",")[2] for line in lines[1:]]
    assert np.mean(right) == pytest.approx(rows[0]["accuracy"])
    assert rows[0]["robustness"]["clean"] == pytest.approx(np.mean([right[i] for i in few]))
    for path in results.glob("*.png"):
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[1] >= 700 and pixels.std() > 5
    assert {path.stem for path in results.glob("*.png")} == {
        "difference", "confusion_matrix", "confidence", "mistakes", "disagreements", "robustness",
        "learning_curves", "class_examples", "class_counts",
    }  # fmt: skip


class Page(html.parser.HTMLParser):
    """What a page consists of."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        self.text.append(text)


def test_the_report_is_one_file_that_loads_nothing(results):
    text = (results / "report.html").read_text()
    page = Page(text)
    assert len(text) < 3_000_000
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "iframe", "object"} & set(names) and "http" not in text
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == len(list(results.glob("*.png")))
    for picture in pictures:
        assert picture["src"].startswith("data:image/png;base64,") and len(picture["alt"]) > 10
    assert all(a.get("scope") in ("row", "col") for tag, a in page.tags if tag == "th")
    assert names.count("h1") == 1 and names.count("caption") == names.count("table")
    summary = text[text.index("<ul>") : text.index("</ul>")]
    metrics = json.loads((results / "metrics.json").read_text())
    accuracy = max(row["accuracy"] for row in metrics.values())
    assert 5 <= summary.count("<li>") <= 10 and f"{accuracy:.1%}" in summary
    shown = json.loads((results / "comparison.json").read_text())["shown"]
    assert ", ".join(shown["mistakes"]) in text and len(shown["disagreements"]) > 3
    assert all(row["sha256"] in text for row in metrics.values())


def test_names_are_escaped_in_the_report(results):
    metrics = json.loads((results / "metrics.json").read_text())
    compared = json.loads((results / "comparison.json").read_text())
    evil = "<script>alert(1)</script>"
    named = {evil: metrics.popitem()[1]}
    named[evil]["per_class"] = {evil if k == "3" else k: v for k, v in
                                named[evil]["per_class"].items()}  # fmt: skip
    compared |= {"pairs": [], "ensemble": None}
    compared["about"]["classes"][3] = compared["about"]["note"] = evil
    compared["about"]["caveats"] = compared["shown"]["mistakes"] = [evil]
    page = report.render(named, compared, {})
    assert "<script" not in page and page.count("&lt;script&gt;") > 4


def a_pair(difference, low, high, p):
    row = {"difference": difference, "interval": [low, high], "mcnemar_p": p, "images": 9}
    return {
        "first": "d-cnn", "second": "d-vit", **row, "per_class": {"x": row}, "agreement": 0.5,
        "right": {"both": 5, "first": 2, "second": 2, "neither": 1},
    }  # fmt: skip


def test_the_words_follow_from_the_numbers():
    better = report._better(a_pair(-0.089, -0.097, -0.081, 1e-9), [])
    assert better.startswith(
        "d-vit is better than d-cnn by 8.9 percentage points (95% CI 8.1 to 9.7; McNemar's test: "
        "p < 0.0001)."
    )
    assert "not the variation between seeds (train with several seeds)" in better
    seeds = [{"checkpoints": ["d-cnn", "c2"]}, {"checkpoints": ["d-vit", "v2"]}]
    assert "see the means" in report._better(a_pair(-0.089, -0.097, -0.081, 1e-9), seeds)
    assert report._better(a_pair(-0.004, -0.01, 0.002, 0.2), []) == (
        "The difference is not significant: d-cnn minus d-vit is −0.4 percentage points (95% CI "
        "−1.0 to +0.2; McNemar's test: p = 0.2)."
    )
    assert "d-cnn has significantly higher recall of x (+5.0)" in report._classes(
        a_pair(0.05, 0.01, 0.1, 0.01)
    )
    many = a_pair(0.05, 0.01, 0.1, 1e-9)
    many["per_class"] = {str(i): many["per_class"]["x"] for i in range(5)}
    assert "of 0 (+5.0), 1 (+5.0), 2 (+5.0) and 2 more; d-vit" in report._classes(many)
    many = a_pair(0.05, 0.01, 0.1, 0.01)
    many["per_class"] = {str(i): many["per_class"]["x"] for i in range(10)}  # 10 × .01 > .05
    assert "No class shows a significant difference" in report._classes(many)
    assert report.listed([]) == "" and report.listed(["a", "b", "c"]) == "a, b and c"
    rows = {"a": {"confusion_matrix": [[9, 2, 0], [0, 9, 1], [0, 1, 9]]}}
    assert (
        report._confusions(rows, list("xyz"))
        == "a confuses x and y most, in 2 images (as often: 1 more)."
    )


def test_sentences_name_the_right_network():
    pair = a_pair(0.1, 0.05, 0.15, 0.01) | {"agreement": 0.6}
    pair["right"] = {"both": 5, "first": 3, "second": 1, "neither": 1}
    assert report._shared(pair) == (
        "Both are right on 50.0% of the images, d-cnn alone on 30.0%, d-vit alone on 10.0%, "
        "neither on 10.0%. They predict the same class on 60.0%."
    )
    ensemble = {"accuracy": 0.9, "difference": 0.02, "interval": [0.01, 0.03], "best": "d-cnn"}
    assert report._ensemble(ensemble, 2) == (
        "The mean of the 2 networks' probabilities has an accuracy of 90.0%: +2.0 percentage "
        "points (95% CI +1.0 to +3.0) compared with the best of them on these images, d-cnn."
    )
    rows = {
        "a": {"confidence": 0.7, "accuracy": 0.8, "ece": 0.1, "temperature": {"ece": 0.02},
              "coverage": {"80%": 0.9}},
        "b": {"confidence": 0.9, "accuracy": 0.6, "ece": 0.3, "temperature": None,
              "coverage": {"80%": 0.7}},
    }  # fmt: skip
    assert report._confidence(rows) == (
        "Mean confidence minus accuracy: a −10.0 percentage points (ECE 10.0%; 2.0% with a fitted "
        "temperature) and b +30.0 percentage points (ECE 30.0%). Accuracy on the 80% most "
        "confident predictions: a 90.0% and b 70.0%."
    )


def test_of_several_seeds_the_first_is_compared_with_the_other_recipe(results):
    row = next(iter(json.loads((results / "metrics.json").read_text()).values()))
    about = json.loads((results / "comparison.json").read_text())["about"]
    metrics = {name: row | {"accuracy": x} for name, x in (("a", 0.8), ("c", 0.9), ("b", 0.7))}
    seeds = {"checkpoints": ["a", "c"], "mean": 0.85, "std": 0.07}
    pairs = [a_pair(0.1, 0.05, 0.15, 0.01), a_pair(0.2, 0.15, 0.25, 0.01)]
    for pair, first in zip(pairs, "ac", strict=True):
        pair |= {"first": first, "second": "b"}
    compared = {"pairs": pairs, "recipes": [seeds], "ensemble": None, "about": about}
    lines = report.summary(metrics, compared)
    assert lines[0].startswith("Accuracy on 360 test images: a 80.0% (95% CI ")
    assert "85.00% ± 7.00%" in lines[1] and "a is better than b by 10.0 percentage" in lines[2]


def test_two_evaluations_write_the_same_numbers(trained, tmp_path, monkeypatch, numbers_only):
    """Byte for byte, but for times. Without --out-dir the folder has the checkpoint's name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained["cnn"].parent, "runs/digits-cnn")
    texts = []
    for _ in range(2):
        evaluate.main(["runs/digits-cnn/best.pt"])
        text = (tmp_path / "runs/evaluation/digits-cnn/metrics.json").read_text()
        texts.append(re.sub(r'("evaluation_seconds"|"images_per_second"): [\d.]+', "", text))
    assert texts[0] == texts[1] and len(texts[0]) > 5000


def test_each_evaluation_has_its_own_folder():
    def folder(*argv):
        return evaluate.default_out_dir(evaluate.parse_arguments(list(argv))).name

    assert folder("runs/a/best.pt", "runs/b/last.pt") == "a+b-last"
    assert folder("pretrained/cnn.pt", "--data-dir", "x/photos") == "pretrained-cnn_x-photos"
    assert folder("a.pt", "--split", "val", "--robustness") == "a_val_robustness"
    assert folder("a.pt", "--data-dir", "photos.v1") == "a_photos.v1"
    assert folder("a.pt", "--data-dir", "/") == "a"
    here = Path.cwd()
    assert folder("a.pt", "--data-dir", ".") == "a_" + "-".join(here.parts[1:])
    assert folder("../best.pt") == "-".join(here.parent.parts[1:])


@pytest.mark.parametrize("path", ["best.pt", "./last.pt", "a/../best.pt", "a/b/../../last.pt"])
def test_a_network_is_called_after_the_folder_of_its_run(trained, tmp_path, monkeypatch, path):
    monkeypatch.chdir(shutil.copytree(trained["cnn"].parent, tmp_path / "my-run"))
    Path("a/b").mkdir(parents=True)
    (model,) = load_models([path], torch.device("cpu"))
    assert model.name == "my-run"


def test_runs_share_a_recipe_if_the_seed_alone_differs(trained):
    (model,) = load_models([str(trained["cnn"])], torch.device("cpu"))
    for part, key, value, same in (
        ("settings", "seed", 5, True),
        ("settings", "out_dir", "elsewhere", True),
        ("settings", "amp", "bf16", False),
        ("settings", "lr", 9.0, False),
        ("dataset", "data_dir", "moved", True),
        ("dataset", "content", "changed", False),
    ):
        other = copy.deepcopy(model)
        other.path, other.checkpoint[part][key] = "other.pt", value
        assert (evaluate.recipe(model) == evaluate.recipe(other)) == same, key
    unfinished = copy.deepcopy(model)
    unfinished.path = "other.pt"
    unfinished.checkpoint["history"].pop()
    assert evaluate.recipe(model) != evaluate.recipe(unfinished)


def test_all_ties_of_confused_pairs_are_counted():
    matrix = np.triu(np.ones((8, 8), int), 1) + 5 * np.eye(8, dtype=int)
    said = report._confusions({"cnn": {"confusion_matrix": matrix.tolist()}}, list("abcdefgh"))
    assert "in 1 images (as often: 27 more)" in said


def test_a_note_may_name_what_cannot_be_decoded(trained, tmp_path, monkeypatch, numbers_only):
    """Such as a folder of decoded images with bytes that are not UTF-8."""
    real = evaluate.load_data_for

    def load(*args):
        return dataclasses.replace(real(*args), note="images are kept in caf\udce9")

    monkeypatch.setattr(evaluate, "load_data_for", load)
    evaluate.main([str(trained["cnn"]), "--out-dir", str(tmp_path)])
    assert r"caf\udce9" in (tmp_path / "report.html").read_text()


def test_a_checkpoint_given_twice_is_refused(trained, fails):
    path = trained["cnn"]
    assert f"{path} is named twice" in fails(evaluate.main, path, path)


def test_classes_match_by_name_not_by_place(trained, tmp_path, numbers_only):
    """A checkpoint whose classes are in another order, its head likewise, scores the same."""
    state = checkpoint.load_checkpoint(trained["cnn"])
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    state["classes"] = [str(i) for i in order.tolist()]
    for key in ("head.weight", "head.bias"):
        state["model"][key] = state["model"][key][order]
    other = tmp_path / "shuffled.pt"
    checkpoint.save_checkpoint(other, state)
    evaluate.main([str(trained["cnn"]), str(other), "--out-dir", str(tmp_path / "out")])
    first, second = json.loads((tmp_path / "out" / "metrics.json").read_text()).values()
    assert first["confusion_matrix"] == second["confusion_matrix"]


def test_one_checkpoint_on_the_validation_split(trained, tmp_path, numbers_only):
    evaluate.main([str(trained["cnn"]), "--split", "val", "--out-dir", str(tmp_path)])
    (found,) = json.loads((tmp_path / "metrics.json").read_text()).values()
    best = checkpoint.load_checkpoint(trained["cnn"])["best"]["val_accuracy"]
    assert found["accuracy"] == pytest.approx(best)  # what the training saw, from the file alone
    assert found["temperature"] is None  # there are no other images to fit it on
    compared = json.loads((tmp_path / "comparison.json").read_text())
    assert compared["pairs"] == [] and "chose the epoch" in compared["about"]["caveats"][0]
