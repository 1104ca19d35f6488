"""Folders and images of every kind, read as what they are, or refused with the right cause."""

import json
import os
import re
import shutil
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_CNN
from PIL import Image, PngImagePlugin

import charts
import checkpoint
import data
import evaluate
import explain
import faithfulness
import figures
import folders
import prepare
import train_cnn
import train_vit
from batches import CORRUPTIONS, Batches
from checkpoint import load_checkpoint, make_metadata
from cli import UserError
from data import load_data
from folders import read_image
from metrics import compare, measure
from prepare import load_data_for, load_models


def solid(path, color=(200, 30, 90), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def classes_of(root, *names, count=10):
    for i, name in enumerate(names):
        for j in range(count):
            solid(root / name / f"{j:02}.png", (80 * i, j, 0))
    return root


def folder_flags(root, *more):
    flags = ["--dataset", "folder", "--data-dir", root, "--batch-size", 4, "--epochs", 1]
    flags += ["--pictures", "off"]
    return [*map(str, flags), "--device", "cpu", *TINY_CNN, *map(str, more)]


# ---------------------------------------------------------------- value range


def tiff(path, values: np.ndarray, sample_format=1, photometric=1):
    """An uncompressed little-endian TIFF, written out: (H, W) or (H, W, bands)."""
    bands = values.shape[2] if values.ndim == 3 else 1
    raw, bits = values.astype(values.dtype.newbyteorder("<")).tobytes(), 8 * values.itemsize
    tags = {256: values.shape[1], 257: values.shape[0], 258: bits, 259: 1, 262: photometric}
    tags |= {273: 8, 277: bands, 278: values.shape[0], 279: len(raw), 339: sample_format}
    tags |= {338: 0} if bands == 2 else {}  # a second band of no known meaning
    entries = b""
    for tag, value in sorted(tags.items()):
        count = bands if tag in (258, 339) and bands <= 2 else 1
        packed = struct.pack("<HH", value, value) if count == 2 else struct.pack("<I", value)
        entries += struct.pack("<HHI", tag, 4 if count == 1 else 3, count) + packed
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(raw)) + raw + directory)


GREY = np.full((4, 6), 99)


@pytest.mark.parametrize(
    ("dtype", "sample_format", "photometric", "expected"),
    [
        (np.uint8, 1, 1, 99), (np.uint16, 1, 1, 99), (np.uint8, 1, 0, 156), (np.uint16, 1, 0, 156),
        (np.int8, 2, 1, "signed"), (np.int16, 2, 1, "signed"), (np.int32, 2, 1, "signed"),
        (np.uint32, 1, 1, "32-bit"), (np.float32, 3, 1, "floating-point"),
    ],
)  # fmt: skip
def test_the_range_of_values_is_known_or_refused(
    tmp_path, dtype, sample_format, photometric, expected
):
    """CT images have signed 16 bits, which must not be read as 0 to 65,535."""
    factor = 257 if np.dtype(dtype).itemsize == 2 and sample_format == 1 else 1
    tiff(tmp_path / "x.tif", (GREY * factor).astype(dtype), sample_format, photometric)
    if isinstance(expected, int):
        assert read_image(tmp_path / "x.tif").getpixel((2, 2)) == (expected,) * 3
    else:
        with pytest.raises(UserError, match=f"x.tif: its values are .*{expected}.*; convert"):
            read_image(tmp_path / "x.tif")


