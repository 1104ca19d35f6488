"""Batches drawn from a split, and what is done to them, all on the device they are used on.

    B batch   H, W image height and width   C classes

Each image is flipped, shifted and blanked by its own random amount; automatic augmentation and
mixing are torchvision's, one draw for a group of images or for a batch.
"""

import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from data import Split


class Batches:
    """An iterable of `(images, labels)`, one epoch each time it is iterated, like a DataLoader.

    Images come normalised, float32 (B, 3, H, W); labels int64 (B,); both on `device`.
    With `train=True` the order is shuffled, an incomplete last batch is left out, and each image
    is flipped, shifted by up to `shift` pixels, and loses a square of `erase` pixels; if asked,
    an automatic augmentation comes before that, and a share `mix` of the batches is mixed, with
    labels then float32 (B, C), each image's shares of the classes. One number drawn from
    PyTorch's global generator when an epoch begins decides all of that: the loop seeds it with
    (seed, epoch), and batch number `step` then depends on (seed, epoch, step) only.
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
        auto_augment: bool = False,
        mix: float = 0.0,
    ):
        self.device = torch.device(device)
        self.split, self.batch_size, self.train = split.to(self.device), batch_size, train
        self.flip, self.shift, self.erase = flip, shift, erase
        self.auto_augment, self.mix, self.classes = auto_augment, mix, int(split.labels.max()) + 1
        self.mean = 255 * torch.tensor(mean, device=self.device).view(3, 1, 1)
        self.std = 255 * torch.tensor(std, device=self.device).view(3, 1, 1)

    def __len__(self) -> int:
        full, rest = divmod(len(self.split), self.batch_size)
        return full if self.train else full + (rest > 0)

    def __iter__(self):
        if not self.train:
            for part in torch.arange(len(self.split)).split(self.batch_size):
                images, labels = self._on_device(part)
                yield normalise(images, self.mean, self.std), labels
            return
        seed = torch.randint(2**62, ()).item()
        order = torch.randperm(len(self.split), generator=torch.Generator().manual_seed(seed))
        for step in range(len(self)):
            draws = torch.Generator(self.device).manual_seed(seed + 1 + step)
            rows = order[step * self.batch_size : (step + 1) * self.batch_size]
            images, labels = self._on_device(rows)
            images = flip_and_shift(images, draws, flip=self.flip, shift=self.shift)
            with torch.random.fork_rng(devices=[]):  # torchvision's draw from the global generator
                torch.default_generator.manual_seed(seed + 1 + len(self) + step)
                if self.auto_augment:
                    images = trivial_augment(images)
                images = erase_square(normalise(images, self.mean, self.std), draws, self.erase)
                if torch.rand(()) < self.mix:
                    images, labels = cutmix_or_mixup(images, labels, self.classes)
            yield images, labels

    def _on_device(self, rows: torch.Tensor):
        images, labels = self.split.rows(rows.to(self.split.indices.device))
        return images.to(self.device), labels.to(self.device)


def evaluation_batch_size(split: Split) -> int:
    """500 images of 32×32, or as many pixels of others: what fits into memory without gradients."""
    return max(1, 500 * 32 * 32 // split.images[0, 0].numel())


class Taught:
    """Training batches whose labels are half the truth, half what a teacher says of the images.

    The loss is then the mean of the two cross-entropies: distillation without a token of its own
    (Touvron et al. 2021, arXiv 2012.12877, eq. 2 with temperature 1, but for a constant).
    Label smoothing, where it is on, smooths both.

    Args:
        batches: an iterable of `(images, labels)`.
        teacher: a model in eval mode, on the images' device, for images normalised as these are.
    """

    def __init__(self, batches, teacher):
        self.batches, self.teacher = batches, teacher

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        for images, labels in self.batches:
            with torch.no_grad():
                said = self.teacher(images).softmax(1)  # (B, C)
            if labels.ndim == 1:
                labels = F.one_hot(labels, said.shape[1])
            yield images, (labels + said) / 2


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(images - mean) / std as float32; mean and std on the scale of 0 to 255, (3, 1, 1)."""
    return (images.float() - mean) / std


def flip_and_shift(
    images: torch.Tensor, generator: torch.Generator, *, flip: bool, shift: int
) -> torch.Tensor:
    """Mirror each image with probability 1/2 and move it by up to `shift` pixels each way.

    One gather for the whole batch: pixel (y, x) of the result is pixel (rows[y], columns[x]) of
    the image; what is moved in from outside is the image's own mirror image at the border.
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
    """Set a square of `size` pixels to 0, the mean colour, anywhere in each normalised image.

    Cutout (DeVries and Taylor 2017, arXiv 1708.04552), but wholly inside the image.
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


def trivial_augment(images: torch.Tensor, groups: int = 16) -> torch.Tensor:
    """One random operation of random strength for each of `groups` parts of the batch.

    TrivialAugmentWide (Müller and Hutter 2021, arXiv 2103.10158): shear, move, turn, brightness,
    colour, contrast, sharpness, posterise, solarise, autocontrast, equalise. The batch is shuffled,
    so a part is nothing but some of its images. uint8 (B, 3, H, W) -> the same.
    """
    augment = v2.TrivialAugmentWide()
    parts = images.split(-(-len(images) // groups))
    return torch.cat([augment(part) for part in parts])


def cutmix_or_mixup(images: torch.Tensor, labels: torch.Tensor, classes: int):
    """Mix every image with its neighbour in the batch by CutMix or MixUp, one or the other.

    CutMix (Yun et al. 2019, arXiv 1905.04899) pastes a rectangle, MixUp (Zhang et al. 2018,
    arXiv 1710.09412) blends, both with a share drawn evenly from 0 to 1.
    images (B, 3, H, W) -> the same; labels (B,) -> (B, C), each image's shares of the classes.
    """
    mixer = v2.CutMix if torch.rand(()) < 0.5 else v2.MixUp
    return mixer(num_classes=classes)(images, labels)
