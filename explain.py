"""See where checkpoints look: Grad-CAM, attention of the class token, attention rollout.

    python explain.py runs/cifar10-cnn/best.pt                        test images, by Grad-CAM
    python explain.py runs/cifar10-cnn/best.pt runs/cifar10-vit/best.pt --show wrong
    python explain.py runs/cifar10-vit/best.pt --images cat.jpg dog.jpg --target predicted cat

Prints each prediction; writes figures into --out-dir:

    <checkpoints>_explanations-<any|correct|wrong|images>.png   image by image: raw grid, overlay
    <vit>_attention-layers-<...>.png    the class token's attention in each layer, mean of heads
    <vit>_attention-heads-<...>.png     the same for the first image, in each head of each layer
    <file>_<checkpoint>_<method>[_<target>].png   with --images: the overlay on the photograph,
                                    of which the networks see the middle square
"""

# B batch   C classes   K channels or token width   h, w grid of a map   N tokens   L layers

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from batches import normalise
from checkpoint import load_data_of, load_models
from cli import (
    Parser,
    UserError,
    add_data_flags,
    add_device_flag,
    choose_device,
    command,
    make_out_dir,
    number,
    path_type,
    run,
)
from data import read_image
from figures import overlay, plot_attention_heads, plot_attention_layers, plot_explanations, short
from models import ViT

BATCH = 256  # images that go through a network at once, with 65 tokens
LARGEST_SIDE = 2048  # pixels of an overlay on a user's photograph
LARGEST_FIGURE = 32  # images: a figure of more rows could not be read


# ---------------------------------------------------------------- methods: images -> maps


def patch_grid(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, 1 + P, K) without the class token, as a map (B, K, h, w)."""
    B, N, K = tokens.shape
    side = round((N - 1) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).reshape(B, K, side, side)


@torch.enable_grad()
def grad_cam(model, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391, eq. 1 and 2): maps (B, h, w), >= 0.

    Of the CNN's last map A, or of the tokens that enter the ViT's last attention, laid out as a
    map. (At the output of the last block all patches have a gradient of exactly 0, for the class
    token alone is classified.)
    images (B, 3, H, W), normalised; targets (B,): the class whose logit is explained.
    """
    features, intermediates = model.forward_features(images, return_intermediates=True)
    A = intermediates["tokens"] if isinstance(model, ViT) else intermediates[-1]
    logits = model.forward_head(features)  # (B, C)
    score = logits.gather(1, targets[:, None]).sum()  # images are independent: one backward
    (gradient,) = torch.autograd.grad(score, A)
    if isinstance(model, ViT):
        A, gradient = patch_grid(A), patch_grid(gradient)
    alpha = gradient.mean((2, 3), keepdim=True)  # eq. 1: (B, K, 1, 1)
    return (alpha * A).sum(1).relu().detach()  # eq. 2


@torch.no_grad()
def attention_maps(model: ViT, images: torch.Tensor) -> torch.Tensor:
    """The class token's attention to the patches: (B, L, heads, h, w)."""
    _, intermediates = model.forward_features(images, return_intermediates=True)
    attention = torch.stack(intermediates["attention"], dim=1)  # (B, L, heads, N, N)
    return attention[:, :, :, 0, 1:].unflatten(-1, (model.grid, model.grid))


def last_attention(model: ViT, images: torch.Tensor, targets=None) -> torch.Tensor:
    """The class token's attention in the last layer, averaged over the heads: (B, h, w)."""
    return attention_maps(model, images)[:, -1].mean(1)


def rollout(attentions: list[torch.Tensor]) -> torch.Tensor:
    """Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928): (B, N, N), rows sum to 1.

    attentions: per layer (B, heads, N, N), the first layer first. Heads are averaged, and the
    shortcut around the attention counts as much as the attention: A <- (A + 1) / 2.
    """
    total = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for attention in attentions:
        A = attention.mean(1)  # (B, N, N)
        A = (A + torch.eye(A.shape[-1], device=A.device)) / 2
        total = A @ total
    return total


