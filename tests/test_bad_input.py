"""What people give by mistake: one line that names it and says what to do, exit 2, nothing lost."""

import random

import numpy as np
import pytest
import torch
from conftest import TINY_CNN
from PIL import Image

import explain
import train_cnn
from checkpoint import load_model
from cli import UserError
from data import load_data
from folders import read_image
from prepare import TrainedModel

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))


def folder_of(root, *names, count=3):
    """Folders of `count` images each."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            NOISE.save(root / name / f"{i}.png")


def with_file(name, content):
    """A good folder but for one file."""

    def make(root):
        folder_of(root, "cat", "dog", count=10)
        if isinstance(content, bytes):
            (root / name).write_bytes(content)
        else:
            content.save(root / name)

    return make


def truncated(root):
    folder_of(root, "cat", "dog", count=10)
    path = root / "dog" / "7.png"
    path.write_bytes(path.read_bytes()[:2000])


def loop(root):
    root.symlink_to(root.name)


FOLDERS = {
    "a link to itself": (loop, "photos"),
    "nothing in it": (lambda root: root.mkdir(), "no images in"),
    "a file": (lambda root: root.write_text("photos"), "is a file, not a folder"),
    "train/ and test/ without classes": (
        lambda root: folder_of(root, "train", "test"),
        "no images in",
    ),
    "train/ only": (lambda root: folder_of(root, "train/a", "train/b"), "no folder test/<class>/"),
    "test/ only": (lambda root: folder_of(root, "test/a", "test/b"), "no folder train/<class>/"),
    "a class without images": (
        lambda root: (folder_of(root, "cat", "dog", count=10), (root / "emu").mkdir()),
        "emu: no images",
    ),
    "the same in train/": (
        lambda root: (
            folder_of(root, "train/a", "train/b", "test/a"),
            (root / "train/c").mkdir(),
        ),
        "train/c: no images",
    ),
    "one class": (lambda root: folder_of(root, "cat"), "one class, 'cat'; two are needed"),
    "one image of a class": (
        lambda root: (folder_of(root, "cat", count=20), folder_of(root, "dog", count=1)),
        "leaves a class without an image",
    ),
    "two images of a class": (
        lambda root: (folder_of(root, "cat", count=100), folder_of(root, "dog", count=2)),
        "the smallest is 'dog', with 2: add images",
    ),
    "a name that cannot be printed": (
        lambda root: folder_of(root, "cat", "d\x07g"),
        "cannot be printed; rename it",
    ),
    "a class that train/ lacks": (
        lambda root: folder_of(root, "train/a", "train/b", "test/a", "test/c"),
        "class 'c' is in test/ but not in train/",
    ),
    "the same in val/": (
        lambda root: folder_of(root, "train/a", "train/b", "test/a", "val/c"),
        "class 'c' is in val/ but not in train/",
    ),
    "a file that Pillow cannot name": (
        with_file("dog/x.png", b"DDS " + (124).to_bytes(4, "little") + bytes(120)),
        "dog/x.png: cannot be read",
    ),
    "an image of no bytes": (with_file("dog/x.jpg", b""), "dog/x.jpg: not an image"),
    "a text called image": (with_file("dog/x.jpg", b"a dog"), "dog/x.jpg: not an image"),
    "half an image": (truncated, "dog/7.png: cannot be read"),
    "an image of floats": (
        with_file("dog/x.tif", Image.new("F", (8, 8))),
        "floating-point numbers",
    ),
    "an image of 200 megapixels": (
        with_file("dog/x.png", Image.new("1", (20_000, 10_000))),
        "more than 178 megapixels",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(kind, tmp_path, fails):
    make, says = FOLDERS[kind]
    root = tmp_path / "photos"
    make(root)
    argv = ["--dataset", "folder", "--data-dir", root, "--out-dir", tmp_path / "run", *TINY_CNN]
    argv += ["--batch-size", 4]
    line = fails(train_cnn.main, *argv)
    assert says in line and str(root) in line
    assert not list(tmp_path.rglob(".cache*"))


def test_flags(tmp_path, trained, fails):
    """Empty names, a folder of images to write into, a training that cannot go on."""
    assert "--out-dir: is empty" in fails(train_cnn.main, "--dataset", "digits", "--out-dir", "")
    root = tmp_path / "photos"
    folder_of(root, "cat", "dog", count=10)
    argv = ["--dataset", "folder", "--data-dir", root, "--out-dir", root]
    assert "is in the folder of images" in fails(train_cnn.main, *argv, *TINY_CNN)
    (tmp_path / "best.pt").write_bytes(trained["cnn"].read_bytes())
    for flags in (["--resume"], []):
        line = fails(train_cnn.main, "--dataset", "digits", "--out-dir", tmp_path, *flags)
        assert "--overwrite" in line
    assert "no CHECKPOINT" in fails(explain.main, "--images", trained["cnn"])


def test_what_is_left_out_is_said(tmp_path):
    folder_of(tmp_path, "train/a", "train/b", "test/a", "fox", count=10)
    assert load_data("folder", tmp_path).note == "not used: 'fox'; no test images of 'b'"


def test_a_class_may_be_called_train(tmp_path):
    folder_of(tmp_path, "bus", "train", count=10)
    assert load_data("folder", tmp_path).classes == ["bus", "train"]


def test_a_damaged_cache_is_named(tmp_path):
    folder_of(tmp_path, "cat", "dog", count=10)
    load_data("folder", tmp_path)
    (cache,) = tmp_path.glob(".cache*.bin")
    for content in (b"", cache.read_bytes()[:-1]):
        cache.write_bytes(content)
        with pytest.raises(UserError, match=f"{cache}: damaged; remove it"):
            load_data("folder", tmp_path)


def test_images_that_are_odd_but_good(tmp_path):
    """One pixel; a picture in motion, of which the first is taken; 100 megapixels."""
    Image.new("RGB", (1, 1), "red").save(tmp_path / "1.png")
    frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "2.webp", save_all=True, append_images=frames[1:], lossless=True)
    Image.new("1", (10_000, 10_000), 1).save(tmp_path / "3.png")
    for name, color in (("1.png", (255, 0, 0)), ("2.webp", (255, 0, 0)), ("3.png", (255,) * 3)):
        read = read_image(tmp_path / name, 32)
        assert read.size == (32, 32) and read.getcolors() == [(1024, color)]


def test_nothing_is_wrong(trained, tmp_path, fails, monkeypatch):
    """A network that is always right has no wrong images to show."""

    def right(model, split, classes):
        return torch.eye(10)[split.labels[split.indices]]

    monkeypatch.setattr(TrainedModel, "logits", right)
    line = fails(explain.main, trained["cnn"], "--show", "wrong", "--out-dir", tmp_path)
    assert "--show wrong: there is no such image" in line


def test_corrupted_checkpoints(trained, tmp_path):
    """200 files, each damaged at random: refused in one line, or the very weights."""
    source, path = trained["cnn"].read_bytes(), tmp_path / "corrupted.pt"
    good = load_model(trained["cnn"])[0].state_dict()
    refused = 0
    for seed in range(200):
        draw = random.Random(seed)
        content, at = bytearray(source), draw.randrange(len(source))
        length = draw.randrange(1, 2000)
        match seed % 5:
            case 0:
                content[at] ^= 1 << draw.randrange(8)
            case 1:
                del content[at:]
            case 2:
                content[at : at + length] = bytes(length)
            case 3:
                content[at:at] = draw.randbytes(length)
            case 4:
                del content[at : at + length]
        path.write_bytes(content)
        try:
            weights = load_model(path)[0].state_dict()
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert all(torch.equal(weights[name], good[name]) for name in good), seed
    assert refused > 150
