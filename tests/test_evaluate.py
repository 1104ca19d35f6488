import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CNN
from PIL import Image
from sklearn import metrics as sk

import checkpoint
import evaluate
import figures
import train_cnn
from data import load_data


def test_metrics_worked_out_by_hand():
    labels, predictions = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 0, 2])
    logits = math.log(8) * F.one_hot(predictions).float()  # probabilities .8, .1, .1
    ours = evaluate.measure(logits, labels, ["a", "b", "c"])
    assert ours["confusion_matrix"] == [[2, 1, 0], [1, 1, 0], [0, 0, 1]]
    by_class = {"a": (2 / 3, 2 / 3, 2 / 3, 3), "b": (1 / 2, 1 / 2, 1 / 2, 2), "c": (1, 1, 1, 1)}
    for name, expected in by_class.items():  # precision, recall, F1, support
        assert list(ours["per_class"][name].values()) == pytest.approx(expected)
    assert ours["accuracy"] == pytest.approx(4 / 6)
    assert ours["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert ours["weighted_f1"] == pytest.approx((3 * 2 / 3 + 2 * 1 / 2 + 1) / 6)
    assert ours["loss"] == pytest.approx(-(4 * math.log(0.8) + 2 * math.log(0.1)) / 6)


def test_a_class_without_images_is_no_error():
    logits = torch.eye(3).repeat(5, 1)
    ours = evaluate.measure(logits, torch.zeros(15, dtype=torch.long), ["a", "b", "c"])
    assert ours["per_class"]["b"]["support"] == 0
    figures.plot_confusion({"m": ours}, ["a", "b", "c"])


def test_rows_of_the_confusion_figure_are_true_classes():
    logits = torch.eye(2)[[0, 0, 1]]
    ours = evaluate.measure(logits, torch.tensor([0, 1, 1]), ["a", "b"])
    (axes,) = figures.plot_confusion({"m": ours}, ["a", "b"]).axes
    cells = {(round(t.get_position()[1]), round(t.get_position()[0])): [] for t in axes.texts}
    for text in axes.texts:
        x, y = text.get_position()
        cells[round(y), round(x)].append(text.get_text())
    assert cells == {(0, 0): ["1", "100.0%"], (1, 0): ["1", "50.0%"], (1, 1): ["1", "50.0%"]}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")


def test_a_folder_with_test_alone_is_measured_whole(photos, tmp_path):
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
    evaluate.main([*map(str, trained.values()), "--out-dir", str(out_dir)])
    return out_dir


def test_files_say_what_the_models_do(results, trained):
    written = json.loads((results / "metrics.json").read_text())
    assert list(written) == [str(path) for path in trained.values()]
    test = load_data("digits", ".").test
    for path, found in written.items():
        model, c = checkpoint.load_model(path)
        images, labels = test.rows(slice(None))
        mean, std = (torch.tensor(c[k]).view(3, 1, 1) for k in ("mean", "std"))
        p = model((images / 255 - mean) / std).argmax(1)
        assert found["accuracy"] == pytest.approx(sk.accuracy_score(labels, p))
        assert sum(found["per_class"][d]["support"] for d in "0123456789") == 360
    report = (results / "classification_report.txt").read_text()
    assert "digits-cnn" in report and "macro avg" in report
    comparison = json.loads((results / "comparison.json").read_text())
    assert [row["accuracy"] for row in comparison] == [m["accuracy"] for m in written.values()]
    assert all(row["timing"]["training_seconds"] > 0 for row in comparison)
    for name in ("confusion_matrix", "learning_curves", "class_examples", "class_counts"):
        pixels = np.asarray(Image.open(results / f"{name}.png").convert("L"))
        assert pixels.shape[1] >= 700 and pixels.std() > 5


def test_tensorboard_has_figures_and_numbers(results, trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(results)).Reload()
    written = json.loads((results / "metrics.json").read_text())
    tags, m = events.Tags(), written[str(trained["cnn"])]
    assert not tags["scalars"]  # no card per number
    (image,) = events.Images("evaluation/confusion_matrix")
    assert image.step == max(other["step"] for other in written.values())
    (text,) = events.Tensors("evaluation/scores/text_summary")
    table = text.tensor_proto.string_val[0].decode()
    assert f"|digits-cnn|`test`|`{m['accuracy']}`|" in table and text.step == image.step


def test_classes_match_by_name_not_by_place(trained, tmp_path):
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


def test_one_checkpoint_on_the_validation_split(trained, tmp_path):
    evaluate.main([str(trained["cnn"]), "--split", "val", "--out-dir", str(tmp_path)])
    (found,) = json.loads((tmp_path / "metrics.json").read_text()).values()
    best = checkpoint.load_checkpoint(trained["cnn"])["best"]["val_accuracy"]
    assert found["accuracy"] == pytest.approx(best)  # what the training saw, from the file alone
    assert not (tmp_path / "comparison.json").exists()


def test_an_old_comparison_is_removed(trained, tmp_path):
    (tmp_path / "comparison.json").write_text("[]")
    evaluate.main([str(trained["cnn"]), "--out-dir", str(tmp_path)])
    assert not (tmp_path / "comparison.json").exists()


def test_a_folder_of_other_classes_is_refused(trained, photos, fails):
    argv = ["--dataset", "folder", "--data-dir", photos]
    line = fails(evaluate.main, trained["cnn"], *argv)
    assert "class 'bright' is none of the checkpoint's 10" in line
