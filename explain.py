"""Explain checkpoints: which parts of an image a network uses.

    python explain.py runs/cifar10-cnn/best.pt                        test images, by Grad-CAM
    python explain.py runs/cifar10-cnn/best.pt runs/cifar10-vit/best.pt --show wrong
    python explain.py runs/cifar10-vit/best.pt --images cat.jpg dog.jpg --target predicted cat

Prints each prediction and writes figures into --out-dir:

    <checkpoints>_explanations-<any|correct|wrong|images>.png   image by image: raw grid, overlay
    <vit>_attention-layers-<...>.png    the class token's attention in each layer, mean of heads
    <vit>_attention-heads-<...>.png     the same for the first image, in each head of each layer
    <file>_<checkpoint>_<method>[_<target>].png   with --images: the overlay on the photograph,
                                    of which the networks see the middle square
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from attribution import METHODS, attention_maps, methods_for
from cli import (
    Parser,
    UserError,
    add_data_flags,
    add_device_flags,
    command,
    composed,
    file_name,
    integer,
    make_out_dir,
    name_type,
    path_type,
    printable,
    quoted,
    run,
    use_device,
    warn,
    writing,
)
from data import Data, Split
from figures import (
    overlay,
    plot_attention_heads,
    plot_attention_layers,
    plot_explanations,
    shorten,
    with_plain_text,
)
from folders import DARK, dark_remark, read_image
from prepare import (
    TrainedModel,
    expand_patterns,
    load_data_for,
    load_models,
    refuse_different,
)

LARGEST_SIDE = 2048  # pixels of an overlay on a photograph
LARGEST_FIGURE = 32, 12  # images and maps of each: a larger figure could not be read


def parse_arguments(argv) -> argparse.Namespace:
    """Read the command line. Combinations that make no sense end in one line."""
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="*", type=name_type, metavar="CHECKPOINT",
                        help="files that train_cnn.py or train_vit.py wrote")  # fmt: skip
    add = parser.add_argument_group("your own images").add_argument
    add("--images", nargs="+", type=name_type, metavar="FILE", help="instead of test images")
    add_data_flags(parser, from_checkpoint=True)
    add = parser.add_argument_group("test images").add_argument
    add("--show", choices=("any", "correct", "wrong"),
        help="wrong: at least one checkpoint is wrong (default: any)")  # fmt: skip
    add("--count", type=integer(1), metavar="N", help="how many test images (default: 8)")
    add = parser.add_argument_group("explanations").add_argument
    add("--target", nargs="+", metavar="CLASS",
        help="predicted, true, or a class's name (default: predicted)")  # fmt: skip
    add("--method", nargs="+", choices=METHODS,
        help="(default: what the network offers, else input-x-gradient)")  # fmt: skip
    add("--save-maps", action="store_true", help="also write the maps as .npz")
    parser.add_argument("--out-dir", default=Path("runs/explanations"),
                        type=path_type, metavar="DIR", help="for the figures")  # fmt: skip
    add_device_flags(parser)
    args = parser.parse_args(argv)

    if not args.checkpoints:
        parser.error("no CHECKPOINT: name one, and before --images")
    for flag in ("show", "count", "dataset", "data_dir") if args.images else ():
        if getattr(args, flag) is not None:
            parser.error(f"--{flag.replace('_', '-')} is for test images: omit it with --images")
    with_target = [name for name, method in METHODS.items() if method.takes_target]
    if args.target and args.method and not set(args.method) & set(with_target):
        parser.error(f"--target is for {' and '.join(with_target)}: add one, or omit --target")
    args.target = list(dict.fromkeys(map(composed, args.target or ["predicted"])))
    if args.images and "true" in args.target:
        parser.error("--target true: --images have no labels; use predicted or a class's name")
    return args


def choose_methods(models: list[TrainedModel], args) -> dict[str, list[str]]:
    """The methods to use for each model, by its name.

    Raises:
        UserError: none of --method is possible, or --target is not a class.
    """
    methods = {}
    for model in models:
        size = model.checkpoint["dataset"]["image_size"]
        methods[model.name] = methods_for(model.network, size, args.method)
    if not any(methods.values()):
        possible = methods_for(models[0].network, models[0].checkpoint["dataset"]["image_size"])
        raise UserError(
            f"--method {' '.join(args.method)}: {models[0].name} does not offer what it needs; use "
            f"{', '.join(possible)}"
        )
    classes = models[0].checkpoint["classes"]
    for target in args.target:
        if target not in ("predicted", "true", *classes):
            raise UserError(f"--target {target}: the {len(classes)} classes are {quoted(classes)}")
    return methods


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
        if len(pictures) < LARGEST_FIGURE[0]:
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


def make_columns(model: TrainedModel, methods, targets, examples: Examples, p) -> list[dict]:
    """The maps of one model, a column of the figure for each method and target.

    p (B, C): the model's probabilities, in the order of `examples.classes`.
    """
    labels = examples.split.labels
    chosen = {name: torch.full_like(labels, i) for i, name in enumerate(examples.classes)}
    chosen |= {"predicted": p.argmax(1), "true": labels}  # even where a class has such a name
    columns, short = [], shorten(examples.classes)
    for name in methods:
        method = METHODS[name]
        for target in targets if method.takes_target else (None,):
            goal = chosen[target or "predicted"]  # (B,)
            outputs = model.output_indices(examples.classes)[goal]
            maps = compute_maps(model, method.compute, examples.split, outputs)
            empty = ["" if heat.max() > heat.min() else " (empty map)" for heat in maps]
            columns.append({
                "key": f"{model.name}_{name}" + (f"_{target}" if target else ""),
                "header": (model.name, f"{method.title} ({target or 'any class'})"),
                "maps": maps,
                "signed": method.signed,
                "titles": [f"{short[c]} {row[c]:.0%}{note}"
                           for row, c, note in zip(p, goal, empty, strict=True)],
                "colors": ["black" if true < 0 else "green" if c == true else "firebrick"
                           for c, true in zip(goal, labels, strict=True)],
            })  # fmt: skip
    return columns


def compute_maps(model: TrainedModel, compute, split: Split, *per_image) -> torch.Tensor:
    """`compute(network, images, ...)` for a split's images, in batches; on the CPU."""
    batches = model.batches(split, explain=True)
    parts = zip(batches, *(values.split(batches.batch_size) for values in per_image), strict=True)
    return torch.cat([
        compute(model.network, images, *(values.to(images.device) for values in rest)).cpu()
        for (images, _), *rest in parts
    ])  # fmt: skip