@torch.no_grad()
def attention_rollout(model: ViT, images: torch.Tensor, targets=None) -> torch.Tensor:
    """The class token's row of the rollout, over the patches: (B, h, w)."""
    _, intermediates = model.forward_features(images, return_intermediates=True)
    row = rollout(intermediates["attention"])[:, 0, 1:]  # (B, P)
    return row.unflatten(-1, (model.grid, model.grid))


METHODS = {"grad-cam": grad_cam, "attention": last_attention, "rollout": attention_rollout}
METHODS_OF = {"cnn": ("grad-cam",), "vit": ("grad-cam", "attention", "rollout")}
TITLES = {"grad-cam": "Grad-CAM", "attention": "attention, last layer", "rollout": "rollout"}


# ---------------------------------------------------------------- command line


def prepare_images(images: torch.Tensor, checkpoint: dict, device) -> torch.Tensor:
    """Images uint8 (B, 3, H, W), normalised as the checkpoint's were, on the device."""
    mean, std = (255 * torch.tensor(checkpoint[key]).view(3, 1, 1) for key in ("mean", "std"))
    return normalise(images, mean, std).to(device)


def batch_size_of(model) -> int:
    """How many images to explain at once: fewer where attention (B, heads, N, N) is large."""
    return max(1, BATCH * 65**2 // (model.grid**2 + 1) ** 2) if isinstance(model, ViT) else BATCH


@torch.no_grad()
def probabilities(model, images: torch.Tensor, checkpoint: dict, classes, device) -> torch.Tensor:
    """Softmax over `classes` (B, C), in their order, of images uint8 (B, 3, H, W)."""
    batches = (prepare_images(part, checkpoint, device) for part in images.split(BATCH))
    logits = torch.cat([model(x).float().cpu() for x in batches])
    return logits.softmax(1)[:, [checkpoint["classes"].index(c) for c in classes]]


def choose_images(models, data, show: str, count: int, device) -> torch.Tensor:
    """Positions in the test split: up to `count`, in a fixed random order, of the kind `show`.

    "correct": all the models are right; "wrong": one of them at least is wrong.
    """
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    if show == "any":
        return order[:count]
    chosen = order[:0]
    for part in tqdm(order.split(BATCH), f"looking for {show} ones", leave=False, disable=None):
        images, labels = data.test.rows(part)
        right = torch.ones(len(part), dtype=torch.bool)
        for model, checkpoint in models.values():
            p = probabilities(model, images, checkpoint, data.classes, device)
            right &= p.argmax(1) == labels
        chosen = torch.cat([chosen, part[right if show == "correct" else ~right]])
        if len(chosen) >= count:
            break
    return chosen[:count]


def square(photo: Image.Image, side: int) -> np.ndarray:
    """The middle of a photograph, scaled to uint8 (side, side, 3), never up."""
    side = min(*photo.size, side)
    return np.asarray(ImageOps.fit(photo, (side, side), Image.Resampling.BICUBIC))


def read_photographs(paths: list[Path], size: int):
    """The files that can be read, as (paths, pictures for the figure, images uint8 (B, 3, s, s)).

    Those that cannot are named on stderr.
    """
    read, pictures, small = [], [], []
    for path in dict.fromkeys(paths):
        try:
            photo = read_image(path)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        if len(pictures) < LARGEST_FIGURE:
            pictures.append(square(photo, 512))
        small.append(np.asarray(ImageOps.fit(photo, (size, size), Image.Resampling.BICUBIC)))
        read.append(path)
    images = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) if small else None
    return read, pictures, images


