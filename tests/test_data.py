import colorsys
import functools
import hashlib
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY_CNN
from PIL import Image
from torchvision.datasets import CIFAR10

import batches
import data
import folders
from batches import Batches, DistillationBatches, corrupt, shifted
from checkpoint import load_checkpoint
from cli import UserError
from data import Split, load_data


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", "unused")


def test_digits_have_the_real_pixels(digits):
    from sklearn.datasets import load_digits

    raw = load_digits().images
    images, _ = digits.test.rows(slice(None))
    assert images.dtype == torch.uint8 and images.shape == (360, 3, 32, 32)
    small = torch.nn.functional.avg_pool2d(images[:, :1].double(), 4)[:, 0] * 16 / 255
    nearest = [np.abs(raw - s.numpy()).mean((1, 2)).min() for s in small[:5]]
    assert max(nearest) < 1.6  # bilinear enlargement blurs by less than two of 16 grey levels
    assert digits.classes == list("0123456789")


def test_splits_are_disjoint_stratified_and_complete(digits):
    parts = [digits.train, digits.val, digits.test]
    indices = torch.cat([part.indices for part in parts])
    assert sorted(indices.tolist()) == list(range(1797))
    shares = [torch.bincount(p.labels[p.indices], minlength=10) / len(p) for p in parts]
    assert max((shares[0] - s).abs().max() for s in shares[1:]) < 0.01


def test_splits_do_not_depend_on_the_seed(digits):
    torch.manual_seed(99)
    np.random.seed(99)
    again = load_data("digits", "unused")
    for part in ("train", "val", "test"):
        assert torch.equal(getattr(digits, part).indices, getattr(again, part).indices)


def test_no_validation_split_when_asked():
    without = load_data("digits", "unused", val_fraction=0)
    assert len(without.val) == 0 and len(without.train) == 1437


