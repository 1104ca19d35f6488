"""Data sets as uint8 tensors, and their stratified splits.

    H, W image height and width   M images stored   N images of a split

Images stay uint8 `(M, 3, H, W)` until a batch is drawn of them (see `batches.py`).
"""

import contextlib
import dataclasses
import hashlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from cli import UserError, some

TEST_FRACTION = 0.2  # of what comes without a test split
SPLIT_SEED = 0  # never --seed: runs with several seeds share their validation and test images
# In the official order.
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
# Over all pixels of the 50,000 training images. (The often copied std .2023 .1994 .2010 is the
# mean of the images' own stds, which is something else.)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclasses.dataclass
class Split:
    """Rows of a data set: `images` uint8 (M, 3, H, W), `labels` int64 (M,), `indices` int64 (N,).

    `images` is shared by all splits and may be memory-mapped: only rows that are asked for are
    read.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def rows(self, which) -> tuple[torch.Tensor, torch.Tensor]:
        """The images and labels at positions `which` (a tensor or slice) of this split."""
        rows = self.indices[which]
        return self.images[rows], self.labels[rows]

    def to(self, device: torch.device) -> "Split":
        """The split on a GPU whole if a quarter of its free memory holds it; else unchanged."""
        size = len(self) * self.images[0].numel()
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4:
            shape = len(self), *self.images.shape[1:]
            images = torch.empty(shape, dtype=torch.uint8, device=device)
            for part in torch.arange(len(self)).split(4096):  # never whole in the CPU's memory
                images[part[0] : part[-1] + 1] = self.rows(part)[0].to(device)
            labels = self.labels[self.indices].to(device)
            return Split(images, labels, torch.arange(len(self), device=device))
        return self


@dataclasses.dataclass
class Data:
    """A data set: its splits `train`, `val`, `test`, its class names, and its channel statistics.

    `mean` and `std` are those of the training pixels, in [0, 1].
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    note: str = ""  # what the reader should know, e.g. how many files were skipped
    files: str = ""  # a digest of a folder's files, by path and size


def load_data(
    name: str,
    data_dir: str | Path,
    *,
    image_size: int = 32,
    val_fraction: float = 0.1,
    test_alone: bool = False,
) -> Data:
    """Load `cifar10`, `digits` or `folder` and split it.

    Args:
        name: which data set.
        data_dir: where CIFAR-10 is kept (and put by the download), or the folder of images.
        image_size: side in pixels of a `folder`'s images once decoded; the others have 32.
        val_fraction: share of the training images that validation gets, stratified; 0: none. A
            folder with a `val/` of its own needs none.
        test_alone: a folder may have `test/` and no `train/`; mean and std are then NaN.

    Raises:
        UserError: the data are not there, cannot be read, or are too few to split.
    """
    data_dir, note, digest = Path(data_dir), "", ""
    if name == "cifar10":
        images, labels, parts = _load_cifar10(data_dir)
        classes = CIFAR10_CLASSES
    elif name == "digits":
        images, labels, parts = _load_digits()
        classes = [str(digit) for digit in range(10)]
    elif name == "folder":
        images, labels, parts, classes, note, digest = _load_folder(
            data_dir, image_size, test_alone
        )
    else:
        raise UserError(f"--dataset {name}: unknown; use cifar10, digits or folder")

    if "val" not in parts:
        parts["val"] = parts["train"][:0]
        if val_fraction and len(parts["train"]):
            parts["train"], parts["val"] = _split(
                labels,
                parts["train"],
                val_fraction,
                "--val-fraction",
                "take another fraction, or 0",
            )
    splits = [Split(images, labels, parts[part]) for part in ("train", "val", "test")]
    mean, std = (CIFAR10_MEAN, CIFAR10_STD) if name == "cifar10" else channel_statistics(splits[0])
    return Data(name, *splits, list(classes), mean, std, note, digest)


def _split(labels, indices, fraction, what, cure) -> tuple[torch.Tensor, torch.Tensor]:
    """Split `indices` in two, stratified by label; the second part gets `fraction` of them."""
    try:
        first, second = train_test_split(
            indices.numpy(),
            test_size=fraction,
            stratify=labels[indices].numpy(),
            random_state=SPLIT_SEED,
        )
    except ValueError:
        raise UserError(
            f"{what} {fraction} of {len(indices)} images leaves a class without an image "
            f"in one part: add images, or {cure}"
        ) from None
    return torch.from_numpy(np.sort(first)), torch.from_numpy(np.sort(second))