def make_columns(name, model, checkpoint, images, labels, p, classes, methods, targets, device):
    """The maps of one model for images uint8 (B, 3, H, W), a column for each method and target.

    `labels` (B,): what is true, -1 where nobody knows; `p` (B, C): the model's probabilities.
    """
    x = prepare_images(images, checkpoint, device)
    place = torch.tensor([checkpoint["classes"].index(c) for c in classes])  # classes by name
    goals = {c: torch.full_like(labels, i) for i, c in enumerate(classes)}
    goals |= {"predicted": p.argmax(1), "true": labels}  # even where a class is called so
    columns = []
    for method in methods:
        for target in targets if method == "grad-cam" else (None,):
            goal = goals[target or "predicted"]
            size = batch_size_of(model)
            parts = zip(x.split(size), place[goal].to(device).split(size), strict=True)
            maps = torch.cat([METHODS[method](model, *part).cpu() for part in parts])
            titles, colors = [], []
            for heat, row, c, label in zip(maps, p, goal, labels, strict=True):
                empty = "" if heat.max() > heat.min() else " (empty map)"
                titles.append(f"{short(classes[c])} {row[c]:.0%}{empty}")
                colors.append("black" if label < 0 else "green" if c == label else "firebrick")
            columns.append(
                {
                    "key": f"{name}_{method}" + (f"_{target}" if target else ""),
                    "header": f"{name}\n{TITLES[method]} ({target or 'any class'})",
                    "maps": maps,
                    "titles": titles,
                    "colors": colors,
                }
            )
    return columns


def add_flags(parser: Parser) -> None:
    """The flags of this script."""
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT",
                        help="files that train_cnn.py or train_vit.py wrote")  # fmt: skip
    group = parser.add_argument_group("images of your own")
    group.add_argument("--images", nargs="+", type=path_type, metavar="FILE",
                       help="explain these files in place of test images")  # fmt: skip
    add_data_flags(parser, remembered=True)
    group = parser.add_argument_group("test images")
    group.add_argument("--show", choices=("any", "correct", "wrong"),
                       help="correct: all checkpoints are right; wrong: at least one is not "
                       "(default: any)")  # fmt: skip
    group.add_argument("--count", type=number(int, 1), metavar="N",
                       help="how many test images (default: 8)")  # fmt: skip
    group = parser.add_argument_group("explanations")
    group.add_argument("--target", nargs="+", metavar="CLASS",
                       help="what Grad-CAM explains, a map each: predicted, true, or a class's "
                       "name (default: predicted)")  # fmt: skip
    group.add_argument("--method", nargs="+", choices=METHODS,
                       help="(default: grad-cam; for a ViT all three)")  # fmt: skip
    group.add_argument("--save-maps", action="store_true", help="also write the maps as .npz")
    parser.add_argument("--out-dir", default=Path("runs/explanations"),
                        type=path_type, metavar="DIR", help="where the figures go")  # fmt: skip
    add_device_flag(parser)


