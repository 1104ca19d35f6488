"""TensorBoard: pictures, text, hyperparameters."""

import io
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TINY_CNN, TINY_VIT
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

import logs
import train_cnn
import train_vit
import training
from checkpoint import load_checkpoint
from data import load_data
from models import CNN, ViT

ARGV = ["--dataset", "digits", "--device", "cpu", "--epochs", "2", "--limit-batches", "5"]


def read(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A CNN with pictures, and the same without; a ViT with a teacher and pictures."""
    root = tmp_path_factory.mktemp("runs")
    train_cnn.main([*ARGV, *TINY_CNN, "--out-dir", str(root / "on")])
    train_cnn.main([*ARGV, *TINY_CNN, "--out-dir", str(root / "off"), "--pictures", "off"])
    teacher = ["--teacher", str(root / "on" / "best.pt"), "--drop-path", "0.2"]
    train_vit.main([*ARGV, *TINY_VIT, *teacher, "--epochs", "1", "--out-dir", str(root / "vit")])
    return root


def test_pictures_come_at_epochs_1_2_4_8_and_the_last(monkeypatch):
    drawn = []
    monkeypatch.setattr(logs.Pictures, "augmented", lambda self, epoch: drawn.append(epoch))
    writer = mock.MagicMock(log_dir="")
    pictures = logs.Pictures(None, None, {}, SimpleNamespace(epochs=11))
    for epoch in range(1, 12):
        pictures(logs.Logs(writer, writer), {"epoch": epoch, "step": 0}, None, None)
        pictures(None, {"epoch": epoch, "step": 0}, None, None)  # another process draws nothing
    assert drawn == [1, 2, 4, 8, 11]


def test_pictures_change_no_bit(runs):
    train, val = read(runs / "on" / "train"), read(runs / "on" / "val")
    assert [i.step for i in train.Images("pictures/augmented")] == [5, 10]
    for name in ("explained", "confusion", "most confident mistakes"):
        assert [i.step for i in val.Images(f"pictures/{name}")] == [5, 10]
    one, other = (load_checkpoint(runs / run / "last.pt") for run in ("on", "off"))
    assert all(torch.equal(value, other["model"][key]) for key, value in one["model"].items())
    assert not read(runs / "off" / "train").Tags()["images"]
    assert read(runs / "vit" / "val").Images("pictures/explained")


def test_augmented_images_are_those_of_the_epochs_first_batch(runs, monkeypatch):
    """Enlarged four times, without blur."""
    seen = []
    step = read(runs / "on" / "train").Images("pictures/augmented")[1]
    picture = np.asarray(Image.open(io.BytesIO(step.encoded_image_string)))
    first = picture[2:130, 2:130]
    assert np.array_equal(first, first[::4, ::4].repeat(4, 0).repeat(4, 1))

    def loop(model, optimizer, train_batches, val_batches, settings, metadata, *rest):
        torch.manual_seed(training.mixed_seed(settings.seed, 2))
        images, _ = next(iter(train_batches))
        seen.append(images[0] * train_batches.std + train_batches.mean)
        raise KeyboardInterrupt

    monkeypatch.setattr(train_cnn, "train", loop)
    with pytest.raises(SystemExit):
        train_cnn.main([*ARGV, *TINY_CNN, "--out-dir", str(runs / "seen")])
    np.testing.assert_allclose(first[::4, ::4], seen[0].permute(1, 2, 0).numpy(), atol=0.51)


@pytest.fixture
def validation():
    """Twelve digits in `Pictures`, and logits that are wrong in three rows, not equally surely."""
    data = load_data("digits", ".")
    split = data.val.subset(torch.arange(12))
    labels = split.labels[split.indices]
    logits = torch.nn.functional.one_hot(labels, 10) * 5.0
    for row, surplus in ((3, 1.0), (7, 4.0), (9, 2.0)):
        logits[row] = 0
        logits[row, (labels[row] + 1) % 10] = surplus
    logits[0, labels[0] - 1] = -torch.inf  # as float16 may have it
    metadata = {
        "classes": data.classes, "model_name": "cnn", "mean": data.mean, "std": data.std,
        "dataset": {"image_size": 32},
    }  # fmt: skip
    batches = SimpleNamespace(split=split)
    pictures = logs.Pictures(batches, batches, metadata, SimpleNamespace(epochs=1, seed=0))
    return pictures, split, logits, labels


def test_mistakes_are_the_most_confident_ones_and_the_matrix_counts_all(validation, monkeypatch):
    import charts
    import figures

    drawn, matrix = [], []
    monkeypatch.setattr(figures, "plot_explanations", lambda *a: drawn.append(a) or ["figure"])
    monkeypatch.setattr(charts, "plot_confusion", lambda m, c: matrix.append(m))
    pictures, split, logits, labels = validation
    network, tags = CNN(stem=4, widths=(8, 8), depths=(0, 0)).eval(), []
    log = SimpleNamespace(add_figure=lambda tag, *_: tags.append(tag))
    pictures.add_figures(log, 1, network, logits, labels)
    assert tags == [
        "pictures/explained", "pictures/most confident mistakes", "pictures/confusion"
    ]  # fmt: skip
    (column,) = drawn[0][3]
    assert column.header.endswith("predicted class, in logits")
    network = ViT(dim=16, depth=1, heads=2, patch_size=8).eval()
    pictures.add_figures(log, 1, network, logits, labels)
    (column,) = drawn[2][3]
    assert "relevance" in column.header
    mistakes = np.stack(drawn[1][0])
    expected = split.rows(torch.tensor([7, 9, 3]))[0].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(mistakes, expected)
    (scores,) = matrix[0].values()
    assert np.trace(scores["confusion_matrix"]) == 9 and np.sum(scores["confusion_matrix"]) == 12
    assert scores["accuracy"] == pytest.approx(0.75)


def test_a_dollar_in_a_class_name_is_no_mathematics(validation, tmp_path, monkeypatch):
    """`$1_$5` is not valid mathematics, so matplotlib would raise an error."""
    pictures, _, logits, labels = validation
    pictures.metadata["classes"] = [f"${i}_$5" for i in range(10)]
    monkeypatch.setattr(pictures, "augmented", lambda _: np.zeros((8, 8, 3), np.uint8))
    network = CNN(stem=4, widths=(8, 8), depths=(0, 0)).eval()
    written = logs.Logs(*(SummaryWriter(tmp_path / part) for part in ("train", "val")))
    pictures(written, {"epoch": 1, "step": 1}, network, (logits, labels))
    logs.close_logs(written)
    assert "pictures/confusion" in read(tmp_path / "val").Tags()["images"]


def test_a_dataloader_has_pictures_too(tmp_path, monkeypatch):
    """README's line. Its augmented images are drawn, and of its validation the matrix."""
    real = train_cnn.prepare

    def prepare(*args):
        model, _, val_batches, metadata = real(*args)
        images, labels = (torch.cat(parts) for parts in zip(*val_batches, strict=True))
        loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
        return model, loader, loader, metadata

    monkeypatch.setattr(train_cnn, "prepare", prepare)
    train_cnn.main([*ARGV, "--epochs", "1", *TINY_CNN, "--out-dir", str(tmp_path)])
    assert read(tmp_path / "train").Images("pictures/augmented")
    assert read(tmp_path / "val").Tags()["images"] == ["pictures/confusion"]


def test_the_table_of_layers():
    """Multiply-adds of a convolution, of a linear layer and of attention, by hand."""
    table = logs.layer_table(CNN(stem=4, widths=(8, 8), depths=(0, 0)), 32)
    assert f"|stem|`Conv2d`|`4×32×32`|`108`|`{4 * 27 * 1024:,}`|" in table
    table = logs.layer_table(ViT(dim=16, depth=2, heads=2, patch_size=8), 32)
    linear, attention = 17 * 16 * 16 * (3 + 1 + 2 + 2), 2 * 17 * 17 * 16
    assert f"|blocks.0|`Block`|`17×16`|`2,224`|`{linear + attention:,}`|" in table
    last = 16 * 16 * (17 * 3 + 1 + 2 + 2) + 2 * 17 * 16  # of the class token alone
    assert f"|blocks.1|`Block`|`1×16`|`2,224`|`{last:,}`|" in table


def test_settings_that_are_no_text_are_escaped():
    """A path of undecodable bytes, which TensorBoard cannot write."""
    assert logs.hyperparameters({"teacher": "caf\udce9", "epochs": 2}) == {
        "teacher": "caf\\udce9", "epochs": 2
    }  # fmt: skip


def test_text_and_hyperparameters(runs):
    from tensorboard.plugins.hparams import plugin_data_pb2

    def text(name):
        (found,) = read(runs / "on" / "train").Tensors(f"{name}/text_summary")
        return found.tensor_proto.string_val[0].decode()

    assert "|batch_size|`32`|" in text("settings") and "|**all**|`CNN`|" in text("layers")
    assert "val: plain cross-entropy" in text("settings")
    val = read(runs / "on" / "val")
    classes = {f"validation accuracy/{i}" for i in range(10)}
    assert set(val.Tags()["scalars"]) == {"epoch/loss", "epoch/accuracy", *classes}
    tags = [*val.Tags()["scalars"], *read(runs / "on" / "train").Tags()["scalars"]]
    assert min(tags) == "epoch/accuracy"  # TensorBoard sorts by name: these charts come first
    labels = load_data("digits", ".").val
    counts = torch.bincount(labels.labels[labels.indices]).tolist()
    of_class = [val.Scalars(f"validation accuracy/{i}")[-1] for i in range(10)]
    correct = sum(n * point.value for n, point in zip(counts, of_class, strict=True))
    last = val.Scalars("epoch/accuracy")[-1]
    assert correct / 144 == pytest.approx(last.value, abs=1e-6) and of_class[0].step == last.step
    content = val.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert started["batch_size"].number_value == 32 and "out_dir" not in started
    assert {p.name for p in (runs / "on").iterdir() if p.is_dir()} == {"train", "val"}
