"""Batches on the device: normalisation, augmentation, distillation, predictions, corruption.

    B batch   H, W image height and width   C classes   N images

Each image is flipped, shifted and erased by its own random amount. TrivialAugment and mixing are
torchvision's, with one draw for a group of images or for a batch.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2
from tqdm import tqdm

from data import Split


def mixed_seed(*numbers: int) -> int:
    """One 64-bit number for several, such as (seed, epoch). (1, 0) gives what (1,) gives."""
    # seed + epoch would not do: epoch 2 of seed 0 would be epoch 1 of seed 1.
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class Batches:
    """An iterable of `(images, labels)`, one epoch each time it is iterated, like a DataLoader.

    Images are normalised, float32 (B, 3, H, W). Labels are int64 (B,). Both are on `device`.

    With `train=False` all images come in their order, unchanged. With `train=True` the order is
    shuffled, or with `balance` drawn with replacement; an incomplete last batch is dropped. Images
    are augmented: flip and shift, then TrivialAugment, then an erased square. A fraction
    `mix` of the batches is mixed, and their labels are float32 (B, C), class probabilities.

    The loop seeds PyTorch's generator with (seed, epoch). One number drawn from it at the start of
    an epoch decides the rest, so a batch depends on (seed, epoch, step) alone.

    Args:
        split: the images and labels.
        batch_size: images per batch.
        mean: three numbers, for images in [0, 1].
        std: three numbers; images are normalised as (image - mean) / std.
        device: where batches are made.
        train: shuffle and augment.
        flip: mirror half of the images.
        shift: largest move of an image, in pixels.
        erase: side of the erased square, in pixels; 0: none.
        trivial_augment: fraction of the images that TrivialAugment changes.
        mix: fraction of the batches that `cutmix_or_mixup` mixes.
        balance: draw images so that all classes are equally likely, however few images they have.
        classes: number of classes C; needed for `mix` alone.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        mean,
        std,
        device: torch.device | str = "cpu",
        train: bool = False,
        flip: bool = False,
        shift: int = 0,
        erase: int = 0,
        trivial_augment: float = 0.0,
        mix: float = 0.0,
        balance: bool = False,
        classes: int | None = None,
    ):
        self.device = torch.device(device)
        self.split, self.batch_size, self.train = split.to(self.device), batch_size, train
        self.flip, self.shift, self.erase = flip, shift, erase
        self.trivial_augment, self.mix = trivial_augment, mix
        self.balance, self.classes = balance, classes
        self.mean, self.std = (
            255 * torch.tensor(x, device=self.device).view(3, 1, 1) for x in (mean, std)
        )

    def __len__(self) -> int:
        full, rest = divmod(len(self.split), self.batch_size)
        return full if self.train else full + (rest > 0)

    def __iter__(self):
        if not self.train:
            for part in torch.arange(len(self.split)).split(self.batch_size):
                images, labels = self._on_device(part)
                yield self.normalise(images), labels
            return
        seed = torch.randint(2**62, ()).item()
        generator = torch.Generator().manual_seed(seed)
        if self.balance:
            labels = self.split.labels[self.split.indices].cpu()
            weights = 1 / torch.bincount(labels)[labels]  # so each class has a sum of 1
            order = torch.multinomial(weights, len(labels), replacement=True, generator=generator)
        else:
            order = torch.randperm(len(self.split), generator=generator)
        # Once: a copy at each step would make a GPU wait.
        order = order.to(self.split.indices.device)
        for step in range(len(self)):
            # Other seeds than that of the order: one for our draws, one for torchvision's below.
            generator = torch.Generator(self.device).manual_seed(seed + 1 + step)
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            images, labels = self._on_device(rows)
            images = flip_and_shift(images, generator, flip=self.flip, shift=self.shift)
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                torch.default_generator.manual_seed(seed + 1 + len(self) + step)
                if self.trivial_augment:
                    images = trivial_augment(images, self.trivial_augment)
                images = erase_square(self.normalise(images), generator, self.erase)
                if torch.rand(()) < self.mix:
                    images, labels = cutmix_or_mixup(images, labels, self.classes)
            yield images, labels

    def _on_device(self, rows: torch.Tensor):
        images, labels = self.split.rows(rows.to(self.split.indices.device))
        return images.to(self.device), labels.to(self.device)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Images uint8 (B, 3, H, W) -> float32, (images / 255 - mean) / std."""
        return (images.float() - self.mean) / self.std


class DistillationBatches:
    """Training batches whose labels are half the true class and half a teacher's probabilities.

    The loss is then the mean of the two cross-entropies: distillation without a separate token
    (Touvron et al. 2021, arXiv 2012.12877, eq. 2 at temperature 1). Label
    smoothing, if on, applies to both.

    Args:
        batches: an iterable of `(images, labels)` with a length.
        teacher: a model in eval mode, on the images' device, for the same normalisation.
    """

    def __init__(self, batches, teacher):
        self.batches, self.teacher = batches, teacher

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for images, labels in self.batches:
            with torch.no_grad():
                probabilities = self.teacher(images).softmax(1)  # (B, C)
            if labels.ndim == 1:
                labels = F.one_hot(labels, probabilities.shape[1])
            yield images, (labels + probabilities) / 2


def batch_size_without_training(image_size: int, *, explain: bool = False) -> int:
    """How many images go through a network at once when nothing is trained.

    500 images of 32×32, or as many pixels of other sizes. `explain`: 31, and at least 8.
    """
    size = max(1, int(500 * (32 / image_size) ** 2))
    return max(8, size // 16) if explain else size


@torch.inference_mode()
def predict(model, batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float32 (N, C) and labels (N,) on the CPU, without test-time augmentation."""
    logits, labels = [], []
    for x, y in tqdm(batches, "predicting", leave=False, disable=None):
        logits.append(model(x).float().cpu())
        labels.append(y.cpu())
    return torch.cat(logits), torch.cat(labels)