@command
def main(argv=None):
    parser = Parser(__doc__)
    add_flags(parser)
    args = parser.parse_args(argv)
    if not args.checkpoints:
        parser.error("no CHECKPOINT: name one, and before --images")
    if args.images:
        for flag in ("show", "count", "dataset", "data_dir"):
            if getattr(args, flag) is not None:
                parser.error(
                    f"--{flag.replace('_', '-')} is for test images: leave it out with --images"
                )
    if args.target and args.method and "grad-cam" not in args.method:
        parser.error("--target is for Grad-CAM alone: add --method grad-cam, or leave it out")

    device = choose_device(args.device)
    models = load_models(list(dict.fromkeys(args.checkpoints)), device)
    checkpoints = {name: checkpoint for name, (_, checkpoint) in models.items()}
    methods = {}
    for name, checkpoint in checkpoints.items():
        there = METHODS_OF[checkpoint["model_name"]]
        methods[name] = [m for m in there if m in (args.method or there)]
    if not any(methods.values()):
        parser.error(f"--method {' '.join(args.method)}: a CNN has no attention; use grad-cam")

    classes = next(iter(checkpoints.values()))["classes"]
    targets = list(dict.fromkeys(args.target or ["predicted"]))
    for target in targets:
        if target == "true" and args.images:
            parser.error("--target true: --images have no labels; use predicted or a class's name")
        if target not in ("predicted", "true", *classes):
            parser.error(f"--target {target}: the classes are {', '.join(classes)}")

    # 1. The images: the user's own, or of the test split.
    failed = False
    if args.images:
        first, *others = checkpoints.values()
        show = "images"
        for other in others:
            if set(other["classes"]) != set(classes):
                parser.error("the checkpoints know different classes: explain them one at a time")
            if other["dataset"]["image_size"] != first["dataset"]["image_size"]:
                parser.error("the checkpoints take images of different sizes: one at a time")
        files, pictures, images = read_photographs(args.images, first["dataset"]["image_size"])
        failed = len(files) < len(set(args.images))
        if not files:
            sys.exit(2)
        wheres = [file.name for file in files]
        names = list(map(short, wheres))
        positions = labels = torch.full((len(files),), -1)
    else:
        data = load_data_of(checkpoints, args.dataset, args.data_dir)
        classes, show = data.classes, args.show or "any"
        positions = choose_images(models, data, show, args.count or 8, device)
        if not len(positions):
            parser.error(f"--show {show}: there is no such image in the test split")
        images, labels = data.test.rows(positions)
        pictures = list(images.permute(0, 2, 3, 1).numpy())
        names = [f"true: {short(classes[label], 16)}" for label in labels]
        wheres = [
            f"test image {i} ({classes[label]})" for i, label in zip(positions, labels, strict=True)
        ]

    make_out_dir(args.out_dir)

    # 2. The maps: for each checkpoint, method and target a column of the figure.
    columns, predictions = [], []
    for name, (model, checkpoint) in models.items():
        p = probabilities(model, images, checkpoint, classes, device)
        for where, row in zip(wheres, p, strict=True):
            best = row.topk(min(3, len(classes))).indices
            print(f"{where}  {name}: " + "  ".join(f"{classes[c]} {row[c]:.1%}" for c in best))
        predictions.append(p.argmax(1))
        columns += make_columns(
            name, model, checkpoint, images, labels, p, classes, methods[name], targets, device
        )

    # 3. The figures.
    written, stem = [], "+".join(models)

    def target_of(file: str) -> Path:  # a checkpoint may be called by its path
        written.append(file.replace("/", "-"))
        return args.out_dir / written[-1]

    shown = slice(0, LARGEST_FIGURE)
    if len(images) > LARGEST_FIGURE:
        print(f"the figures show the first {LARGEST_FIGURE} of {len(images)} images")
    panels = pictures[shown]
    figure = plot_explanations(panels, names[shown], columns)
    figure.savefig(target_of(f"{stem}_explanations-{show}.png"), dpi=110)
    for name, (model, checkpoint) in models.items():
        if "attention" in methods[name]:
            parts = prepare_images(images[shown], checkpoint, device).split(batch_size_of(model))
            maps = torch.cat([attention_maps(model, part).cpu() for part in parts])
            title = f"{name}: the class token's attention"
            figure = plot_attention_layers(panels, names, maps, f"{title}, mean of the heads")
            figure.savefig(target_of(f"{name}_attention-layers-{show}.png"), dpi=110)
            figure = plot_attention_heads(panels[0], names[0], maps[0], title)
            figure.savefig(target_of(f"{name}_attention-heads-{show}.png"), dpi=110)
    if args.images:
        stems = [file.stem for file in files]
        twice = len(set(stems)) < len(stems)  # a/cat.jpg b/cat.jpg
        for i, file in enumerate(files):  # read again: so many might not fit into memory
            picture = square(read_image(file), LARGEST_SIDE)
            name = f"{i + 1}-{stems[i]}" if twice else stems[i]
            for column in columns:
                overlaid = Image.fromarray(overlay(picture, column["maps"][i]))
                overlaid.save(target_of(f"{name}_{column['key']}.png"))
    if args.save_maps:
        np.savez(
            target_of(f"{stem}_maps-{show}.npz"),
            **{column["key"]: column["maps"].numpy() for column in columns},
            labels=labels, predictions=np.stack(predictions), indices=positions,
        )  # fmt: skip
    print(f"written to {args.out_dir}: {', '.join(written)}")
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    run(main)