def _load_cifar10(root: Path):
    try:
        parts = [CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a bad md5 a RuntimeError
        archive = "cifar-10-python.tar.gz"
        cure = f"put {archive} there"
        if (root / archive).exists():
            cure = f"its {archive} is not whole: put another one there"
        raise UserError(
            f"--data-dir {root}: cannot get CIFAR-10 ({error}): {cure}, or use --dataset folder "
            "with images of your own, or try --dataset digits"
        ) from None
    images = torch.from_numpy(np.concatenate([part.data for part in parts]))  # (M, H, W, 3)
    labels = torch.tensor(parts[0].targets + parts[1].targets)
    train, test = torch.arange(len(labels)).split([len(part) for part in parts])
    return images.permute(0, 3, 1, 2).contiguous(), labels, {"train": train, "test": test}


def _load_digits():
    """1,797 handwritten digits of 8×8 pixels, enlarged to 3×32×32; 20% are the test split."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).unsqueeze(1) * (255 / 16)  # (M, 1, 8, 8), 0..255
    images = torch.nn.functional.interpolate(images, size=32, mode="bilinear").round()
    images = images.to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target)
    train, test = _split(labels, torch.arange(len(labels)), TEST_FRACTION, "the test split", "")
    return images, labels, {"train": train, "test": test}


def channel_statistics(split: Split) -> tuple[tuple, tuple]:
    """Mean and standard deviation per channel over all pixels of a split, in [0, 1]."""
    total, squares, pixels = torch.zeros(3).double(), torch.zeros(3).double(), 0
    for chunk in torch.arange(len(split)).split(256):  # bounded memory
        images = split.rows(chunk)[0].float()
        total += images.sum((0, 2, 3))
        squares += images.square().sum((0, 2, 3))
        pixels += images.numel() // 3
    mean = total / pixels
    std = (squares / pixels - mean**2).clamp_min(1).sqrt()  # one colour only: no division by 0
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())


# ---------------------------------------------------------------- a folder of images


def _load_folder(root: Path, size: int, test_alone: bool):
    """Decode `root/<part>/<class>/*`, or `root/<class>/*`, once, then memory-map the cache."""
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "there is no such folder"
        raise UserError(f"--data-dir {root}: {what}")
    folders = [folder.name for folder in _folders(root)]
    there = [part for part in ("train", "val", "test") if part in folders]
    nested = any(_folders(root / part) for part in there)
    if not {"train", "test"} & set(there) or (len(folders) > len(there) and not nested):
        there = []  # one level; a class may be called train
    elif not {"train", "test"} <= set(there) and not (test_alone and "test" in there):
        missing = "test" if "train" in there else "train"
        raise UserError(
            f"--data-dir {root}: there is no folder {missing}/<class>/ beside {there[0]}/: add it, "
            "or put the classes' folders directly there"
        )
    files, parts, skipped = [], {}, 0
    for part in there or [""]:
        found, others = _scan(root / part)
        if not found:
            raise UserError(
                f"--data-dir {root}: no images in {root / part}/<class>/, such as cat/1.jpg"
            )
        parts[part] = torch.arange(len(files), len(files) + len(found))
        files, skipped = files + found, skipped + others

    names = [Path(path).parent.name for path, _ in files]
    classes = sorted({names[row] for row in parts[there[0] if there else ""]})
    if len(classes) < 2:
        raise UserError(f"--data-dir {root}: there is one class, {classes[0]!r}; two are needed")
    notes = [f"skipped {skipped} that are not {' '.join(IMG_EXTENSIONS)}"] if skipped else []
    if there and len(folders) > len(there):
        notes.append(f"not used: {some(set(folders) - set(there))}")
    for part in there[1:]:
        strange = sorted({names[row] for row in parts[part]} - set(classes))
        if strange:
            raise UserError(
                f"--data-dir {root}: class {strange[0]!r} is in {part}/ but not in train/: add it "
                "there, or remove it"
            )
        missing = set(classes) - {names[row] for row in parts[part]}
        if missing and part == "test":
            notes.append(f"no test images of {some(missing)}")
    labels = torch.tensor([classes.index(name) for name in names])
    if not there:
        train, test = _split(
            labels, parts.pop(""), TEST_FRACTION, f"--data-dir {root}: a test split of",
            "make folders train/ and test/",
        )  # fmt: skip
        parts = {"train": train, "test": test}
        missing = set(range(len(classes))) - set(labels[test].tolist())
        if missing:
            raise UserError(
                f"--data-dir {root}: class {classes[min(missing)]!r} has too few images for a "
                f"test split of {TEST_FRACTION:.0%}: add some, or make folders train/ and test/"
            )
        notes.append(f"{TEST_FRACTION:.0%} of the images are the test split")
    lines = [f"{os.path.relpath(path, root)} {stamp.split()[0]}" for path, stamp in files]
    images = _cached_images(root, files, size)
    parts.setdefault("train", torch.arange(0))
    return images, labels, parts, classes, "; ".join(notes), _digest(lines)


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def _scan(folder: Path):
    """All images in `folder/<class>/`, as (path, stamp), by class and name; and the others' count.

    The stamp changes when the file does.
    """
    found, skipped = [], 0
    for directory in _folders(folder):
        if not directory.name.isprintable():
            raise UserError(f"{folder}: the folder {directory.name!r} cannot be printed; rename it")
        before = len(found)
        with os.scandir(directory) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                hidden = entry.name.startswith(".")  # such as the ._x.jpg of macOS
                if entry.name.lower().endswith(IMG_EXTENSIONS) and entry.is_file() and not hidden:
                    stat = entry.stat()
                    found.append((entry.path, f"{stat.st_size} {stat.st_mtime_ns}"))
                else:
                    skipped += 1
        if len(found) == before:
            raise UserError(
                f"{directory}: no images ({' '.join(IMG_EXTENSIONS)}): add some, or "
                "remove the folder"
            )
    return found, skipped


def _cached_images(root: Path, files: list[tuple[str, str]], size: int) -> torch.Tensor:
    """The decoded images, memory-mapped; the cache's name changes with the files."""
    digest = _digest([f"{os.path.relpath(path, root)} {stamp}" for path, stamp in files])
    cache = root / f".cache-{size}-{digest}.npy"
    if not cache.exists():
        partial = cache.with_suffix(f".{os.getpid()}.tmp")
        try:
            with partial.open("wb") as file:
                header = {"descr": "|u1", "fortran_order": False}
                header["shape"] = (len(files), 3, size, size)
                np.lib.format.write_array_header_1_0(file, header)
                for path, _ in tqdm(files, "decoding", unit=" images", disable=None):
                    pixels = np.asarray(read_image(path, size))  # (size, size, 3)
                    file.write(pixels.transpose(2, 0, 1).tobytes())
                file.flush()
                os.fsync(file.fileno())
            partial.replace(cache)
            for old in root.glob(f".cache-{size}-*.npy"):
                if old != cache:
                    old.unlink(missing_ok=True)
        except PermissionError as error:
            raise UserError(
                f"--data-dir {root}: cannot keep the decoded images there ({error.strerror}): make "
                "it writable, or use a copy"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    try:
        images = np.load(cache, mmap_mode="c")  # "c": our writes would stay private
    except (ValueError, EOFError):
        raise UserError(f"{cache}: damaged; remove it, and it is made again") from None
    return torch.from_numpy(images)


def read_image(path: str | Path, size: int | None = None) -> Image.Image:
    """Read an image file as RGB, upright; with `size`: shorter side to `size`, centre crop.

    An animation gives its first frame.

    Raises:
        UserError: the file is missing, or no image that Pillow can read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                ImageOps.exif_transpose(image, in_place=True)
                image = to_rgb(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give image files") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image; replace it, or leave it out") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: more than 178 megapixels; make it smaller") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise UserError(f"{path}: cannot be read ({error}); replace it, or leave it out") from None
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: 16 bits become 8, and white shines through the transparent.

    Raises:
        ValueError: its values are floating-point numbers, on a scale that nobody knows.
    """
    if image.mode == "F":
        raise ValueError("its values are floating-point numbers")
    if image.mode.startswith("I"):  # up to 65,535
        values = np.asarray(image).astype(np.float32) / 257
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")