# ---------------------------------------------------------------- augmentation


def flip_and_shift(
    images: torch.Tensor, generator: torch.Generator, *, flip: bool, shift: int
) -> torch.Tensor:
    """Mirror each image with probability 1/2 and move it by up to `shift` pixels each way.

    One gather for the whole batch: pixel (y, x) of the result is pixel (rows[y], columns[x]) of
    the image. Pixels from outside are reflected at the border.
    images (B, 3, H, W) -> (B, 3, H, W), laid out in memory as channels-last.
    """
    B, _, H, W = images.shape

    def source(size):  # (B, size): where each row or column comes from
        moves = torch.randint(
            -shift, shift + 1, (B, 1), generator=generator, device=generator.device
        )
        index = torch.arange(size, device=images.device) + moves
        return size - 1 - (size - 1 - index.abs()).abs()  # reflect at 0 and at size - 1

    rows, columns = source(H), source(W)
    if flip:
        mirrored = torch.rand(B, 1, generator=generator, device=generator.device) < 0.5
        columns = torch.where(mirrored, W - 1 - columns, columns)
    image = torch.arange(B, device=images.device)[:, None, None]
    channels_last = images[image, :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return channels_last.permute(0, 3, 1, 2)


def erase_square(images: torch.Tensor, generator: torch.Generator, size: int) -> torch.Tensor:
    """Set a random square of side `size` to 0, the mean colour, in each normalised image.

    Cutout (DeVries and Taylor 2017, arXiv 1708.04552), but inside the image.
    """
    if not size:
        return images
    B, _, H, W = images.shape

    def inside(length):  # (B, length): whether a row or column is in the square
        start = torch.randint(
            length - size + 1, (B, 1), generator=generator, device=generator.device
        )
        index = torch.arange(length, device=images.device)
        return (start <= index) & (index < start + size)

    square = inside(H)[:, None, :, None] & inside(W)[:, None, None, :]  # (B, 1, H, W)
    return images.masked_fill(square, 0.0)


def trivial_augment(images: torch.Tensor, fraction: float, groups: int = 16) -> torch.Tensor:
    """One random operation of random strength for each of `groups` parts of the batch, or none.

    TrivialAugmentWide (Müller and Hutter 2021, arXiv 2103.10158): shear, translate, rotate,
    brightness, colour, contrast, sharpness, posterise, solarise, autocontrast, equalise.
    `fraction`: the probability that a part is changed. uint8 (B, 3, H, W) -> the same.
    """
    augment = v2.RandomApply([v2.TrivialAugmentWide()], p=fraction)
    parts = images.split(-(-len(images) // groups))  # rounded up
    return torch.cat([augment(part) for part in parts])


def cutmix_or_mixup(images: torch.Tensor, labels: torch.Tensor, classes: int):
    """Mix every image with its neighbour in the batch, by CutMix or MixUp with equal probability.

    CutMix (Yun et al. 2019, arXiv 1905.04899) pastes a rectangle. MixUp (Zhang et al. 2018,
    arXiv 1710.09412) blends. The weight is drawn uniformly from 0 to 1.
    images (B, 3, H, W) -> the same; labels (B,) -> (B, C), class probabilities.
    """
    mixer = v2.CutMix if torch.rand(()) < 0.5 else v2.MixUp
    return mixer(num_classes=classes)(images, labels)


# ---------------------------------------------------------------- corruption


def pixelate(x: torch.Tensor, size: float) -> torch.Tensor:
    """Replace each pixel by the mean of its cell; `size`: cells per pixel, along a side."""
    S = x.shape[-1]
    cell = ((torch.arange(S, device=x.device) + 0.5) * int(S * size) / S).long()
    same = (cell[:, None] == cell).float()
    mean = same / same.sum(1, keepdim=True)  # (S, S): of the pixels in the same row of cells
    return mean @ x @ mean.T


def brighten(x: torch.Tensor, amount: float) -> torch.Tensor:
    """Add to the value of hue, saturation and value, which is the largest channel."""
    value = x.amax(1, keepdim=True)
    brighter = (value + amount).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-8), brighter)


def as_jpeg(x: torch.Tensor, quality: int) -> torch.Tensor:
    """Written and read as JPEG by Pillow, on the CPU."""
    pictures = map(Image.fromarray, (255 * x).round().byte().permute(0, 2, 3, 1).cpu().numpy())
    changed = [np.array(v2.functional.jpeg(picture, quality)) for picture in pictures]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2) / 255


