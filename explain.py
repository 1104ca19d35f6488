"""See where checkpoints look: Grad-CAM, attention of the class token, attention rollout.

    python explain.py runs/cifar10-cnn/best.pt                        test images, by Grad-CAM
    python explain.py runs/cifar10-cnn/best.pt runs/cifar10-vit/best.pt --show wrong
    python explain.py runs/cifar10-vit/best.pt --images cat.jpg dog.jpg --target predicted cat

Prints each prediction; writes figures into --out-dir:

    <checkpoints>_explanations-<any|correct|wrong|images>.png   image by image: raw grid, overlay
    <vit>_attention-layers.png    the class token's attention in each layer, averaged over heads
    <vit>_attention-heads.png     the same for the first image, in each head of each layer
    <file>_<checkpoint>_<method>.png   with --images: the overlay on the photograph itself

    B batch   C classes   K channels or token width   h, w grid of a map   N tokens   L layers
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from checkpoint import load_data_of, load_models
from cli import (
    Parser,
    UserError,
    add_data_flags,
    add_device_flag,
    choose_device,
    command,
    number,
    run,
)
from data import normalise, read_image
from models import ViT

LARGEST_SIDE = 2048  # pixels of an overlay on a user's photograph
COLORS = matplotlib.colormaps["turbo"]
SCALE = "Each map has its own scale, from its lowest value (dark blue) to its highest (dark red)."


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


# ---------------------------------------------------------------- pictures


def scaled(heat) -> np.ndarray:
    """A map (h, w) from 0 (its lowest value) to 1 (its highest); a constant map becomes 0."""
    heat = np.asarray(heat, dtype=np.float32)
    span = heat.max() - heat.min()
    return (heat - heat.min()) / span if span > 0 else np.zeros_like(heat)


def overlay(image: np.ndarray, heat: torch.Tensor) -> np.ndarray:
    """A map (h, w) smoothly enlarged and laid in colour over an image uint8 (H, W, 3)."""
    smooth = F.interpolate(heat[None, None].float(), image.shape[:2], mode="bilinear")[0, 0]
    colors = COLORS(scaled(smooth))[:, :, :3] * 255
    grey = image.mean(2, keepdims=True)  # the colours are the map's
    return (0.5 * grey + 0.5 * colors).round().astype(np.uint8)


def plot_explanations(pictures: list[np.ndarray], names: list[str], columns: list[dict]) -> Figure:
    """A row per image: the image, then for each column of maps the raw grid and the overlay.

    A column is a dict: `header`, `maps` (B, h, w), `titles` and `colors`, one per image.
    """
    rows, cols = len(pictures), 1 + 2 * len(columns)
    height = 2.05 * rows + 0.8  # inches
    figure = Figure(figsize=(1.75 * cols, height))
    figure.text(0.5, 0.1 / height, SCALE, ha="center", fontsize=10)
    grid = figure.subplots(rows, cols, squeeze=False)
    figure.subplots_adjust(0.01, 0.35 / height, 0.99, 1 - 0.85 / height, wspace=0.06, hspace=0.2)
    for axes in grid.ravel():
        axes.set_axis_off()
    for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        grid[i, 0].imshow(picture, interpolation="nearest")
        grid[i, 0].set_title(name, fontsize=10)
        for j, column in enumerate(columns):
            raw, smooth = grid[i, 1 + 2 * j], grid[i, 2 + 2 * j]
            raw.imshow(scaled(column["maps"][i]), cmap=COLORS, interpolation="nearest")
            big = Image.fromarray(picture)
            if min(big.size) < 256:  # so that the smooth map is smooth and the pixels stay sharp
                big = big.resize((256, 256), Image.Resampling.NEAREST)
            smooth.imshow(overlay(np.asarray(big), column["maps"][i]))
            raw.set_title(column["titles"][i], fontsize=10, color=column["colors"][i], x=1.03)
            if i == 0:
                raw.text(
                    1.03, 1.22, column["header"], transform=raw.transAxes, ha="center",
                    va="bottom", fontsize=11, weight="bold",
                )  # fmt: skip
    return figure


def plot_attention_layers(pictures, names, attention: torch.Tensor, title: str) -> Figure:
    """A row per image, a column per layer: attention (B, L, heads, h, w) averaged over heads."""
    B, L = attention.shape[:2]
    figure = Figure(figsize=(1.6 * (L + 1), 1.8 * B + 0.5), layout="constrained")
    figure.suptitle(title, weight="bold", fontsize=11)
    figure.supxlabel(SCALE, fontsize=9)
    grid = figure.subplots(B, L + 1, squeeze=False)
    for i in range(B):
        grid[i, 0].imshow(pictures[i], interpolation="nearest")
        grid[i, 0].set_title(names[i], fontsize=10)
        for l in range(L):
            grid[i, l + 1].imshow(scaled(attention[i, l].mean(0)), cmap=COLORS)
            grid[i, l + 1].set_title(f"layer {l + 1}" if i == 0 else "", fontsize=10)
    for axes in grid.ravel():
        axes.set_axis_off()
    return figure


def plot_attention_heads(picture, name: str, attention: torch.Tensor, title: str) -> Figure:
    """One image; a row per layer, a column per head: attention (L, heads, h, w)."""
    L, heads = attention.shape[:2]
    figure = Figure(figsize=(1.5 * (heads + 2), 1.6 * L + 0.7), layout="constrained")
    figure.suptitle(title, weight="bold", fontsize=11)
    figure.supxlabel(SCALE, fontsize=9)
    grid = figure.subplots(L, heads + 2, squeeze=False)
    grid[0, 0].imshow(picture, interpolation="nearest")
    grid[0, 0].set_title(name, fontsize=10)
    for l in range(L):
        left = grid[l, 1]
        left.text(-0.06, 0.5, f"layer {l + 1}", transform=left.transAxes, rotation=90,
                  ha="right", va="center", fontsize=10)  # fmt: skip
        for head in range(heads):
            grid[l, 1 + head].imshow(scaled(attention[l, head]), cmap=COLORS)
        grid[l, 1 + heads].imshow(scaled(attention[l].mean(0)), cmap=COLORS)
    for head in range(heads):
        grid[0, 1 + head].set_title(f"head {head + 1}", fontsize=10)
    grid[0, 1 + heads].set_title("mean", fontsize=10)
    for axes in grid.ravel():
        axes.set_axis_off()
    return figure


# ---------------------------------------------------------------- command line


def prepare_images(images: torch.Tensor, checkpoint: dict, device) -> torch.Tensor:
    """Images uint8 (B, 3, H, W), normalised as the checkpoint's were."""
    mean, std = (255 * torch.tensor(checkpoint[key]).view(3, 1, 1) for key in ("mean", "std"))
    return normalise(images, mean, std).to(device)