def print_predictions(model: TrainedModel, examples: Examples, p: torch.Tensor) -> None:
    """The three most probable classes of each image."""
    for description, row in zip(examples.descriptions, p, strict=True):
        best = row.topk(min(3, len(row))).indices
        classes = "  ".join(f"{examples.classes[c]} {row[c]:.1%}" for c in best)
        print(f"{description}  {model.name}: {classes}")


def draw(models: list[TrainedModel], methods, examples: Examples, columns, kind: str) -> dict:
    """The figures, by the name of their file."""
    rows, most = LARGEST_FIGURE
    pictures = examples.pictures[:rows]
    for what, existing, limit in (("images", examples.names, rows), ("maps", columns, most)):
        if len(existing) > limit:
            print(f"the figures show the first {limit} of {len(existing)} {what}")
    names = shorten(examples.names[: len(pictures)])
    together = "+".join(model.name for model in models)
    title = file_name(f"{together}_explanations-{kind}", ".png")
    figures = {title: plot_explanations(pictures, names, columns[:most])}
    drawn = examples.split.subset(torch.arange(len(pictures)))
    for model in models:
        if "attention" in methods[model.name]:
            maps = compute_maps(model, attention_maps, drawn)
            title = f"{shorten([model.name], 40)[0]}: the class token's attention"
            layers = file_name(f"{model.name}_attention-layers-{kind}", ".png")
            figures[layers] = plot_attention_layers(
                pictures, names, maps, f"{title}, mean of the heads"
            )
            heads = file_name(f"{model.name}_attention-heads-{kind}", ".png")
            figures[heads] = plot_attention_heads(pictures[0], names[0], maps[0], title)
    return figures


def overlays(examples: Examples, columns: list[dict]):
    """Each map laid over each photograph, as (file name, picture)."""
    stems = [printable(file.stem) for file in examples.files]
    names = {f"{stem}_{column['key']}" for stem in stems for column in columns}
    repeated = len(names) < len(stems) * len(columns)  # such as a/cat.jpg b/cat.jpg
    for i, file in enumerate(examples.files):  # read again: so many might not fit into memory
        photo = middle_square(read_image(file), LARGEST_SIDE)
        name = f"{i + 1}-{stems[i]}" if repeated else stems[i]
        for column in columns:
            picture = Image.fromarray(overlay(photo, column["maps"][i], column["signed"]))
            yield file_name(f"{name}_{column['key']}", ".png"), picture


@command
@with_plain_text
def main(argv=None):
    # 1. Check.
    args = parse_arguments(argv)
    models = load_models(args.checkpoints, use_device(args))
    methods = choose_methods(models, args)
    dataset = args.dataset or models[0].checkpoint["dataset"]["name"]
    make_out_dir(args.out_dir, args.data_dir if dataset == "folder" else None, curves=False)

    # 2. Gather the images: photographs, or some of the test split.
    if args.images:
        kind, examples = "images", read_photographs(args.images, models)
    else:
        kind, data = args.show or "any", load_data_for(models, args.dataset, args.data_dir)
        if data.note:
            print(f"{data.name}: {printable(data.note)}")
        examples = choose_test_images(models, data, kind, args.count or 8)

    # 3. Compute the maps: a column for each model, method and target.
    columns, predictions = [], []
    for model in models:
        p = model.logits(examples.split, examples.classes).softmax(1)  # (B, C)
        print_predictions(model, examples, p)
        predictions.append(p.argmax(1))
        columns += make_columns(model, methods[model.name], args.target, examples, p)

    # 4. Draw.
    figures = draw(models, methods, examples, columns, kind)

    # 5. Write.
    written = []
    for name, figure in figures.items():
        written.append(name)
        with writing(args.out_dir / name):
            figure.savefig(args.out_dir / name, dpi=110)
    for name, picture in overlays(examples, columns):
        written.append(name)
        with writing(args.out_dir / name):
            picture.save(args.out_dir / name)
    if args.save_maps:
        written.append(file_name("+".join(m.name for m in models) + f"_maps-{kind}", ".npz"))
        maps = {column["key"]: column["maps"].numpy() for column in columns}
        known = {"labels": examples.split.labels, "indices": examples.test_rows}
        known["predictions"] = np.stack(predictions)
        with writing(args.out_dir / written[-1]):
            np.savez(args.out_dir / written[-1], **maps, **known)
    more = f", ... ({len(written)} files)" if len(written) > 10 else ""
    print(f"written to {args.out_dir}: {', '.join(written[:10])}{more}")
    if examples.unreadable:
        sys.exit(2)


if __name__ == "__main__":
    run(main)