# Each has a function of images in [0, 1] and a number, and the numbers of severities 1 to 5.
CORRUPTIONS = {
    "noise": (lambda x, sigma: x + sigma * torch.randn(x.shape).to(x.device),
              (0.04, 0.06, 0.08, 0.09, 0.10)),
    "blur": (lambda x, sigma: v2.functional.gaussian_blur(x, [9, 9], [sigma, sigma]),
             (0.4, 0.6, 0.7, 0.8, 1.0)),
    "contrast": (lambda x, c: c * x + (1 - c) * x.mean((2, 3), keepdim=True),
                 (0.75, 0.5, 0.4, 0.3, 0.15)),
    "brightness": (brighten, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "pixelation": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "JPEG": (as_jpeg, (80, 65, 58, 50, 40)),
}  # fmt: skip


def corrupt(images: torch.Tensor, kind: str, severity: int) -> torch.Tensor:
    """Images uint8 (B, 3, S, S) with one of the CORRUPTIONS, of severity 1 to 5.

    The formulas and numbers of CIFAR-10-C (Hendrycks and Dietterich 2019, arXiv 1903.12261), so for
    images of about 32 pixels. Two things differ: values are rounded, not truncated, and the blur
    reflects the image at its border, where theirs repeats the border.
    """
    change, numbers = CORRUPTIONS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        changed = change(images.float() / 255, numbers[severity - 1])
    return (255 * changed.clamp(0, 1)).round().byte().to(images.device)


def shifted(images: torch.Tensor, right: int, down: int) -> torch.Tensor:
    """Images uint8 (B, 3, S, S) moved by so many pixels, reflected at the border."""
    S, most = images.shape[-1], max(abs(right), abs(down))
    wide = F.pad(images.float(), (most,) * 4, mode="reflect").byte()
    return wide[:, :, most - down : most - down + S, most - right : most - right + S]