@torch.no_grad()
def probabilities(model, images: torch.Tensor, checkpoint: dict, classes, device) -> torch.Tensor:
    """Softmax over `classes` (B, C), in their order, of images uint8 (B, 3, H, W)."""
    logits = model(prepare_images(images, checkpoint, device)).float().cpu()
    return logits.softmax(1)[:, [checkpoint["classes"].index(c) for c in classes]]


def choose_images(models, data, show: str, count: int, device) -> torch.Tensor:
    """Positions in the test split: `count` in a fixed random order, such as `show` says.

    "correct": all the models are right; "wrong": one of them at least is wrong.
    """
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))
    if show == "any":
        return order[:count]
    chosen = []
    for part in order.split(200):
        images, labels = data.test.rows(part)
        right = torch.ones(len(part), dtype=torch.bool)
        for model, checkpoint in models.values():
            p = probabilities(model, images, checkpoint, data.classes, device)
            right &= p.argmax(1) == labels
        chosen.append(part[right if show == "correct" else ~right])
        if sum(map(len, chosen)) >= count:
            break
    return torch.cat(chosen)[:count]


def read_photographs(paths: list[Path], size: int):
    """The files that can be read, as (paths, squares for the eye, images uint8 (B, 3, s, s)).

    Those that cannot are named on stderr.
    """
    read, squares, small = [], [], []
    for path in paths:
        try:
            photo = read_image(path)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        side = min(*photo.size, LARGEST_SIDE)
        squares.append(np.asarray(ImageOps.fit(photo, (side, side), Image.Resampling.BICUBIC)))
        small.append(np.asarray(ImageOps.fit(photo, (size, size), Image.Resampling.BICUBIC)))
        read.append(path)
    images = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2) if small else None
    return read, squares, images


