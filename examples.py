"""The images to explain, of a test split or photographs; columns of their maps; a figure."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

import figures
from attribution import METHODS, Method, forward_pass, methods_for, weights_of
from cli import UserError, printable, warn
from data import Data, Split
from figures import RIGHT, SCALES, WRONG, shorten
from folders import DARK, dark_remark, read_image
from prepare import TrainedModel, expand_patterns, refuse_different

MAX_PICTURES = 32  # that are kept to be drawn


# ---------------------------------------------------------------- images


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

    Raises UserError: there is no such image.
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
    return examples_of(data.test, chosen, data.classes)


def examples_of(split: Split, rows: torch.Tensor, classes: list[str]) -> Examples:
    """The images at positions `rows` of a split."""
    images, labels = (part.cpu() for part in split.rows(rows))
    names = [classes[label] for label in labels]
    if split.files:
        descriptions = [printable(split.files[row]) for row in split.indices[rows]]
    else:
        descriptions = [f"test image {i} ({n})" for i, n in zip(rows, names, strict=True)]
    return Examples(
        split=Split.of(images, labels),
        test_rows=rows,
        classes=classes,
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
        if len(pictures) < MAX_PICTURES:
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


# ---------------------------------------------------------------- maps


@dataclasses.dataclass(eq=False)
class Column:
    """The maps of B images by one model and method for one target, and what is written on them."""

    model: str
    name: str  # of the method
    target: str | None  # predicted, true, a class; None: the method is of no class
    versus: str | None = None
    layer: int | None = None  # from 1; None: the last, or the method has no choice
    runner_up: bool = False  # whether some image is compared with its next best class
    maps: torch.Tensor | None = None  # (B, h, w)
    compared: list[torch.Tensor] = dataclasses.field(default_factory=list)  # classes, per batch
    titles: list[str] = dataclasses.field(default_factory=list)

    @property
    def method(self) -> Method:
        """The row of the table."""
        return METHODS[self.name]

    def norm(self, i: int):
        """The scale of map i: that of all the maps, if their values can be compared.

        Those without a unit, and of pixels, which differ too much, have a scale each.
        """
        comparable = self.method.unit and self.maps[0].numel() <= 256
        return SCALES[self.method.scale].norm(self.maps if comparable else self.maps[i : i + 1])

    @property
    def key(self) -> str:
        """For names of files and arrays."""
        versus = f"-versus-{self.versus}" if self.versus else ""
        layer = f"-layer{self.layer}" if self.layer else ""
        target = f"_{self.target}{versus}" if self.target else ""
        return f"{self.model}_{self.name}{layer}{target}"

    @property
    def header(self) -> str:
        """Two lines above the maps."""
        what = {None: "class-agnostic", "predicted": "predicted class", "true": "true class"}
        versus = f" minus {self.versus}" if self.versus else ""
        versus += " or runner-up" * self.runner_up
        of = shorten([what.get(self.target, self.target) + versus], 40)[0]
        unit = f", {self.method.unit}" if self.method.unit else ""
        layer = f", layer {self.layer}" if self.layer else ""
        return f"{shorten([self.model], 24)[0]}: {self.method.title}{layer}\n{of}{unit}"

    def choose(self, p: torch.Tensor, labels: torch.Tensor, classes: list[str]):
        """The classes (B,) to explain and, if `versus`, to compare with, else None. p (B, C).

        Where the two are one class, the most probable other class is compared with.
        """
        meaning = {name: torch.full_like(labels, i) for i, name in enumerate(classes)}
        meaning |= {None: p.argmax(1), "predicted": p.argmax(1), "true": labels}
        goal = meaning[self.target]
        if not self.versus:
            return goal, None
        same, next_best = meaning[self.versus] == goal, p.scatter(1, goal[:, None], -1).argmax(1)
        self.runner_up |= bool(same.any())
        return goal, torch.where(same, next_best, meaning[self.versus])

    def write(self, p: torch.Tensor, labels, goal, rival, classes: list[str]) -> None:
        """Write the class of each image and its probability, and whether a prediction is right."""
        classes = shorten(classes, 12 if self.versus else 20)
        for i, label in enumerate(labels):
            title = f"{classes[goal[i]]} ({p[i, goal[i]]:.0%})"
            if self.target in (None, "predicted") and label >= 0:
                title = (RIGHT if goal[i] == label else WRONG) + title
            if rival is not None:
                title = f"{title}, not {classes[rival[i]]} ({p[i, rival[i]]:.0%})"
            self.titles.append(title)


def plan_columns(
    model: TrainedModel, methods: list[str], targets: list[tuple], layer: int | None
) -> list[Column]:
    """The columns of a model: one for each method and, if it is of a class, (target, versus)."""
    return [
        Column(model.name, name, *target, layer if METHODS[name].takes_layer else None)
        for name in methods
        for target in (targets if METHODS[name].takes_target else [(None, None)])
    ]


def compute_columns(model: TrainedModel, columns: list[Column], examples: Examples):
    """Fill in the columns; return probabilities (B, C) in the order of `examples.classes`.

    All the methods share one forward pass of each batch.
    """
    outputs = model.output_indices(examples.classes)  # of the network, for each class
    batches = model.batches(examples.split, explain=True)
    graph = any(column.method.gradients for column in columns)
    probabilities, maps = [], [[] for _ in columns]
    for (images, _), labels in zip(
        tqdm(batches, model.name, leave=False, disable=None),
        examples.split.labels.split(batches.batch_size),
        strict=True,
    ):
        forward = forward_pass(model.network, images, graph=graph)
        p = forward.logits.detach().float().cpu()[:, outputs].softmax(1)
        for column, parts in zip(columns, maps, strict=True):
            goal, rival = column.choose(p, labels, examples.classes)
            column.compared.append(torch.stack([goal, goal if rival is None else rival], dim=1))
            against = None if rival is None else outputs[rival]
            weights = weights_of(outputs[goal], against, forward.logits)
            heat = column.method.compute(forward, weights, (column.layer or 0) - 1).detach()
            parts.append(heat.cpu())
            column.write(p, labels, goal, rival, examples.classes)
        probabilities.append(p)
    for column, parts in zip(columns, maps, strict=True):
        column.maps = torch.cat(parts)
    return torch.cat(probabilities)


def without_repeats(columns: list[Column]) -> list[Column]:
    """Columns whose maps differ: if every prediction is right, predicted and true are one."""
    kept = []
    for column in columns:
        alike = [k for k in kept if (k.model, k.name) == (column.model, column.name)]
        same = [k for k in alike if torch.equal(k.maps, column.maps)]
        if same:
            print(f"{column.key}: the same maps as {same[0].key}")
        else:
            kept.append(column)
    return kept


# ---------------------------------------------------------------- a picture


def draw_explained(
    models: list[TrainedModel], split: Split, rows: torch.Tensor, classes: list[str]
):
    """The images at `rows`, and each network's map of the class that it predicts."""
    examples, columns = examples_of(split, rows, classes), []
    for model in models:
        methods, _ = methods_for(model.network, model.checkpoint["dataset"]["image_size"])
        method = next((name for name in methods if METHODS[name].takes_target), methods[0])
        own = plan_columns(model, [method], [("predicted", None)], None)
        compute_columns(model, own, examples)
        columns += own
    return figures.plot_explanations(examples.pictures, None, shorten(examples.names), columns)[0]
