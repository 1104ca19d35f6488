"""Data sets as uint8 tensors, and their stratified splits.

    H, W image height and width   M images stored   N images of a split

Images stay uint8 `(M, 3, H, W)` until a batch needs them (see `batches.py`).
"""

import dataclasses
import ssl
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10

from cli import UserError, locked, quoted, writing
from folders import Listing, decoded_images, holds_images, list_images

TEST_FRACTION = 0.2  # of what comes without a test split
SPLIT_SEED = 0  # never --seed: runs with several seeds share their validation and test images
# In the official order.
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
# Over all pixels of the 50,000 training images. (The often copied .2023 .1994 .2010 is the mean of
# each image's own std, which is another quantity.)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclasses.dataclass
class Split:
    """Rows of a data set: `images` uint8 (M, 3, H, W), `labels` int64 (M,), `indices` int64 (N,).

    `images` and `labels` are shared by all splits; `indices` says which rows are this split's.
    `images` may be memory-mapped: only the rows in use are read. `files` has the paths of the
    images, if they are files.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    files: list[str] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def rows(self, which) -> tuple[torch.Tensor, torch.Tensor]:
        """The images and labels at positions `which` (a tensor or slice) of this split."""
        rows = self.indices[which]
        return self.images[rows], self.labels[rows]

    @classmethod
    def of(cls, images: torch.Tensor, labels: torch.Tensor) -> "Split":
        """All of the images uint8 (N, 3, H, W) and labels (N,)."""
        return cls(images, labels, torch.arange(len(images)))

    def subset(self, which: torch.Tensor) -> "Split":
        """The images at positions `which` of this split."""
        return dataclasses.replace(self, indices=self.indices[which])

    def to(self, device: torch.device) -> "Split":
        """The whole split on a GPU, if it takes less than a quarter of its free memory."""
        size = len(self) * self.images[0].numel()
        if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4:
            shape = len(self), *self.images.shape[1:]
            images = torch.empty(shape, dtype=torch.uint8, device=device)
            for part in torch.arange(len(self)).split(4096):  # may not fit into the CPU's memory
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
    content: str = ""  # a hash of a folder's files: their names and what is in them
    drawn: tuple[str, ...] = ()  # splits that were drawn from others: they change with the files
    caveats: list[str] = dataclasses.field(default_factory=list)  # on what is measured with it

    @property
    def sizes(self) -> list[int]:
        """Images of the training, validation and test split."""
        return [len(self.train), len(self.val), len(self.test)]


def load_data(
    name: str,
    data_dir: str | Path,
    *,
    image_size: int = 32,
    val_fraction: float = 0.1,
    classes: list[str] | None = None,
    batch_size: int = 0,
) -> Data:
    """Load `cifar10`, `digits` or `folder` and split it.

    Args:
        name: which data set.
        data_dir: where CIFAR-10 is kept (the download goes there), or the folder of images.
        image_size: side in pixels of a folder's images once decoded; the other data sets have 32.
        val_fraction: fraction of the training images for validation, stratified; 0: none. Not
            used where a folder has its own `val/`.
        classes: those of the checkpoints, where a folder is only evaluated. It may then have
            `test/` alone, and fewer classes. Mean and std are NaN without training images.
        batch_size: how many training images are needed at least.

    Raises UserError: the data are missing, cannot be read, or are too few to split.
    """
    data_dir, notes, content, files, drawn = Path(data_dir), [], "", None, ("val",)
    if name == "cifar10":
        images, labels, parts = _load_cifar10(data_dir)
        classes = CIFAR10_CLASSES
    elif name == "digits":
        images, labels, parts = _load_digits()
        classes = [str(digit) for digit in range(10)]
    elif name == "folder":
        _refuse_cifar10(data_dir)
        listing = list_images(data_dir, test_alone=classes is not None)
        classes = _folder_classes(data_dir, listing, classes)
        labels, parts = _folder_splits(data_dir, listing, classes)
        notes, files = listing.notes, [file.path for file in listing.files]
        drawn = tuple(part for part in ("val", "test") if part not in listing.parts)
    else:
        raise UserError(f"--dataset {name}: unknown; use cifar10, digits or folder")

    if "val" not in parts:
        parts["val"] = parts["train"][:0]
        if val_fraction and len(parts["train"]):
            advice = "choose another fraction, or 0"
            parts["train"], parts["val"] = stratified_split(
                labels, parts["train"], val_fraction, "--val-fraction", advice, classes
            )
    if batch_size > len(parts["train"]):
        raise UserError(
            f"--batch-size {batch_size} is more than the {len(parts['train'])} training images: "
            "use a smaller one"
        )
    if name == "folder":  # last, because it may take long
        images, content = decoded_images(data_dir, listing, image_size)
    splits = [Split(images, labels, parts[part], files) for part in ("train", "val", "test")]
    notes += _missing_classes(splits, classes)
    mean, std = (CIFAR10_MEAN, CIFAR10_STD) if name == "cifar10" else channel_statistics(splits[0])
    return Data(name, *splits, list(classes), mean, std, "; ".join(notes), content, drawn)


def _missing_classes(splits: list[Split], classes: list[str]) -> list[str]:
    """A note for each split that has images, but none of some class."""
    notes = []
    for split, word in zip(splits, ("training", "validation", "test"), strict=True):
        missing = set(range(len(classes))) - set(split.labels[split.indices].unique().tolist())
        if missing and len(split):
            notes.append(f"no {word} images of {quoted([classes[label] for label in missing])}")
    return notes


def stratified_split(labels, indices, fraction, what, advice, classes, *, every=False):
    """Split `indices` in two, stratified by label; the second part gets `fraction` of them.

    `every`: images of each class are needed in the second part.

    Raises UserError: too few images. The message begins with `what`, ends with `advice`, and names
    the smallest class.
    """
    from sklearn.model_selection import train_test_split  # takes seconds: not for --help

    _, ranks = np.unique(list(classes), return_inverse=True)  # whatever the order of the classes
    try:
        first, second = train_test_split(
            indices.numpy(),
            test_size=fraction,
            stratify=ranks[labels[indices].numpy()],
            random_state=SPLIT_SEED,
        )
        enough = not every or len(labels[second].unique()) == len(labels[indices].unique())
    except ValueError:
        enough = False
    if not enough:
        counts = {
            classes[label]: int((labels[indices] == label).sum()) for label in labels.unique()
        }
        name = min(counts, key=counts.get)
        raise UserError(
            f"{what} {fraction} of {len(indices)} images leaves a class without an image in one "
            f"part; of {len(counts)} classes the smallest is {name!r}, with {counts[name]}: add "
            f"images, or {advice}"
        )
    return torch.from_numpy(np.sort(first)), torch.from_numpy(np.sort(second))


def _folder_classes(root: Path, listing: Listing, classes: list[str] | None) -> list[str]:
    """`classes` or, if they are None, those of the training images.

    Raises UserError: one class, or a split with a class that is not known.
    """
    names = {
        part: {listing.files[row].class_name for row in rows}
        for part, rows in listing.parts.items()
    }
    known = classes or sorted(next(iter(names.values())))  # train/ comes first, or "all"
    if len(known) < 2:
        raise UserError(f"--data-dir {root}: there is one class, {known[0]!r}; two are needed")
    for part, found in names.items():
        other = min(found - set(known), default=None)
        if other is not None:
            advice = f"is in {part}/ but not in train/: add it there, or remove it"
            if classes:
                advice = (
                    f"is none of the checkpoint's {len(classes)}: choose its own data "
                    "(--dataset, --data-dir)"
                )
            raise UserError(f"--data-dir {root}: class {other!r} {advice}")
    return known


def _folder_splits(root: Path, listing: Listing, classes: list[str]) -> tuple[torch.Tensor, dict]:
    """Labels (M,) and the indices of each split; a folder of one level gets a test split."""
    class_to_idx = {name: index for index, name in enumerate(classes)}
    labels = torch.tensor([class_to_idx[file.class_name] for file in listing.files])
    if "all" not in listing.parts:
        parts = {part: torch.arange(r.start, r.stop) for part, r in listing.parts.items()}
        return labels, {"train": torch.arange(0)} | parts
    what, advice = f"--data-dir {root}: a test split of", "make folders train/ and test/"
    everything = torch.arange(len(labels))
    train, test = stratified_split(
        labels, everything, TEST_FRACTION, what, advice, classes, every=True
    )
    listing.notes.append(f"{TEST_FRACTION:.0%} of the images are the test split")
    return labels, {"train": train, "test": test}


def _refuse_cifar10(root: Path) -> None:
    """Raise UserError if a folder data set is CIFAR-10's own files."""
    archive = root if (root / "batches.meta").exists() else root / CIFAR10.base_folder
    if archive.is_dir() and not holds_images(root):
        advice = f"use --dataset cifar10 --data-dir {archive.parent}"
        raise UserError(f"--data-dir {root}: this is CIFAR-10 itself: {advice}")