@command
def main(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    add_data_flags(parser, remembered=True)
    group = parser.add_argument_group("images")
    group.add_argument("--images", nargs="+", type=Path, metavar="FILE",
                       help="explain these files in place of test images")  # fmt: skip
    group.add_argument("--show", choices=("any", "correct", "wrong"), default="any",
                       help="test images that all checkpoints get right, or not all")  # fmt: skip
    group.add_argument("--count", type=number(int, 1), default=8, metavar="N", help="test images")
    group = parser.add_argument_group("explanations")
    group.add_argument("--target", nargs="+", default=["predicted"], metavar="CLASS",
                       help="what Grad-CAM explains: predicted, true, or class names")  # fmt: skip
    group.add_argument("--method", nargs="+", choices=METHODS,
                       help="default: Grad-CAM; for a ViT attention and rollout, too")  # fmt: skip
    group.add_argument("--save-maps", action="store_true", help="write the maps as .npz, too")
    parser.add_argument("--out-dir", type=Path, default=Path("runs/explanations"), metavar="DIR")
    add_device_flag(parser)
    args = parser.parse_args(argv)

    device = choose_device(args.device)
    models = load_models(list(dict.fromkeys(args.checkpoints)), device)
    first = next(iter(models.values()))[1]
    for name, (_, checkpoint) in models.items():
        if args.method and not set(args.method) & set(METHODS_OF[checkpoint["model_name"]]):
            parser.error(f"--method {' '.join(args.method)}: {name} is a CNN, without attention")

    # 1. The images: the user's own, or of the test split.
    failed = False
    if args.images:
        classes, size = first["classes"], first["dataset"]["image_size"]
        if any(set(c["classes"]) != set(classes) for _, c in models.values()):
            parser.error("the checkpoints know different classes: explain them one at a time")
        paths, pictures, images = read_photographs(args.images, size)
        failed = len(paths) < len(args.images)
        if not paths:
            sys.exit(2)
        names = [path.name for path in paths]
        positions = labels = torch.full((len(paths),), -1)
    else:
        data = load_data_of(models, args.dataset, args.data_dir)
        classes = data.classes
        positions = choose_images(models, data, args.show, args.count, device)
        if not len(positions):
            parser.error(f"--show {args.show}: there is no such image in the test split")
        images, labels = data.test.rows(positions)
        pictures = list(images.permute(0, 2, 3, 1).numpy())
        names = [f"true: {classes[label]}" for label in labels]
    for target in args.target:
        if target == "true" and args.images:
            parser.error("--target true: nobody has said what is true of --images")
        if target not in ("predicted", "true", *classes):
            parser.error(f"--target {target}: the classes are {', '.join(classes)}")
    args.out_dir.mkdir(parents=True, exist_ok=True)
    stem = "+".join(models).replace("/", "-")

    # 2. The maps: for each checkpoint, method and target a column of the figure.
    columns, arrays, predictions = [], {}, {}
    for name, (model, checkpoint) in models.items():
        p = probabilities(model, images, checkpoint, classes, device)  # (B, C)
        predictions[name] = p.argmax(1)
        own = torch.tensor([checkpoint["classes"].index(c) for c in classes])  # classes by name
        x = prepare_images(images, checkpoint, device)
        for method in METHODS_OF[checkpoint["model_name"]]:
            if args.method and method not in args.method:
                continue
            for target in args.target if method == "grad-cam" else (None,):
                if target == "true":
                    goals = labels
                elif target in (None, "predicted"):
                    goals = predictions[name]
                else:
                    goals = torch.full_like(labels, classes.index(target))
                batches = zip(x.split(256), own[goals].to(device).split(256), strict=True)
                maps = torch.cat([METHODS[method](model, *b).cpu() for b in batches])
                titles = [f"{classes[g]} {p[i, g]:.0%}" for i, g in enumerate(goals)]
                titles = [
                    t if m.max() > m.min() else f"{t} (empty map)"
                    for t, m in zip(titles, maps, strict=True)
                ]
                colors = [
                    "black" if y < 0 else "green" if g == y else "firebrick"
                    for g, y in zip(goals, labels, strict=True)
                ]
                what = TITLES[method]
                what += f" ({target})" if target else " (class-agnostic)"
                columns.append(
                    {"header": f"{name}\n{what}", "maps": maps, "titles": titles, "colors": colors}
                )
                key = f"{name}_{method}".replace("/", "-") + (f"_{target}" if target else "")
                arrays[key] = maps.numpy()
        for i, label in enumerate(labels):
            best = "  ".join(
                f"{classes[c]} {p[i, c]:.1%}" for c in p[i].topk(min(3, len(classes)))[1]
            )
            where = names[i] if args.images else f"test image {positions[i]} ({classes[label]})"
            print(f"{where}  {name}: {best}")

    # 3. The figures.
    written = []

    def save(figure: Figure, file: str):
        figure.savefig(args.out_dir / file, dpi=110)
        written.append(file)

    what = "images" if args.images else args.show
    shown = slice(0, 32)  # a figure of more rows could not be read; all go into --save-maps
    for column in columns:
        column["maps"] = column["maps"][shown]
    panels = [Image.fromarray(picture) for picture in pictures[shown]]
    panels = [np.asarray(p.resize((512, 512)) if p.width > 512 else p) for p in panels]
    figure = plot_explanations(panels, names[shown], columns)
    save(figure, f"{stem}_explanations-{what}.png")
    for name, (model, checkpoint) in models.items():
        if isinstance(model, ViT) and (not args.method or "attention" in args.method):
            maps = attention_maps(model, prepare_images(images[shown], checkpoint, device)).cpu()
            title = f"{name}: the class token's attention"
            file = name.replace("/", "-")
            save(
                plot_attention_layers(pictures, names, maps, f"{title}, mean of the heads"),
                f"{file}_attention-layers.png",
            )
            save(
                plot_attention_heads(pictures[0], names[0], maps[0], title),
                f"{file}_attention-heads.png",
            )
    if args.images:
        for key, maps in arrays.items():
            for path, picture, heat in zip(paths, pictures, maps, strict=True):
                file = f"{path.stem}_{key}.png"
                Image.fromarray(overlay(picture, torch.from_numpy(heat))).save(args.out_dir / file)
                written.append(file)
    if args.save_maps:
        file = f"{stem}_maps-{what}.npz"
        predicted = np.stack([p.numpy() for p in predictions.values()])
        np.savez(
            args.out_dir / file, **arrays, labels=labels, predictions=predicted, indices=positions
        )
        written.append(file)
    print(f"written to {args.out_dir}: {', '.join(written)}")
    if failed:
        sys.exit(2)


if __name__ == "__main__":
    run(main)
