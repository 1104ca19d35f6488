"""Explain checkpoints: which parts of an image a network uses.

    python explain.py runs/cifar10-cnn/best.pt                        test images, by Grad-CAM
    python explain.py runs/cifar10-cnn/best.pt runs/cifar10-vit/best.pt --show wrong
    python explain.py runs/cifar10-vit/best.pt --images cat.jpg --versus dog   why cat and not dog

Prints predictions and, of two networks, how similar maps of one method are. Writes into --out-dir:

    <checkpoints>_explanations-<any|correct|wrong|images>.png   image by image: raw grid, overlay;
                                    of many images in several files
    <vit>_attention-layers-<...>.png    the class token's attention in each layer, mean of heads
    <vit>_attention-heads-<...>.png     the same for the first image, in each head of each layer
    <vit>_attention-statistics-<...>.png   how far each head looks, and how similar positions are
    <file>_<checkpoint>_<method>[_<target>].png   with --images: the overlay on the photograph,
                                    of which the networks see the middle square
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import attribution
import cli
import figures
from attribution import METHODS
from data import Split
from examples import (
    MAX_PICTURES,
    Column,
    Examples,
    choose_test_images,
    compute_columns,
    middle_square,
    plan_columns,
    read_photographs,
    without_repeats,
)
from figures import MAX_HEADS, MAX_LAYERS, SCALES, shorten
from folders import read_image
from prepare import TrainedModel, load_data_for, load_models

MAX_SIDE = 2048  # pixels of an overlay on a photograph
MAX_MAPS = 12  # of an image in a figure
MAX_ROWS = 8  # images in the figure of layers


def parse_arguments(argv) -> argparse.Namespace:
    """Read the command line. Combinations that make no sense end in one line."""
    parser = cli.Parser(__doc__)
    parser.add_argument("checkpoints", nargs="*", type=cli.name_type, metavar="CHECKPOINT",
                        help="files that train_cnn.py or train_vit.py wrote")  # fmt: skip
    add = parser.add_argument_group("your own images").add_argument
    add("--images", nargs="+", type=cli.name_type, metavar="FILE", help="instead of test images")
    cli.add_data_flags(parser, from_checkpoint=True)
    add = parser.add_argument_group("test images").add_argument
    add("--show", choices=("any", "correct", "wrong"),
        help="wrong: at least one checkpoint is wrong (default: any)")  # fmt: skip
    add("--count", type=cli.integer(1), metavar="N", help="how many test images (default: 8)")
    add = parser.add_argument_group("explanations").add_argument
    add("--method", nargs="+", choices=METHODS, metavar="NAME",
        help=f"{', '.join(METHODS)} (default: grad-cam; for a ViT attention and relevance; for "
             "other networks occlusion)")  # fmt: skip
    add("--target", nargs="+", metavar="CLASS",
        help="the class to explain: predicted, true, a name, or all (default: predicted; with "
             "--show wrong also true, and the difference of the two)")  # fmt: skip
    add("--versus", metavar="CLASS",
        help="subtract this class's logit: a name, predicted, or true")  # fmt: skip
    add("--layer", type=cli.integer(1), metavar="N",
        help="a CNN's stage or a ViT's block (default: the last)")  # fmt: skip
    add("--save-maps", action="store_true", help="also write the maps as .npz")
    add("--no-figures", action="store_true", help="draw nothing")
    parser.add_argument("--out-dir", default=Path("runs/explanations"),
                        type=cli.path_type, metavar="DIR", help="for the figures")  # fmt: skip
    cli.add_device_flags(parser)
    args = parser.parse_args(argv)

    if not args.checkpoints:
        parser.error("no CHECKPOINT: name one, and before --images")
    for flag in ("show", "count", "dataset", "data_dir") if args.images else ():
        if getattr(args, flag) is not None:
            parser.error(f"--{flag.replace('_', '-')} is for test images: omit it with --images")
    takes = {"target": "takes_target", "versus": "takes_target", "layer": "takes_layer"}
    for flag, accept in takes.items():
        able = [name for name, method in METHODS.items() if getattr(method, accept)]
        if getattr(args, flag) and args.method and not set(args.method) & set(able):
            parser.error(f"--{flag} is for {', '.join(able)}: add one, or omit --{flag}")
    args.contrast_wrong = args.show == "wrong" and not (args.target or args.versus)
    default = ["predicted", "true"] if args.contrast_wrong else ["predicted"]
    args.target = list(dict.fromkeys(map(cli.composed, args.target or default)))
    args.versus = args.versus and cli.composed(args.versus)
    if args.versus in args.target:
        parser.error(f"--versus {args.versus}: that is the --target; choose two classes")
    if args.images and "true" in (*args.target, args.versus):
        flag = "--target" if "true" in args.target else "--versus"
        parser.error(f"{flag} true: --images have no labels; use predicted or a class's name")
    return args


def choose_methods(models: list[TrainedModel], args) -> dict[str, list[str]]:
    """The methods to use for each model, by its name.

    Raises UserError: none of --method is possible, --layer is not there, or a class is unknown.
    """
    methods, problems = {}, []
    for model in models:
        size, layer = model.checkpoint["dataset"]["image_size"], (args.layer or 0) - 1
        default, reasons = attribution.methods_for(model.network, size, layer)
        wanted = args.method or default
        methods[model.name] = [n for n in METHODS if n in wanted and n not in reasons]
        for name in args.method or METHODS:
            if "layers" in reasons.get(name, ""):
                problem = f"{model.name} {reasons[name]}; use a lower one"
                raise cli.UserError(f"--layer {args.layer}: {problem}")
            if args.method and name in reasons:
                print(f"{name}: {model.name} {reasons[name]}")
        possible = ", ".join(name for name in METHODS if name not in reasons)
        problems += [
            (n, f"{model.name} {reasons[n]}; use {possible}") for n in wanted if n in reasons
        ]
    if not any(methods.values()):
        raise cli.UserError("--method {}: {}".format(*problems[0]))
    used = {name for names in methods.values() for name in names}
    if args.layer and not any(METHODS[name].takes_layer for name in used):
        raise cli.UserError(
            f"--layer {args.layer}: {', '.join(sorted(used))} has no choice of layers; omit it"
        )
    classes = models[0].checkpoint["classes"]
    for flag, target in (*(("target", target) for target in args.target), ("versus", args.versus)):
        special = ["predicted", "true"] + (["all"] if flag == "target" else [None])
        if target not in (*special, *classes):
            raise cli.UserError(
                f"--{flag} {target}: the {len(classes)} classes are {cli.quoted(classes)}"
            )
    if "all" in args.target:
        if {"all", "predicted", "true"} & set(classes):
            raise cli.UserError(
                "--target all: a class is named all, predicted or true; name the classes"
            )
        every = [name for name in classes if name != args.versus]
        args.target = list(dict.fromkeys([*every, *args.target]))
        args.target.remove("all")
    return methods


# ---------------------------------------------------------------- words and figures


def print_predictions(model: TrainedModel, examples: Examples, p: torch.Tensor) -> None:
    """The three most probable classes of each image; of very many test images, of the first."""
    shown = len(p) if examples.files else MAX_PICTURES
    for description, row in zip(examples.descriptions[:shown], p, strict=False):
        best = row.topk(min(3, len(row))).indices
        classes = "  ".join(f"{examples.classes[c]} {row[c]:.1%}" for c in best)
        print(f"{description}  {model.name}: {classes}")
    if len(p) > shown:
        print(f"... and {len(p) - shown:,} more images")


def print_agreement(columns: list[Column], predictions: dict[str, torch.Tensor], labels) -> None:
    """The rank correlation of two models' maps by one method of one class, by how many are right.

    Those images count where both maps are of the same class, or of the same two.
    """
    for one, two in itertools.combinations(columns, 2):
        a, b = one.model, two.model
        if a == b or one.key.removeprefix(a) != two.key.removeprefix(b):
            continue
        grids = [attribution.on_grid(column.maps) for column in (one, two)]
        rho = attribution.rank_correlation(*grids)
        if one.target:
            same = torch.cat(one.compared) == torch.cat(two.compared)  # (B, 2)
            rho[~same.all(1).numpy()] = np.nan
        groups = {"": np.isfinite(rho)}
        if (labels >= 0).all():
            right = sum((predictions[name] == labels).int() for name in (a, b)).numpy()
            names = (" where none is right", " where one is right", " where both are right")
            groups = {name: groups[""] & (right == count) for count, name in enumerate(names)}
        parts = [f"{rho[group].mean():+.2f}{name} ({group.sum()})"
                 for name, group in groups.items() if group.any()]  # fmt: skip
        if parts:
            print(f"rank correlation of {one.key} and {two.key}, mean (images): {', '.join(parts)}")


def draw(models: list[TrainedModel], examples: Examples, columns: list[Column], kind: str) -> dict:
    """The figures, by the name of their file."""
    pictures = examples.pictures[:MAX_PICTURES]
    for what, shown, all_of in (
        ("images", len(pictures), len(examples.names)),
        ("maps", min(len(columns), MAX_MAPS), len(columns)),
    ):
        if shown < all_of:
            print(f"the figures show the first {shown} of {all_of} {what}")
    names = shorten(examples.names[: len(pictures)])
    drawn = examples.split.subset(torch.arange(len(pictures)))
    inputs = list(drawn.images.permute(0, 2, 3, 1).numpy()) if examples.files else None
    stem = "+".join(model.name for model in models) + f"_explanations-{kind}"
    pages = figures.plot_explanations(pictures, inputs, names, columns[:MAX_MAPS])
    numbers = [f"-{page}" for page in range(1, 1 + len(pages))] if len(pages) > 1 else [""]
    found = {cli.file_name(stem + n, ".png"): page for n, page in zip(numbers, pages, strict=True)}
    for model in models:
        if any((column.model, column.name) == (model.name, "attention") for column in columns):
            found |= draw_attention(model, pictures, names, drawn, kind)
    return found


def draw_attention(model: TrainedModel, pictures, names, drawn: Split, kind: str) -> dict:
    """What only attention has: layers, heads, their statistics, and positions.

    Of very many, the last layers and the first heads are drawn; means are of all heads.
    """
    maps, statistics = [], []
    for images, _ in model.batches(drawn, explain=True):
        forward = attribution.forward_pass(model.network, images, graph=False)
        attention = torch.stack(forward.layers["attention"], dim=1)
        maps.append(attribution.class_token_maps(attention).cpu())
        statistics.append(torch.stack(attribution.attention_statistics(forward), dim=1).cpu())
    maps, (distance, entropy) = torch.cat(maps), torch.cat(statistics).mean(0)
    tokens, name = attention.shape[-1], shorten([model.name], 40)[0]
    far = attribution.patch_distances(tokens - 1, images.shape[-1]).mean().item()
    tables = {
        "attention distance, pixels": (distance, far),
        "entropy, nats": (entropy, np.log(tokens)),
    }
    positions, similarity = getattr(model.network, "positions", None), None
    if torch.is_tensor(positions) and positions.ndim == 3 and positions.shape[1] == tokens:
        similarity = attribution.position_similarity(positions.detach().cpu())
    title = f"{name}: the class token's attention"
    first = slice(MAX_ROWS)  # of more images the figure would be a strip
    mean = f"{name}: attention of all tokens, mean of {len(maps)} image{'s' * (len(maps) > 1)}"
    layers, heads = range(maps.shape[1])[-MAX_LAYERS:], range(maps.shape[2])[:MAX_HEADS]
    maps, names_of_layers = maps[:, layers.start :], [f"layer {1 + l}" for l in layers]
    of_heads = torch.cat([maps[0, :, : len(heads)], maps[0].mean(1, keepdim=True)], dim=1)
    above = [*(f"head {1 + head}" for head in heads), "mean"]
    found = {
        "layers": figures.plot_attention(
            pictures[first], names[first], maps[first].mean(2), [""] * MAX_ROWS, names_of_layers,
            f"{title}, mean of the heads",
        ),
        "heads": figures.plot_attention(
            pictures[:1], names[:1], of_heads, names_of_layers, above, title
        ),
        "statistics": figures.plot_statistics(tables, similarity, mean),
    }  # fmt: skip
    return {
        cli.file_name(f"{model.name}_attention-{key}-{kind}", ".png"): f for key, f in found.items()
    }


def overlays(examples: Examples, columns: list[Column]):
    """Each map laid over each photograph, as (file name, picture)."""
    stems = [cli.printable(file.stem) for file in examples.files]
    names = {f"{stem}_{column.key}" for stem in stems for column in columns}
    repeated = len(names) < len(stems) * len(columns)  # such as a/cat.jpg b/cat.jpg
    for i, file in enumerate(examples.files):  # read again: so many might not fit into memory
        photo = middle_square(read_image(file), MAX_SIDE)
        name = f"{i + 1}-{stems[i]}" if repeated else stems[i]
        for column in columns:
            picture = figures.overlay(
                photo, column.maps[i], SCALES[column.method.scale], column.norm(i)
            )
            yield cli.file_name(f"{name}_{column.key}", ".png"), Image.fromarray(picture)


@cli.command
@figures.in_our_style
def main(argv=None):
    # 1. Check.
    args = parse_arguments(argv)
    models = load_models(args.checkpoints, cli.use_device(args))
    methods = choose_methods(models, args)
    dataset = args.dataset or models[0].checkpoint["dataset"]["name"]
    cli.make_out_dir(args.out_dir, args.data_dir if dataset == "folder" else None, curves=False)

    # 2. Gather the images: photographs, or some of the test split.
    if args.images:
        kind, examples = "images", read_photographs(args.images, models)
    else:
        kind, data = args.show or "any", load_data_for(models, args.dataset, args.data_dir)
        if data.note:
            print(f"{data.name}: {cli.printable(data.note)}")
        examples = choose_test_images(models, data, kind, args.count or 8)

    # 3. Compute the maps: a column for each model, method and target.
    columns, predictions = [], {}
    targets = [(target, args.versus) for target in args.target]
    targets += [("predicted", "true")] * args.contrast_wrong
    for model in models:
        own = plan_columns(model, methods[model.name], targets, args.layer)
        p = compute_columns(model, own, examples)
        print_predictions(model, examples, p)
        predictions[model.name] = p.argmax(1)
        columns += own
    print_agreement(columns, predictions, examples.split.labels)

    # 4. Draw.
    shown = [] if args.no_figures else without_repeats(columns)
    drawn = draw(models, examples, shown, kind) if shown else {}

    # 5. Write.
    written = []
    for name, figure in drawn.items():
        written.append(name)
        with cli.writing(args.out_dir / name):
            figure.savefig(args.out_dir / name, dpi=110)
    for name, picture in overlays(examples, shown):
        written.append(name)
        with cli.writing(args.out_dir / name):
            picture.save(args.out_dir / name)
    if args.save_maps:
        written.append(cli.file_name("+".join(m.name for m in models) + f"_maps-{kind}", ".npz"))
        maps = {column.key: column.maps.numpy() for column in columns}
        known = {"labels": examples.split.labels, "indices": examples.test_rows}
        known["predictions"] = np.stack(list(predictions.values()))
        with cli.writing(args.out_dir / written[-1]):
            np.savez(args.out_dir / written[-1], **maps, **known)
    more = f", ... ({len(written)} files)" if len(written) > 10 else ""
    if written:
        print(f"written to {args.out_dir}: {', '.join(written[:10])}{more}")
    if examples.unreadable:
        sys.exit(2)


if __name__ == "__main__":
    cli.run(main)
