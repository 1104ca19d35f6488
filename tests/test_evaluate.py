import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sk

import checkpoint
import evaluate
from data import load_data


@pytest.fixture
def scores():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (200,), generator=generator)
    logits = torch.randn(200, 3, generator=generator)
    logits[torch.arange(200), labels] += 1
    return logits, labels


def test_metrics_equal_scikit_learns(scores):
    logits, labels = scores
    ours = evaluate.measure(logits, labels, ["a", "b", "c"])
    p = logits.argmax(1)
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(labels, p))
    assert ours["macro_f1"] == pytest.approx(sk.f1_score(labels, p, average="macro"))
    assert ours["weighted_f1"] == pytest.approx(sk.f1_score(labels, p, average="weighted"))
    assert ours["loss"] == pytest.approx(sk.log_loss(labels, logits.double().softmax(1)), rel=1e-5)
    assert ours["confusion_matrix"] == sk.confusion_matrix(labels, p).tolist()
    precision, recall, f1, support = sk.precision_recall_fscore_support(labels, p)
    for i, name in enumerate("abc"):
        mine = ours["per_class"][name]
        expected = (precision[i], recall[i], f1[i], support[i])
        assert list(mine.values()) == pytest.approx(expected)


def test_a_class_without_images_is_no_error(scores):
    logits, _ = scores
    ours = evaluate.measure(logits, torch.zeros(200, dtype=torch.long), ["a", "b", "c"])
    assert ours["per_class"]["b"]["support"] == 0
    evaluate.plot_confusion({"m": ours}, ["a", "b", "c"])


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
    assert "evaluation/confusion_matrix" in events.Tags()["images"]
    (point,) = events.Scalars("test accuracy/digits-cnn")
    assert point.value == pytest.approx(written[str(trained["cnn"])]["accuracy"])


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


def test_a_folder_of_other_classes_is_refused(trained, photos, fails):
    argv = ["--dataset", "folder", "--data-dir", photos]
    line = fails(evaluate.main, trained["cnn"], *argv)
    assert "only the data set has 'bright', 'dark'" in line