def test_16_bits_of_png_and_pgm(tmp_path):
    values = (GREY * 257).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    (tmp_path / "x.pgm").write_bytes(b"P5\n6 4\n65535\n" + values.astype(">u2").tobytes())
    for name in ("x.png", "x.pgm"):
        assert read_image(tmp_path / name).getpixel((2, 2)) == (99, 99, 99)
    colors = (np.stack([GREY, GREY // 3, GREY // 9], -1) * 40).astype(np.uint16)
    tiff(tmp_path / "rgb.tif", colors, photometric=2)
    assert read_image(tmp_path / "rgb.tif").info["largest"] == 257 * (99 * 40 // 256)


def test_16_bit_images_that_are_all_dark_are_named(tmp_path, capsys):
    """12 bits in 16; said again when they come from the cache, and not where one is bright."""
    for name in ("cat", "dog"):
        for i in range(10):
            solid(tmp_path / name / f"{i}.png")
        Image.fromarray((GREY * 40).astype(np.uint16)).save(tmp_path / name / "dark.png")
    for _ in "12":
        load_data("folder", tmp_path)
        err = capsys.readouterr().err
        assert "warning: 2 images of 16 bits: the largest value is 3960 of 65,535" in err
    Image.fromarray((GREY * 600).astype(np.uint16)).save(tmp_path / "cat" / "bright.png")
    load_data("folder", tmp_path)
    assert capsys.readouterr().err == ""


def test_bands_that_pillow_does_not_read(tmp_path, capsys):
    """Five bands are refused as what they are; a second one is left out with a warning."""
    tiff(tmp_path / "five.tif", np.zeros((4, 6, 5), np.uint8))
    with pytest.raises(UserError, match=r"five\.tif: a TIFF of bands or bits that Pillow does not"):
        read_image(tmp_path / "five.tif")
    remarks = []
    tiff(tmp_path / "two.tif", np.full((4, 6, 2), 7, np.uint8))
    assert read_image(tmp_path / "two.tif", remarks=remarks).getpixel((1, 1)) == (7, 7, 7)
    assert remarks == [f"{tmp_path / 'two.tif'}: only 1 of its 2 bands are used"]


def test_other_files_are_named_as_what_they_are(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    with pytest.raises(UserError, match=r"x\.jpg: a HEIC image; save it as JPEG or PNG"):
        read_image(tmp_path / "x.jpg")


# ---------------------------------------------------------------- optional metadata


# Found by damaging bytes: Pillow 13 raises struct.error, AttributeError and TypeError for these.
BROKEN_EXIF = [
    f"4578696600004d4d002a000000080003{rest}"
    for rest in (
        "010a00020000000600000032011200030000000100060000011a00050000000100000038000000c5"
        "6d61866572000000004800000001",
        "010f00020000000600000032011200030000000100060000010d000500000001000000380000000"
        "06d616b6572000000004800000001",
        "010f00020000000600000032011200030000000100060000011a000700000001000000380000000"
        "06d616b65722e0000004800000001",
    )
]


def test_broken_exif_and_long_texts_do_no_harm(tmp_path, capsys):
    """Broken EXIF, and texts of megabytes, as some editors write them."""
    solid(tmp_path / "a" / "good.png")
    picture = Image.new("RGB", (8, 8), (9, 8, 7))
    for i, broken in enumerate(BROKEN_EXIF):
        picture.save(tmp_path / "a" / f"{i}.jpg", exif=bytes.fromhex(broken), quality=100)
    text = PngImagePlugin.PngInfo()
    text.add_text("XML:com.adobe.xmp", "x" * 3_000_000, zip=True)
    picture.save(tmp_path / "a" / "z.png", pnginfo=text)
    for name in ("0.jpg", "1.jpg", "2.jpg", "z.png"):
        assert np.allclose(read_image(tmp_path / "a" / name).getpixel((3, 3)), (9, 8, 7), atol=2)
    classes_of(tmp_path, "b")
    shutil.copytree(tmp_path / "b", tmp_path / "a", dirs_exist_ok=True)
    load_data("folder", tmp_path)
    for line in capsys.readouterr().err.splitlines():  # a warning names its file
        assert line.startswith(f"warning: {tmp_path / 'a'}/")


def test_a_fault_of_the_program_is_not_blamed_on_the_image(tmp_path, monkeypatch):
    """As with a Pillow that lacks what is called here."""
    solid(tmp_path / "x.png")
    monkeypatch.delattr(Image.Image, "has_transparency_data")
    with pytest.raises(AttributeError):
        read_image(tmp_path / "x.png")


def test_up_to_ten_bad_files_are_named_at_once(tmp_path):
    classes_of(tmp_path, "cat", "dog")
    for i in range(3):
        (tmp_path / "dog" / f"bad{i}.jpg").write_bytes(b"no image")
    with pytest.raises(UserError) as error:
        load_data("folder", tmp_path)
    assert str(error.value).startswith("3 files that cannot be used: ")
    assert all(
        f"{tmp_path / 'dog' / f'bad{i}.jpg'}: not an image" in str(error.value) for i in "012"
    )
    for i in range(3, 30):
        (tmp_path / "dog" / f"bad{i}.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^the first 10 files that cannot be used"):
        load_data("folder", tmp_path)
    assert not list(tmp_path.glob(".cache*"))


# ---------------------------------------------------------------- splits and classes


def test_every_split_that_lacks_a_class_says_so(tmp_path, capsys):
    classes_of(tmp_path, "cat", count=100)
    classes_of(tmp_path, "dog", count=4)
    train_cnn.main(folder_flags(tmp_path, "--out-dir", tmp_path.parent / "lacks"))
    head = capsys.readouterr().out.splitlines()[0]
    assert "folder: 2 classes ('cat', 'dog'); 74 training" in head
    assert "no validation images of 'dog'" in head and "no test images" not in head
    small = classes_of(tmp_path.parent / "small", "cat", count=40)
    classes_of(small, "dog", count=3)
    assert "no training images of 'dog'" in load_data("folder", small, val_fraction=0.85).note


def test_averages_are_over_classes_with_images():
    """12 of 12 right and a class without images: 1, not 2/3."""
    labels = torch.tensor([0, 1] * 6)
    found = measure(10 * np.eye(3)[labels], labels.numpy(), ["a", "b", "c"])
    assert found["macro_f1"] == found["weighted_f1"] == found["accuracy"] == 1
    assert [v for v in found["per_class"]["c"].values() if v is not None] == [0]  # support
    wrong = measure(10 * np.eye(3)[[0, 1, 2]], np.array([0, 1, 1]), ["a", "b", "c"])
    assert wrong["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert wrong["per_class"]["c"]["precision"] == 0 and wrong["per_class"]["c"]["f1"] is None
    (axes,) = charts.plot_confusion({"m": wrong}, ["a", "b", "c"]).axes
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b", "c (no images)"]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run of three classes: cat, dog and fox."""
    root = tmp_path_factory.mktemp("three")
    for part in ("train", "test"):
        classes_of(root / "photos" / part, "cat", "dog", "fox")
    train_cnn.main(folder_flags(root / "photos", "--out-dir", root / "run"))
    return root / "run" / "best.pt"


@pytest.mark.parametrize("layout", ["test alone", "beside train", "one level"])
def test_a_test_split_may_lack_classes_in_every_layout(layout, three, tmp_path, capsys, fails):
    root = tmp_path / "others"
    parent = root if layout == "one level" else root / "test"
    classes_of(parent, "cat", "fox")
    if layout == "beside train":
        classes_of(root / "train", "cat", "dog", "fox")
    argv = [three, "--data-dir", root, "--out-dir", tmp_path / "out"]
    found = load_data_for(load_models([str(three)], torch.device("cpu")), None, root)
    assert found.classes == ["cat", "dog", "fox"] and "no test images of 'dog'" in found.note
    assert set(found.test.labels[found.test.indices].tolist()) == {0, 2}
    if layout == "test alone":
        evaluate.main(list(map(str, argv)))
        assert "no test images of 'dog'" in capsys.readouterr().out
        (scores,) = json.loads((tmp_path / "out" / "metrics.json").read_text()).values()
        assert scores["per_class"]["dog"]["support"] == 0
        report = (tmp_path / "out" / "classification_report.txt").read_text()
        assert "no images of 'dog'" in report
    classes_of(parent, "emu")
    if layout == "beside train":
        classes_of(root / "train", "emu")
    assert "class 'emu' is none of the checkpoint's 3" in fails(evaluate.main, *argv)


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_validation_folders_have_several_names(tmp_path, name):
    for part in ("Train", name, "test"):
        classes_of(tmp_path / part, "a", "b", count=len(part))
    found = load_data("folder", tmp_path)
    assert found.sizes == [10, 2 * len(name), 8]


def test_the_cure_for_a_missing_test_split_merges_nothing(tmp_path, fails):
    for part in ("train", "val"):
        classes_of(tmp_path / part, "a", "b")
    line = fails(train_cnn.main, *folder_flags(tmp_path, "--out-dir", tmp_path.parent / "out"))
    assert "no folder test/<class>/ beside train/" in line
    assert "with some of the images of val/" in line and "directly there" not in line
    classes_of(tmp_path / "test", "a", "b")
    classes_of(tmp_path / "valid", "a", "b")
    line = fails(train_cnn.main, *folder_flags(tmp_path, "--out-dir", tmp_path.parent / "out"))
    assert "val/ and valid/ are both val images: keep one" in line


def test_a_class_may_be_called_training(tmp_path):
    classes_of(tmp_path, "testing", "training")
    assert load_data("folder", tmp_path).classes == ["testing", "training"]


# ---------------------------------------------------------------- what is left out


@pytest.mark.parametrize("at", ["cat/2024", "cat/a/b"])
def test_images_a_level_too_deep_are_refused(tmp_path, at, fails):
    classes_of(tmp_path / "photos", "cat", "dog", count=8)
    classes_of(tmp_path / "photos", at, count=20)
    argv = folder_flags(tmp_path / "photos", "--out-dir", tmp_path / "out")
    line = fails(train_cnn.main, *argv)
    assert "images a level too deep: 20" in line and f"/photos/cat/{at[4:].split('/')[0]}" in line


def test_what_is_skipped_is_counted_by_its_reason(tmp_path):
    classes_of(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "cat" / "list.txt").touch()
    (tmp_path / "cat" / "._01.png").touch()
    (tmp_path / "cat" / "empty").mkdir()
    solid(tmp_path / "loose.png")
    note = load_data("folder", tmp_path).note
    assert "skipped links to missing files: 1" in note
    assert f"skipped files that are not {' '.join(folders.IMG_EXTENSIONS)}: 1" in note
    assert "skipped hidden files: 1" in note
    assert "skipped images outside class folders: 1" in note


# ---------------------------------------------------------------- results and images


def test_results_are_not_written_into_the_images(three, tmp_path, fails):
    """Nor is anything left there by the refusal."""
    photos = shutil.copytree(three.parents[1] / "photos", tmp_path / "photos")
    before = sorted(photos.rglob("*"))
    inside = photos / "train" / "explained"
    own = ["--data-dir", photos]
    assert "is in the folder of images" in fails(explain.main, three, *own, "--out-dir", inside)
    assert "is in the folder of images" in fails(evaluate.main, three, *own, "--out-dir", inside)
    argv = folder_flags(photos, "--out-dir", inside)
    assert "is in the folder of images" in fails(train_cnn.main, *argv)
    original = three.parents[1] / "photos"
    argv = [three, "--images", photos / "test" / "cat" / "01.png", "--out-dir", original / "out"]
    assert "is in the folder of images" in fails(explain.main, *argv)
    assert sorted(photos.rglob("*")) == before and not (original / "out").exists()


# ---------------------------------------------------------------- cache and identity


def test_a_file_replaced_under_the_same_size_and_time_is_read(tmp_path):
    classes_of(tmp_path, "cat", "dog")
    path = tmp_path / "cat" / "00.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path, compress_level=0)
    load_data("folder", tmp_path)
    stat = path.stat()
    Image.new("RGB", (8, 8), (7, 8, 9)).save(tmp_path / "new.png", compress_level=0)
    (tmp_path / "new.png").replace(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    again = load_data("folder", tmp_path)
    assert again.train.images[0, :, 0, 0].tolist() == [7, 8, 9]
    time.sleep(0.05)  # clocks of file systems are coarse
    path.write_bytes(path.read_bytes().replace(bytes([7, 8, 9]), bytes([4, 5, 6])))  # same inode
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UserError, match=r"00\.png"):  # its checksum is wrong now
        load_data("folder", tmp_path)


def test_the_identity_of_a_data_set_is_its_names_and_content(tmp_path):
    """Copied elsewhere, with other times: the same. One pixel changed: another."""
    classes_of(tmp_path / "a", "cat", "dog")
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copyfile)
    first, copied = (load_data("folder", tmp_path / name) for name in "ab")
    assert first.content == copied.content
    (tmp_path / "b" / "cat" / "00.png").rename(tmp_path / "b" / "cat" / "0.png")
    assert load_data("folder", tmp_path / "b").content != first.content
    (tmp_path / "b" / "cat" / "0.png").rename(tmp_path / "b" / "cat" / "00.png")
    solid(tmp_path / "b" / "cat" / "00.png", (0, 0, 1))
    assert load_data("folder", tmp_path / "b").content != first.content


def test_composed_and_decomposed_names_are_one(tmp_path):
    """macOS decomposes é into e and an accent: one class, one order, one identity."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    classes_of(tmp_path / "a" / "train", composed, "cafz")
    classes_of(tmp_path / "a" / "test", decomposed, "cafz")
    classes_of(tmp_path / "b" / "train", decomposed, "cafz")
    classes_of(tmp_path / "b" / "test", composed, "cafz")
    first, second = (load_data("folder", tmp_path / name) for name in "ab")
    assert first.classes == second.classes == ["cafz", composed]
    assert first.content == second.content
    assert torch.equal(first.train.labels, second.train.labels)
    assert torch.equal(first.train.images, second.train.images)


def test_a_run_is_resumed_with_the_images_elsewhere(tmp_path, three, fails):
    """Also where the checkpoint was written on Windows."""
    photos = shutil.copytree(three.parents[1] / "photos", tmp_path / "elsewhere")
    run = shutil.copytree(three.parent, tmp_path / "run")
    state = load_checkpoint(run / "last.pt")
    state["settings"] |= {"epochs": 2, "data_dir": "C:\\photos", "out_dir": "runs\\x"}
    state["dataset"]["data_dir"] = "C:\\photos"
    torch.save(state, run / "last.pt")
    argv = ["--resume", "--out-dir", run, "--data-dir", photos]
    train_cnn.main(list(map(str, argv)))
    assert load_checkpoint(run / "last.pt")["epoch"] == 2
    state["settings"]["epochs"] = 3
    torch.save(state, run / "last.pt")
    solid(photos / "train" / "cat" / "00.png", (1, 1, 1))
    assert "are not those of the run" in fails(train_cnn.main, *argv)


def test_a_folder_names_the_files_of_its_images(three, tmp_path, capsys):
    explain.main([str(three), "--count", "3", "--out-dir", str(tmp_path)])
    rows = capsys.readouterr().out.splitlines()[:3]
    root = three.parents[1] / "photos" / "test"
    assert all(row.startswith(f"{root}/") and ".png  run: " in row for row in rows)


# ---------------------------------------------------------------- which data set


def test_the_wrong_data_set_is_named(tmp_path, fails):
    out = ["--out-dir", tmp_path / "out", *TINY_CNN]
    archive = tmp_path / "data" / "cifar-10-batches-py"
    archive.mkdir(parents=True)
    (archive / "batches.meta").touch()
    line = fails(train_cnn.main, "--data-dir", archive, *out)
    assert f"CIFAR-10 is in it: use --data-dir {tmp_path / 'data'}" in line
    for root in (archive, tmp_path / "data"):
        line = fails(train_cnn.main, "--dataset", "folder", "--data-dir", root, *out)
        assert f"use --dataset cifar10 --data-dir {tmp_path / 'data'}" in line
    photos = classes_of(tmp_path / "photos", "train/a", "train/b", "test/a", "test/b")
    line = fails(train_cnn.main, "--data-dir", photos, *out)
    assert "use --dataset folder" in line and not (photos / "cifar-10-python.tar.gz").exists()


# ---------------------------------------------------------------- many classes, long names


def test_figures_of_many_classes_are_bounded():
    """At most 4,000 pixels a side (66,960 before). So with 40 checkpoints."""
    C = 120
    classes = [f"class {i:03}" for i in range(C)]
    labels = torch.arange(2 * C) % C
    images = torch.randint(256, (2 * C, 3, 32, 32), dtype=torch.uint8)
    split = data.Split.of(images, labels)
    found = data.Data("folder", split, split, split, classes, (0.5,) * 3, (0.5,) * 3)
    metrics = measure(np.eye(C)[labels.roll(1)], labels.numpy(), classes)
    p = [np.eye(C)[labels.roll(shift)] for shift in (0, 1)]
    pair = {"first": "a", "second": "b", **compare(*p, labels.numpy(), classes)}
    metrics["robustness"] = {
        "images": 9, "clean": 0.5, "corruptions": {kind: [0.5] * 5 for kind in CORRUPTIONS},
        "shifts": [0.5] * 5,
    }  # fmt: skip
    for figure in (
        charts.plot_difference(pair, ["a", "b"], classes),
        charts.plot_confidence(dict.fromkeys(map(str, range(40)), metrics)),
        charts.plot_robustness(dict.fromkeys(map(str, range(40)), metrics)),
        charts.plot_confusion(dict.fromkeys(map(str, range(40)), metrics), classes),
        charts.plot_counts(found),
        charts.plot_examples(split, classes),
    ):
        assert max(120 * figure.get_size_inches()) < 4000  # pixels, as evaluate.py saves it


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["short", "x" * 20], ["short", "x" * 20]),
        (["a" * 30], ["a" * 9 + "…" + "a" * 9]),
        (["same/" * 6] * 2, ["same/same…ame/same/"] * 2),  # two images of one class
        (["long_" * 5, "long_" * 6], ["long_l…", "long_l…long_"]),  # one begins the other
    ],
)
def test_shortened_names(names, short):
    assert figures.shorten(names) == short


def test_names_that_differ_in_the_middle_stay_different():
    names = [f"experiment_{i:03}_with_a_long_end" for i in range(12)]
    short = figures.shorten(names)
    assert len(set(short)) == 12 and max(map(len, short)) <= 20
    assert all(f"{i:02}" in label for i, label in enumerate(short))
    grid = [f"run_lr{a}_batch-size{b}_decay{c}_seed{d}_with_augmentation"
            for a in (1, 2) for b in (1, 2) for c in (1, 2) for d in (1, 2)]  # fmt: skip
    for length in (14, 20, 32, 40):
        short = figures.shorten(grid, length)
        assert len(set(short)) == 16 and max(map(len, short)) <= length


def test_a_run_whose_name_begins_with_an_underscore_has_a_legend_entry():
    row = {"epoch": 1, "seconds": 60.0, "val_accuracy": 0.5, "train_accuracy": 0.4}
    row |= {"val_loss": 1.0, "train_loss": 1.2}
    figure = charts.plot_curves({"_draft": [row], "b": [row]}, {"_draft": 1, "b": 1})
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["validation, _draft", "training, _draft", "validation, b", "training, b"]


def test_more_maps_than_a_figure_holds(trained, tmp_path, capsys):
    argv = [trained["vit"], "--count", 2, "--target", *"0123456789", "predicted", "true"]
    explain.main([*map(str, argv), "--method", "grad-cam", "input-x-gradient", "--save-maps",
                  "--out-dir", str(tmp_path)])  # fmt: skip
    assert re.search(r"the figures show the first 12 of 2\d maps", capsys.readouterr().out)
    with Image.open(next(tmp_path.glob("*_explanations-any.png"))) as image:
        assert image.size[0] < 5000
    assert len(np.load(next(tmp_path.glob("*.npz")))) == 24 + 3


def test_batches_of_a_folder_keep_their_files(three):
    found = load_data("folder", three.parents[1] / "photos")
    part = found.train.subset(torch.arange(3))
    files = [found.train.files[row] for row in part.indices]
    images, _ = next(iter(Batches(part, 3, mean=(0,) * 3, std=(1,) * 3)))
    for file, image in zip(files, images, strict=True):
        expected = np.asarray(read_image(file, 32)).transpose(2, 0, 1) / 255
        np.testing.assert_allclose(image.numpy(), expected, atol=1e-6)


def test_a_network_of_the_wrong_shape_is_refused_before_images_are_read(tmp_path, fails):
    argv = ["--dataset", "folder", "--data-dir", tmp_path / "missing", "--dim", 52, "--heads", 3]
    line = fails(train_vit.main, *argv, "--out-dir", tmp_path / "out")
    assert "--heads 3 does not divide --dim 52" in line


# ---------------------------------------------------------------- more members of these kinds


def test_16_bits_in_other_orders_and_sizes(tmp_path):
    """Big-endian; 12 bits packed."""
    values = (GREY * 257).astype(np.uint16)
    tiff(tmp_path / "big.tif", values)
    data = bytearray((tmp_path / "big.tif").read_bytes())
    start = int.from_bytes(data[4:8], "little")
    head = struct.unpack_from("<H", data, start)
    out = b"MM\0*" + struct.pack(">I", start) + values.astype(">u2").tobytes()
    out += struct.pack(">H", *head)
    for i in range(head[0]):
        tag, kind, count, value = struct.unpack_from("<HHII", data, start + 2 + 12 * i)
        out += struct.pack(">HHI", tag, kind, count) + struct.pack(">I", value)
    (tmp_path / "big.tif").write_bytes(out + bytes(4))
    assert read_image(tmp_path / "big.tif").getpixel((2, 2)) == (99, 99, 99)

    tiff(tmp_path / "12.tif", values)
    packed = bytes.fromhex("637637") * 12  # 0x637 = 1591 of 4095, two values in three bytes
    data = bytearray((tmp_path / "12.tif").read_bytes())
    data[8 : 8 + len(packed)] = packed
    entry = data.index(struct.pack("<HHII", 258, 4, 1, 16))
    data[entry : entry + 12] = struct.pack("<HHII", 258, 4, 1, 12)
    (tmp_path / "12.tif").write_bytes(data)
    assert read_image(tmp_path / "12.tif").getpixel((2, 2)) == (99, 99, 99)
    assert read_image(tmp_path / "12.tif").info["largest"] == 1591 * 16  # not dark


def test_16_bits_plane_by_plane_are_refused():
    """Pillow reads the two bytes of a value as two pixels there."""
    image = Image.new("RGB", (4, 4))
    image.tag_v2 = {258: (16, 16, 16), 277: 3, 284: 2}
    with pytest.raises(ValueError, match="planes of 16 bits are read wrong"):
        folders.to_rgb(image)
    image.tag_v2 = {258: (8, 8, 8), 277: 3, 284: 2}
    assert folders.to_rgb(image).mode == "RGB"


def test_transparency_of_16_bits_is_laid_over_white(tmp_path):
    values = np.full((4, 6), 257 * 99, np.uint16)
    values[0, 0] = 1234
    Image.fromarray(values).save(tmp_path / "x.png", transparency=1234)
    read = read_image(tmp_path / "x.png")
    assert read.getpixel((0, 0)) == (255,) * 3 and read.getpixel((1, 1)) == (99,) * 3


def test_an_older_checkpoint_with_decomposed_names_knows_its_classes(tmp_path):
    """As macOS gave them to a version that did not compose them."""
    for part in ("train", "test"):
        classes_of(tmp_path / "photos" / part, "caf\u00e9", "dog")
    train_cnn.main(folder_flags(tmp_path / "photos", "--out-dir", tmp_path / "run"))
    state = load_checkpoint(tmp_path / "run" / "best.pt")
    state["classes"] = ["cafe\u0301", "dog"]
    checkpoint.save_checkpoint(tmp_path / "old.pt", state)
    models = load_models([str(tmp_path / "old.pt")], torch.device("cpu"))
    assert load_data_for(models, None, None).classes == ["caf\u00e9", "dog"]
    out = ["--out-dir", str(tmp_path / "out")]
    explain.main([str(tmp_path / "old.pt"), "--target", "cafe\u0301", "--count", "1", *out])


def test_checkpoints_that_a_figure_does_not_show_are_counted(
    trained, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(charts, "MAX_MATRICES", 1)
    evaluate.main([*map(str, trained.values()), "--out-dir", str(tmp_path)])
    out = capsys.readouterr().out
    assert "confusion_matrix.png shows the first 1 of 2 checkpoints" in out
    assert "curves show" not in out


def test_a_split_without_images_and_one_of_a_single_image(trained, tmp_path, fails):
    state = load_checkpoint(trained["cnn"])
    state["dataset"]["val_fraction"] = 0.0
    checkpoint.save_checkpoint(tmp_path / "all.pt", state)
    argv = [tmp_path / "all.pt", "--split", "val", "--out-dir", tmp_path / "out"]
    for script in (evaluate, faithfulness):
        assert "--split val: there are no such images" in fails(script.main, *argv)
    classes_of(tmp_path / "one" / "test", "3", count=1)
    argv = [trained["cnn"], "--dataset", "folder", "--data-dir", tmp_path / "one"]
    line = fails(faithfulness.main, *argv, "--out-dir", tmp_path / "out")
    assert "there is one image; two are needed" in line


def test_a_photograph_that_is_all_dark_is_named(trained, tmp_path, capsys):
    Image.fromarray((GREY * 40).astype(np.uint16)).save(tmp_path / "dark.png")
    argv = [trained["cnn"], "--images", tmp_path / "dark.png", "--out-dir", tmp_path / "out"]
    explain.main(list(map(str, argv)))
    warning = f"warning: {tmp_path / 'dark.png'} of 16 bits: the largest value is 3960"
    assert warning in capsys.readouterr().err


def test_only_the_first_page_of_a_tiff_is_used_and_that_is_said(tmp_path):
    pages = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    remarks = []
    assert read_image(tmp_path / "x.tif", remarks=remarks).getpixel((1, 1)) == (255, 0, 0)
    assert remarks == [f"{tmp_path / 'x.tif'}: only the first of its 2 pages is used"]


def test_remarks_are_bounded(tmp_path, capsys):
    pages = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(8):
            pages[0].save(tmp_path / name / f"{i}.tif", save_all=True, append_images=pages[1:])
    load_data("folder", tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[-1] == "warning: ... and 6 more"


def test_figures_of_attention_are_bounded(trained, monkeypatch):
    """Of very many, the last layers, the first heads and the first images."""
    assert explain.MAX_LAYERS == 24 and explain.MAX_HEADS == 16 and explain.MAX_ROWS == 8
    monkeypatch.setattr(explain, "MAX_LAYERS", 1)
    monkeypatch.setattr(explain, "MAX_HEADS", 1)
    monkeypatch.setattr(explain, "MAX_ROWS", 2)
    (model,) = load_models([str(trained["vit"])], torch.device("cpu"))  # two layers, two heads
    split = load_data("digits", ".").test.subset(torch.arange(3))
    pictures = [np.zeros((32, 32, 3), np.uint8)] * 3
    found = explain.draw_attention(model, pictures, ["a", "b", "c"], split, "any")
    titles = {name: [axes.get_title() for axes in figure.axes] for name, figure in found.items()}
    assert titles["digits-vit_attention-layers-any.png"] == ["a", "layer 2", "b", "", ""]
    assert titles["digits-vit_attention-heads-any.png"] == ["a", "head 1", "mean", ""]
    assert (
        "position embeddings, each against all" in titles["digits-vit_attention-statistics-any.png"]
    )


def test_a_moved_set_whose_test_images_may_have_been_trained_on(tmp_path, capsys):
    classes_of(tmp_path / "a", "cat", "dog")
    train_cnn.main(folder_flags(tmp_path / "a", "--out-dir", tmp_path / "run"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    models = load_models([str(tmp_path / "run" / "best.pt")], torch.device("cpu"))
    load_data_for(models, None, tmp_path / "b")
    assert "was trained on other images" not in capsys.readouterr().err
    solid(tmp_path / "b" / "cat" / "more.png")
    load_data_for(models, None, tmp_path / "b")
    assert "run was trained on other images" in capsys.readouterr().err
    for part in ("train", "test"):  # by hand, as a message advises
        shutil.copytree(tmp_path / "b", tmp_path / "c" / part)
    load_data_for(models, None, tmp_path / "c")
    assert "are in this test split" in capsys.readouterr().err


def test_validation_images_of_other_data_may_have_been_trained_on(tmp_path, capsys):
    for part in ("train", "test"):
        classes_of(tmp_path / "a" / part, "cat", "dog")
    train_cnn.main(folder_flags(tmp_path / "a", "--out-dir", tmp_path / "run"))
    models = load_models([str(tmp_path / "run" / "best.pt")], torch.device("cpu"))
    (caveat,) = load_data_for(models, None, None, "val").caveats
    assert "chose the epoch" in caveat
    assert load_data_for(models, None, None).caveats == []
    solid(tmp_path / "a" / "train" / "cat" / "more.png")
    with pytest.raises(UserError, match="val split has changed"):
        load_data_for(models, None, None, "val")
    other = shutil.copytree(tmp_path / "a", tmp_path / "b")
    (caveat,) = load_data_for(models, None, other, "val").caveats
    assert "are in this val split" in caveat
    classes_of(other / "val", "cat", "dog", count=1)  # not drawn: no image of train/
    models[0].checkpoint["dataset"]["drawn"] = []
    assert load_data_for(models, None, other, "val").caveats == []
    models[0].checkpoint["dataset"] |= {"name": "digits", "drawn": ["val"], "content": ""}
    capsys.readouterr()
    (caveat,) = load_data_for(models, "folder", other, "val").caveats
    assert "are in this val split" in caveat and caveat in capsys.readouterr().err


def test_weights_to_start_from_may_have_seen_the_test_images(tmp_path, capsys, interrupted):
    classes_of(tmp_path / "a", "cat", "dog")
    flags = folder_flags(tmp_path / "a")
    train_cnn.main([*flags, "--out-dir", str(tmp_path / "one")])
    begin = [*flags, "--init", str(tmp_path / "one" / "best.pt")]
    train_cnn.main([*begin, "--out-dir", str(tmp_path / "same")])
    assert "was trained on other images" not in capsys.readouterr().err
    solid(tmp_path / "a" / "cat" / "more.png")
    interrupted(train_cnn.main, *begin, "--epochs", 2, "--out-dir", tmp_path / "two")
    err = capsys.readouterr().err
    train_cnn.main(["--resume", "--out-dir", str(tmp_path / "two")])  # which must not forget it
    assert "best.pt was trained on other images" in err and "this test split" in err
    models = load_models([str(tmp_path / "two" / "best.pt")], torch.device("cpu"))
    data = load_data_for(models, None, None)
    (caveat,) = data.caveats
    assert "two was trained on other images" in caveat
    # Nor is its temperature fitted on validation images that the first weights may have seen.
    assert evaluate.own_validation(models[0], data, SimpleNamespace(split="test")) is None


def test_a_network_that_does_not_know_its_images_gets_a_caveat_on_a_drawn_split(tmp_path, capsys):
    """It was trained by hand, on a folder of one level; 20% of it are drawn as test images."""
    classes_of(tmp_path / "a", "cat", "dog")
    train_cnn.main(folder_flags(tmp_path / "a", "--out-dir", tmp_path / "run"))
    models = load_models([str(tmp_path / "run" / "best.pt")], torch.device("cpu"))
    assert load_data_for(models, None, None).caveats == []
    models[0].checkpoint["dataset"] = make_metadata(
        "cnn", {"classes": 2}, classes=["cat", "dog"], mean=[0.5] * 3, std=[0.5] * 3
    )["dataset"]
    (caveat,) = load_data_for(models, "folder", tmp_path / "a").caveats
    assert "run does not know its images" in caveat and "this test split" in caveat


def test_a_drawn_split_does_not_depend_on_the_order_of_the_classes(tmp_path):
    classes_of(tmp_path, "ant", "bee", "cat", count=50)
    splits = [load_data("folder", tmp_path, classes=order)
              for order in (None, ["cat", "ant", "bee"])]  # fmt: skip
    for name in ("train", "val", "test"):
        first, second = (getattr(data, name).indices for data in splits)
        assert torch.equal(first, second), name


def test_checkpoints_with_other_validation_images_share_their_test_images(tmp_path):
    classes_of(tmp_path / "a", "cat", "dog")
    for run, fraction in (("one", "0.2"), ("two", "0.4")):
        argv = folder_flags(tmp_path / "a", "--val-fraction", fraction)
        train_cnn.main([*argv, "--out-dir", str(tmp_path / run)])
    paths = [str(tmp_path / run / "best.pt") for run in ("one", "two")]
    assert len(load_data_for(load_models(paths, torch.device("cpu")), None, None).test) == 4


@pytest.mark.parametrize("trained_on", [("", ""), ("folder", "photos")])
def test_another_data_set_is_in_its_usual_folder(trained_on, trained, monkeypatch):
    """Not in that of the training. ("": `train` was called by hand.)"""
    (model,) = load_models([str(trained["cnn"])], torch.device("cpu"))
    model.checkpoint["dataset"] |= dict(zip(("name", "data_dir"), trained_on, strict=True))
    found = []
    monkeypatch.setattr(prepare, "load_data", lambda *args, **_: found.append(args) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_data_for([model], "cifar10", None)
    assert found == [("cifar10", Path("data"))]


def test_folders_of_a_disk_station_are_no_classes(tmp_path):
    classes_of(tmp_path, "cat", "dog")
    solid(tmp_path / "@eaDir" / "cat" / "thumb.jpg")
    solid(tmp_path / "cat" / "@eaDir" / "thumb.jpg")
    solid(tmp_path / "cat" / "@1.png")  # an image like others
    data = load_data("folder", tmp_path)
    assert data.classes == ["cat", "dog"] and sum(data.sizes) == 21


def test_every_image_once_where_there_are_fewer_than_asked(three, tmp_path, capsys):
    classes_of(tmp_path / "few" / "test", "cat", "dog", count=1)
    argv = [three, "--data-dir", tmp_path / "few", "--out-dir", tmp_path / "out"]
    explain.main(list(map(str, argv)))
    assert capsys.readouterr().out.count(".png  run: ") == 2


def test_any_decoded_folder_is_kept_free_of_results(three, trained, tmp_path, fails):
    """Also by networks that have seen other data; whatever the current folder is."""
    photos = shutil.copytree(three.parents[1] / "photos", tmp_path / "photos")
    load_data("folder", photos)
    for script, argv in (
        (explain, [trained["cnn"], "--images", photos / "test" / "cat" / "01.png"]),
        (evaluate, [trained["cnn"]]),
        (train_cnn, ["--dataset", "digits", *TINY_CNN]),
    ):
        inside = photos / "train" / "results"
        assert "is in the folder of images" in fails(script.main, *argv, "--out-dir", inside)
        assert not inside.exists()
    line = fails(checkpoint.main, trained["cnn"], photos / "train" / "cat" / "x.pt")
    assert "is in the folder of images" in line


def test_cifar10_may_be_kept_where_results_go(tmp_path, fails, monkeypatch):
    """The lock of the one must not wait for that of the other."""
    monkeypatch.setattr(data.CIFAR10, "url", "file:///nowhere")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"broken")
    line = fails(train_cnn.main, "--data-dir", tmp_path, "--out-dir", tmp_path, *TINY_CNN)
    assert "cannot get CIFAR-10" in line


@pytest.mark.parametrize("facts", ["", "{}", "[]", "3", '{"remarks": []}'])
def test_a_cache_without_its_facts_is_damaged(tmp_path, facts):
    classes_of(tmp_path, "cat", "dog")
    load_data("folder", tmp_path)
    next(tmp_path.glob(".cache*.json")).write_text(facts)
    with pytest.raises(UserError, match=r"\.bin: damaged; remove it"):
        load_data("folder", tmp_path)


def test_links_that_lead_nowhere_are_named(tmp_path):
    for part in ("train", "test"):
        classes_of(tmp_path / part, "a", "b")
    (tmp_path / "val").symlink_to(tmp_path / "nowhere")
    assert "skipped links to missing files: 1" in load_data("folder", tmp_path).note
    (tmp_path / "train" / "a" / "loop").symlink_to(tmp_path / "train" / "a" / "loop")
    assert "skipped links to missing files: 2" in load_data("folder", tmp_path).note
    shutil.rmtree(tmp_path / "test")
    (tmp_path / "test").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="it is a link to a missing folder"):
        load_data("folder", tmp_path)