def test_statistics_are_those_of_the_pixels(digits):
    pixels = digits.train.rows(slice(None))[0].double().numpy() / 255
    np.testing.assert_allclose(digits.mean, pixels.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(digits.std, pixels.std((0, 2, 3)), rtol=1e-6)


@pytest.fixture
def colours():
    """64 images, each pixel different from its neighbours."""
    images = torch.randint(256, (64, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    return Split(images.to(torch.uint8), torch.arange(64), torch.arange(64))


PLAIN = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


def test_plain_batches_equal_torchvisions_normalise(colours):
    from torchvision.transforms.functional import normalize

    images, labels = next(iter(Batches(colours, 48, **PLAIN)))
    expected = normalize(colours.images[:48].float() / 255, *PLAIN.values())
    torch.testing.assert_close(images, expected)
    assert labels.tolist() == list(range(48))
    assert [len(y) for _, y in Batches(colours, 48, **PLAIN)] == [48, 16]


def test_every_image_is_a_flipped_shifted_copy_each_its_own(colours):
    """Against numpy.pad(mode="reflect") and slicing, for all that flip and shift can do."""
    out = batches.flip_and_shift(
        colours.images, torch.Generator().manual_seed(0), flip=True, shift=2
    )
    seen = set()
    for image, moved in zip(colours.images.numpy(), out.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        found = [
            (dy, dx, flip)
            for dy in range(5)
            for dx in range(5)
            for flip in (False, True)
            if np.array_equal(
                moved, padded[:, dy : dy + 32, dx : dx + 32][:, :, :: -1 if flip else 1]
            )
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 25  # of 50 ways, 64 images
    assert {s[2] for s in seen} == {False, True}


def test_erasing_blanks_one_square_wherever(colours):
    images = (colours.images.float() + 1) / 255
    out = batches.erase_square(images, torch.Generator().manual_seed(0), 8)
    blank = (out == 0).all(1)
    assert (blank.sum((1, 2)) == 64).all()
    assert torch.equal(out[~blank[:, None].expand_as(out)], images[~blank[:, None].expand_as(out)])
    assert len({tuple(b.nonzero()[0].tolist()) for b in blank}) > 40


def epoch_of(batches, seed):
    torch.manual_seed(seed)
    pairs = []
    for x, y in batches:
        torch.rand(3)  # somebody else draws: dropout
        pairs.append((x, y))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def test_training_batches_depend_on_the_seed_alone(colours):
    all_on = {"flip": True, "shift": 4, "erase": 8, "trivial_augment": 1.0}
    drawn = Batches(colours, 16, **PLAIN, train=True, **all_on)
    (x1, y1), (x2, y2), (_, y3) = (epoch_of(drawn, s) for s in (1, 1, 2))
    assert torch.equal(x1, x2) and torch.equal(y1, y2)
    assert not torch.equal(y1, y3)
    assert sorted(y1.tolist()) == sorted(y3.tolist()) == list(range(64))
    torch.manual_seed(1)
    x4, _ = next(iter(drawn))  # nobody else draws: the same batch
    assert torch.equal(x4, x1[:16])


def test_each_augmentation_alone_reaches_the_batches(colours):
    from torchvision.transforms.functional import normalize

    plain, labels = epoch_of(Batches(colours, 16, **PLAIN, train=True), 1)
    expected = normalize(colours.images[labels].float() / 255, *PLAIN.values())
    torch.testing.assert_close(plain, expected)
    for on in ({"flip": True}, {"shift": 4}, {"erase": 8}, {"trivial_augment": 1.0}):
        x, y = epoch_of(Batches(colours, 16, **PLAIN, train=True, **on), 1)
        same = (x == plain).all(1)
        kept = same.flatten(1).all(1)
        assert torch.equal(y, labels) and kept.sum() < 48, on
        assert "flip" not in on or torch.equal(x[~kept], plain[~kept].flip(3))
        assert "erase" not in on or (same.sum((1, 2)) == 32**2 - 8**2).all()


def test_automatic_augmentation_gives_uint8_and_a_draw_to_each_group():
    images = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8).expand(64, -1, -1, -1)
    torch.manual_seed(0)
    out = batches.trivial_augment(images, fraction=1, groups=16)
    assert out.dtype == torch.uint8 and out.shape == images.shape
    groups = out.view(16, 4, -1)
    assert (groups == groups[:, :1]).all()  # the same for the four of a group
    assert len({tuple(group[0].tolist()) for group in groups}) > 8
    half = batches.trivial_augment(images, fraction=0.5, groups=64)
    unchanged = (half == images).flatten(1).all(1)
    assert 20 <= unchanged.sum() <= 54  # of 64; some operations are of strength 0


def test_labels_of_mixed_images_are_the_shares_of_what_is_in_them():
    """Images of one value each: the mean of what comes out is that of its labels."""
    values = torch.tensor([10, 50, 90, 250], dtype=torch.uint8)
    labels = torch.arange(64) % 4
    images = values[labels][:, None, None, None].expand(-1, 3, 32, 32)
    split = Split(images, labels, torch.arange(64))
    mixed = Batches(split, 4, mean=(0, 0, 0), std=(1, 1, 1), train=True, mix=0.5, classes=4)
    kinds = set()
    torch.manual_seed(0)
    for x, y in mixed:
        if y.ndim == 1:
            kinds.add("neither")
            y = torch.nn.functional.one_hot(y, 4).float()
        else:
            pasted = any(len(image.unique()) > 1 for image in x)
            kinds.add("CutMix" if pasted else "MixUp")
        torch.testing.assert_close(y.sum(1), torch.ones(4))
        torch.testing.assert_close(x.mean((1, 2, 3)), y @ (values / 255), atol=1e-4, rtol=1e-4)
    assert kinds == {"neither", "MixUp", "CutMix"}


def test_taught_labels_give_the_mean_of_two_losses():
    """The loss of DeiT's eq. 2 at temperature 1, written out."""
    from torch.nn.functional import cross_entropy, kl_div

    images, labels, student = torch.randn(8, 3, 2, 2), torch.arange(8) % 5, torch.randn(8, 5)
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    taught = DistillationBatches([(images, labels)], teacher)
    assert len(taught) == 1
    for x, y in taught:
        assert x is images and not y.requires_grad
        # cross-entropy is divergence plus the teacher's entropy, which trains nothing
        p = teacher(images).softmax(1)
        divergence = kl_div(student.log_softmax(1), p, reduction="batchmean")
        of_teacher = divergence - (p * p.log()).sum(1).mean()
        expected = (cross_entropy(student, labels) + of_teacher) / 2
        torch.testing.assert_close(cross_entropy(student, y), expected)


def test_validation_is_left_alone_by_augmentation(colours):
    all_on = {"flip": True, "shift": 4, "erase": 8, "trivial_augment": 1.0, "mix": 1.0}
    drawn = Batches(colours, 64, **PLAIN, train=False, **all_on)
    plain, _ = next(iter(Batches(colours, 64, **PLAIN)))
    for seed in (1, 2):
        x, y = epoch_of(drawn, seed)
        assert torch.equal(x, plain) and y.tolist() == list(range(64))


def test_incomplete_training_batch_is_left_out(colours):
    assert [len(y) for _, y in Batches(colours, 60, **PLAIN, train=True)] == [60]


# ---------------------------------------------------------------- CIFAR-10


def make_archive(folder, monkeypatch):
    """A cifar-10-python.tar.gz in the official format, with 20 + 10 images; checksums patched."""
    rng, root = np.random.default_rng(0), folder / "made" / CIFAR10.base_folder
    root.mkdir(parents=True)
    rows = {}

    def put(name, content):
        (root / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((root / name).read_bytes()).hexdigest()]

    def batch(name, n):
        pixels = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        labels = [i % 10 for i in range(n)]
        rows[name] = pixels
        return put(name, {"data": pixels, "labels": labels})

    train = [batch(f"data_batch_{i}", 20) for i in range(1, 6)]
    test = [batch("test_batch", 10)]
    meta = put("batches.meta", {"label_names": list(data.CIFAR10_CLASSES)})
    archive = folder / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "filename": meta[0], "md5": meta[1]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return rows


def test_official_cifar10_archive_is_read(tmp_path, monkeypatch):
    rows = make_archive(tmp_path, monkeypatch)
    cifar = load_data("cifar10", tmp_path)
    assert [len(s) for s in (cifar.train, cifar.val, cifar.test)] == [90, 10, 10]
    assert cifar.classes[3] == "cat" and cifar.mean == (0.4914, 0.4822, 0.4465)
    images, labels = cifar.test.rows(slice(None))
    expected = rows["test_batch"].reshape(-1, 3, 32, 32)  # red, green, blue planes, row by row
    assert np.array_equal(images.numpy(), expected) and labels.tolist() == list(range(10))
    assert np.array_equal(
        cifar.train.images[20:40].numpy(), rows["data_batch_2"].reshape(-1, 3, 32, 32)
    )


def test_cifar10_is_read_from_a_read_only_folder(tmp_path, monkeypatch):
    make_archive(tmp_path, monkeypatch)
    first, real = load_data("cifar10", tmp_path), os.open

    def read_only(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", read_only)
    again = load_data("cifar10", tmp_path)
    assert torch.equal(first.train.images, again.train.images)


def test_a_broken_connection_is_no_fault_of_the_disk(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(data, "CIFAR10", broken)
    broken.base_folder, broken.filename = CIFAR10.base_folder, CIFAR10.filename
    with pytest.raises(UserError, match="cannot get CIFAR-10"):
        load_data("cifar10", tmp_path)


# ---------------------------------------------------------------- folders


def test_folder_is_decoded_cropped_and_counted(photos):
    folder = load_data("folder", photos)
    assert folder.classes == ["bright", "dark"]
    assert [len(s) for s in (folder.train, folder.val, folder.test)] == [21, 3, 8]
    kinds = ".jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp"
    assert folder.note == f"skipped files that are not {kinds}: 1"
    with Image.open(photos / "test" / "dark" / "02.png") as image:  # 48 × 40
        expected = image.resize((32, 32), Image.Resampling.BICUBIC, box=(4, 0, 44, 40))
    images, labels = folder.test.rows(slice(None))
    assert np.array_equal(images[6].permute(1, 2, 0).numpy(), np.asarray(expected))
    assert labels.tolist() == [0] * 4 + [1] * 4


def test_cache_is_used_and_a_changed_folder_invalidates_it(photos, tmp_path, monkeypatch):
    photos = shutil.copytree(photos, tmp_path / "photos", copy_function=shutil.copy)
    before = load_data("folder", photos)
    assert len(list(photos.glob(".cache-32-*.bin"))) == 1
    calls = []
    real = folders.read_image
    monkeypatch.setattr(folders, "read_image", lambda *a: calls.append(a) or real(*a))
    again = load_data("folder", photos)
    assert not calls and torch.equal(before.train.images, again.train.images)
    Image.new("RGB", (32, 32), "red").save(photos / "test" / "dark" / "00.png")
    changed = load_data("folder", photos)
    assert len(calls) == 32 and len(list(photos.glob(".cache-32-*.bin"))) == 1
    assert changed.test.rows([4])[0].flatten(2)[0, :, 0].tolist() == [255, 0, 0]


def save_solid(path, color=(200, 30, 90), size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def test_folder_of_one_level_gets_a_stratified_test_split(tmp_path):
    for name, count in (("große Katze", 20), ("собака", 10)):
        for i in range(count):
            save_solid(tmp_path / name / f"{i:02}.png", (i, 0, 0))
    (tmp_path / ".git" / "x").mkdir(parents=True)
    one = load_data("folder", tmp_path)
    again = load_data("folder", tmp_path, val_fraction=0)
    assert one.classes == ["große Katze", "собака"]
    assert [len(s) for s in (one.train, one.val, one.test)] == [21, 3, 6]
    assert one.test.rows(slice(None))[1].tolist() == [0] * 4 + [1] * 2
    assert torch.equal(one.test.indices, again.test.indices)
    assert "20% of the images are the test split" in one.note


def test_folder_with_validation_images_of_its_own(tmp_path):
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        for name in ("a", "b"):
            for i in range(count):
                save_solid(tmp_path / part / name / f"{i}.png", (count, 0, 0))
    folder = load_data("folder", tmp_path, val_fraction=0.5)
    for split, count in ((folder.train, 4), (folder.val, 2), (folder.test, 3)):
        images, labels = split.rows(slice(None))
        assert images[:, 0].unique().tolist() == [count]
        assert labels.tolist() == [0] * count + [1] * count


def solid(mode, value):
    return Image.new(mode, (6, 4), value)


def sideways():
    """Upright 4 × 6 with a red top half, stored on its side, as a telephone does."""
    image = Image.new("RGB", (6, 4), "blue")
    image.paste("red", (0, 0, 3, 4))
    return image


palette = solid("P", 1)
palette.putpalette([0, 0, 0, 10, 20, 30])


@pytest.mark.parametrize(
    ("image", "suffix", "options", "color"),
    [
        (solid("L", 77), "png", {}, (77, 77, 77)),
        (solid("1", 1), "png", {}, (255, 255, 255)),
        (solid("LA", (10, 0)), "png", {}, (255, 255, 255)),  # transparent: the paper is white
        (solid("RGBA", (0, 0, 0, 51)), "png", {}, (204, 204, 204)),
        (palette, "png", {}, (10, 20, 30)),
        (palette, "png", {"transparency": 1}, (255, 255, 255)),
        (solid("I;16", 257 * 99), "png", {}, (99, 99, 99)),
        (solid("I;16", 257 * 99), "tif", {}, (99, 99, 99)),
        (solid("CMYK", (0, 255, 255, 0)), "tif", {}, (255, 0, 0)),
        (solid("RGB", (1, 2, 3)), "webp", {"lossless": True}, (1, 2, 3)),
        (solid("RGB", (9, 9, 9)), "png", {"save_all": True, "append_images": [solid("RGB", 0)]},
         (9, 9, 9)),
    ],
)  # fmt: skip
def test_images_of_every_mode(tmp_path, image, suffix, options, color):
    path = tmp_path / f"image.{suffix}"
    image.save(path, **options)
    read = folders.read_image(path)
    assert read.mode == "RGB" and read.size == (6, 4)
    assert read.getpixel((2, 2)) == color


def test_a_photograph_taken_sideways_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned clockwise
    sideways().save(tmp_path / "a.png", exif=exif)
    read = folders.read_image(tmp_path / "a.png")
    assert read.size == (4, 6)
    assert read.getpixel((1, 1)) == (255, 0, 0) and read.getpixel((1, 5)) == (0, 0, 255)


def train_on_files(folder, images: int, size: int) -> tuple[float, float]:
    """Train on so many files of one pixel; the peak of anonymous memory in GiB, images/s."""
    for part, n in (("train", images - 200), ("test", 200)):
        for name, color in (("bright", "white"), ("dark", "black")):
            save_solid(folder / "photos" / part / name / "0.png", color, (1, 1))
            content = (folder / "photos" / part / name / "0.png").read_bytes()
            for i in range(1, n // 2):
                (folder / "photos" / part / name / f"{i}.png").write_bytes(content)
    command = [sys.executable, str(ROOT / "train_cnn.py"), "--dataset", "folder", *TINY_CNN]
    command += ["--data-dir", str(folder / "photos"), "--out-dir", str(folder / "run")]
    command += ["--image-size", str(size), "--epochs", "1", "--limit-batches", "100"]
    command += ["--device", "cpu", "--pictures", "off"]
    process, peak = subprocess.Popen(command), 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        anonymous = re.search(r"RssAnon:\s+(\d+) kB", status)
        peak = max(peak, int(anonymous[1]) / 2**20 if anonymous else 0)
        time.sleep(0.1)
    (cache,) = (folder / "photos").glob(f".cache-{size}-*.bin")
    assert process.returncode == 0 and cache.stat().st_size == images * 3 * size**2
    (row,) = load_checkpoint(folder / "run" / "last.pt")["history"]
    shutil.rmtree(folder / "photos")
    print(f"{images} images: {peak:.2f} GiB of anonymous memory, {row['images_per_second']:.0f}/s")
    return peak, row["images_per_second"]


@pytest.mark.slow
def test_a_folder_larger_than_memory(tmp_path):
    """A cache of 2.5 GiB, from files of one pixel, trains in less than 1.5 GiB of memory."""
    peak, _ = train_on_files(tmp_path, 2 * (int(1.25 * 2**30 / (3 * 128 * 128)) + 1), 128)
    assert 0.1 < peak < 1.5


@pytest.mark.slow
def test_ten_times_as_many_images_need_no_more_memory_and_time(tmp_path):
    """200,000 images of 64 pixels (2.3 GiB) beside 20,000."""
    few, many = (train_on_files(tmp_path / str(n), n, 64) for n in (20_000, 200_000))
    assert many[0] < 1.1 * few[0] and many[1] > 0.9 * few[1]


# ---------------------------------------------------------------- corruption


def corrupted(kind, severity):
    """64 smooth random images, float (B, 3, 32, 32) in 0 ... 255, and as `corrupt` changes them."""
    small = torch.randint(256, (64, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(small.float(), 32, mode="bilinear").round().byte()
    return images, corrupt(images, kind, severity).float()


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_pixelation_and_jpeg_are_those_of_pillow(severity):
    images, changed = corrupted("pixelation", severity)
    size = int(32 * (0.95, 0.9, 0.85, 0.75, 0.65)[severity - 1])
    for image, ours in zip(images[:8], changed, strict=False):
        theirs = Image.fromarray(image.permute(1, 2, 0).numpy())
        for side in (size, 32):
            theirs = theirs.resize((side, side), Image.Resampling.BOX)
        theirs = np.asarray(theirs, dtype=float)
        assert abs(ours.permute(1, 2, 0).numpy() - theirs).max() <= 1.5  # it rounds twice
    images, changed = corrupted("JPEG", severity)
    quality = (80, 65, 58, 50, 40)[severity - 1]
    for image, ours in zip(images[:8], changed, strict=False):
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        theirs = np.asarray(Image.open(file), dtype=float)
        assert abs(ours.permute(1, 2, 0).numpy() - theirs).max() <= 0.5


@pytest.mark.parametrize("severity", [1, 5])
def test_brightness_contrast_blur_and_noise_are_those_of_the_formulas(severity):
    """In float64, image by image, by colorsys, NumPy and scipy."""
    for kind, numbers in (("brightness", (0.05, 0.3)), ("contrast", (0.75, 0.15)),
                          ("blur", (0.4, 1.0)), ("noise", (0.04, 0.1))):  # fmt: skip
        images, changed = corrupted(kind, severity)
        x, c = images.double().numpy() / 255, numbers[severity > 1]
        if kind == "brightness":
            image = x[0].transpose(1, 2, 0).reshape(-1, 3)
            hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in image]
            rgb = np.array([colorsys.hsv_to_rgb(h, s, min(1, v + c)) for h, s, v in hsv])
            theirs, ours = rgb.T.reshape(3, 32, 32), changed[0].numpy()
        elif kind == "contrast":
            theirs = (x - x.mean((2, 3), keepdims=True)) * c + x.mean((2, 3), keepdims=True)
            ours = changed.numpy()
        elif kind == "blur":
            blur = functools.partial(
                scipy.ndimage.gaussian_filter1d, sigma=c, mode="mirror", radius=4
            )
            theirs = blur(blur(x, axis=2), axis=3)
            ours = changed.numpy()
        else:
            error = (changed.numpy() / 255 - x)[(x > 0.4) & (x < 0.6)]  # where nothing is clipped
            assert error.std() == pytest.approx(c, rel=0.05) and abs(error.mean()) < c / 20
            continue
        assert abs(ours - 255 * theirs.clip(0, 1)).max() <= 0.51, kind


def test_corruption_is_the_same_each_time_and_changes_no_random_state():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    first, second = (corrupted("noise", 2)[1] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.rand(3), expected)


def test_shifts_move_by_that_many_pixels():
    images = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    images[:, :, 4, 4] = 9
    moves = ((-2, 0), (2, 0), (0, -2), (0, 2))
    places = [shifted(images, *move)[0, 0].nonzero().tolist() for move in moves]
    assert places == [[[4, 2]], [[4, 6]], [[2, 4]], [[6, 4]]]
    assert torch.equal(shifted(images, 0, 0), images)


def test_balanced_batches_have_all_classes_equally_often():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    images = labels.byte().view(-1, 1, 1, 1).expand(-1, 3, 4, 4).contiguous()
    settings = {"mean": (0, 0, 0), "std": (1, 1, 1), "train": True}
    batches = Batches(Split.of(images, labels), 100, **settings, balance=True)
    torch.manual_seed(0)
    seen = torch.cat([y for _, y in batches])
    counts = torch.bincount(seen) / len(seen)
    assert len(seen) == 1000 and (counts - 1 / 3).abs().max() < 0.05  # 3 standard deviations
    torch.manual_seed(0)
    assert torch.equal(torch.cat([y for _, y in batches]), seen)
    plain = torch.cat([y for _, y in Batches(Split.of(images, labels), 100, **settings)])
    assert torch.bincount(plain).tolist() == [900, 90, 10]