def _load_cifar10(root: Path):
    if (root / "batches.meta").exists():
        raise UserError(f"--data-dir {root}: CIFAR-10 is in it: use --data-dir {root.parent}")
    archives = (root / CIFAR10.base_folder, root / CIFAR10.filename)
    if not any(map(Path.exists, archives)) and holds_images(root):
        raise UserError(
            f"--data-dir {root}: it has folders of images: use --dataset folder for them, or "
            "another --data-dir for CIFAR-10"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with locked(root / ".download.lock", wait=True):  # one download at a time
            parts = [CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a bad md5 a RuntimeError
        network = isinstance(error, ConnectionError | TimeoutError | ssl.SSLError)
        if getattr(error, "errno", None) and not network:  # a disk
            with writing(root):
                raise
        advice = f"put {CIFAR10.filename} there"
        if (root / CIFAR10.filename).exists():
            advice = f"its {CIFAR10.filename} is incomplete: put another one there"
        raise UserError(
            f"--data-dir {root}: cannot get CIFAR-10 ({error}): {advice}, or use --dataset folder "
            "with your own images, or try --dataset digits"
        ) from None
    images = torch.from_numpy(np.concatenate([part.data for part in parts]))  # (M, H, W, 3)
    labels = torch.tensor(parts[0].targets + parts[1].targets)
    train, test = torch.arange(len(labels)).split([len(part) for part in parts])
    return images.permute(0, 3, 1, 2).contiguous(), labels, {"train": train, "test": test}


def _load_digits():
    """1,797 handwritten digits of 8×8 pixels, enlarged to 3×32×32; 20% are the test split."""
    from sklearn.datasets import load_digits  # takes seconds: not for --help

    digits = load_digits()
    images = torch.from_numpy(digits.images).unsqueeze(1) * (255 / 16)  # (M, 1, 8, 8), 0..255
    images = torch.nn.functional.interpolate(images, size=32, mode="bilinear").round()
    images = images.to(torch.uint8).expand(-1, 3, -1, -1)
    labels = torch.from_numpy(digits.target).long()
    everything = torch.arange(len(labels))
    train, test = stratified_split(
        labels, everything, TEST_FRACTION, "the test split", "use another data set", "0123456789"
    )
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
    std = (squares / pixels - mean**2).clamp_min(1).sqrt()  # not 0 for images of one colour
    return tuple((mean / 255).tolist()), tuple((std / 255).tolist())
