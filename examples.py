"""The images to explain: some of a test split, or photographs."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from cli import UserError, printable, warn
from data import Data, Split
from folders import DARK, dark_remark, read_image
from prepare import TrainedModel, expand_patterns, refuse_different

MOST_PICTURES = 32  # that are kept to be drawn


@dataclasses.dataclass
class Examples:
    """B images to explain."""

    split: Split  # what the networks see: uint8 (B, 3, H, W), label -1 if unknown
    test_rows: torch.Tensor  # (B,) positions in the test split, or -1
    classes: list[str]  # of the labels
    pictures: list[np.ndarray]  # to draw, uint8; fewer than B where there are very many
    names: list[str]  # above a picture
    descriptions: list[str]  # in the terminal
    files: list[Path] = dataclasses.field(default_factory=list)  # of photographs
    unreadable: int = 0  # how many files could not be read


def choose_test_images(models: list[TrainedModel], data: Data, show: str, count: int) -> Examples:
    """Up to `count` test images, in a fixed random order, of the kind `show`.

    "any"; "correct": all the models are right; "wrong": at least one of them is wrong.

    Raises:
        UserError: there is no such image.
    """
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    chosen = order if show == "any" else order[:0]  # "any" needs no search
    parts = order.split(256) if show != "any" else ()
    for part in tqdm(parts, f"finding {show} images", leave=False, disable=None):
        if len(chosen) >= count:
            break
        split = data.test.subset(part)
        right = torch.ones(len(part), dtype=torch.bool)
        for model in models:
            right &= model.logits(split, data.classes).argmax(1) == split.labels[split.indices]
        chosen = torch.cat([chosen, part[right if show == "correct" else ~right]])
    chosen = chosen[:count]
    if not len(chosen):
        raise UserError(f"--show {show}: there is no such image in the test split")
    images, labels = data.test.rows(chosen)
    names = [data.classes[label] for label in labels]
    if data.test.files:
        descriptions = [printable(data.test.files[row]) for row in data.test.indices[chosen]]
    else:
        descriptions = [f"test image {i} ({n})" for i, n in zip(chosen, names, strict=True)]
    return Examples(
        split=Split.of(images, labels),
        test_rows=chosen,
        classes=data.classes,
        pictures=list(images.permute(0, 2, 3, 1).numpy()),
        names=[f"true: {name}" for name in names],
        descriptions=descriptions,
    )


def read_photographs(paths: list[str], models: list[TrainedModel]) -> Examples:
    """The files that can be read; the others are reported on stderr.

    Raises:
        UserError: the models differ in classes or image size.
        SystemExit: no file can be read.
    """
    first = models[0].checkpoint
    for other in models[1:]:
        if set(other.checkpoint["classes"]) != set(first["classes"]):
            raise UserError("the checkpoints have different classes: explain them one at a time")
    refuse_different(models, ["image_size"], [])
    size, files, pictures, small, remarks = first["dataset"]["image_size"], [], [], [], []
    paths = list(map(Path, dict.fromkeys(expand_patterns(paths))))
    for path in paths:
        try:
            photo = read_image(path, remarks=remarks)
        except UserError as error:
            print(f"error: {printable(error)}", file=sys.stderr)
            continue
        if photo.info.get("largest", DARK) < DARK:
            remarks.append(dark_remark(path, photo.info["largest"]))
        if len(pictures) < MOST_PICTURES:
            pictures.append(middle_square(photo, 512))
        small.append(np.asarray(ImageOps.fit(photo, (size, size), Image.Resampling.BICUBIC)))
        files.append(path)
    for remark in remarks:
        warn(remark)
    if not files:
        sys.exit(2)
    images, unknown = torch.from_numpy(np.stack(small)), torch.full((len(files),), -1)
    names = [printable(file.name) for file in files]
    split = Split.of(images.permute(0, 3, 1, 2), unknown)
    bad = len(paths) - len(files)
    return Examples(split, unknown, first["classes"], pictures, names, names, files, bad)


def middle_square(photo: Image.Image, side: int) -> np.ndarray:
    """The middle of a photograph, scaled down to uint8 (side, side, 3), never up."""
    side = min(*photo.size, side)
    return np.asarray(ImageOps.fit(photo, (side, side), Image.Resampling.BICUBIC))
