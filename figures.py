"""All figures: maps over images, attention, confusion matrices, curves, what a data set holds.

B images   L layers   h, w grid of a map   H, W image height and width   C classes
"""

import collections
import contextlib
import itertools
import os
import sys
import textwrap

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import Data, Split


@contextlib.contextmanager
def without_backend():
    """Import matplotlib whatever MPLBACKEND is: a notebook's may be missing here."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
            with contextlib.suppress(ValueError, KeyError):
                sys.modules["matplotlib"].rcParams["backend"] = backend


with without_backend():
    import matplotlib.font_manager
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

# What a figure of readable size holds.
MOST_BARS, MOST_EXAMPLES, MOST_NAMES = (
    25,
    50,
    100,
)  # classes with numbers, with an image, on an axis
MOST_LAYERS, MOST_HEADS = 24, 16  # of attention
MOST_MATRICES, MOST_CURVES = 6, 10  # checkpoints; matplotlib has ten colours
COLORS = matplotlib.colormaps["turbo"]
SIGNED_COLORS = matplotlib.colormaps["RdBu_r"]
# These sentences name the colours above.
SCALE = "Each map has its own scale, from its lowest value (dark blue) to its highest (dark red)."
SIGNED_SCALE = "Maps in red and blue: red speaks for the class, blue against it, white is 0."
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "Hiragino Sans")
# A decorator for commands that draw: a $ in a name is a $, and names may be Chinese or Japanese.
with_plain_text = matplotlib.rc_context({
    "text.parse_math": False,
    "font.family": [name for name in FONTS if name in matplotlib.font_manager.get_font_names()],
})  # fmt: skip


def shorten(names: list[str], length: int = 20) -> list[str]:
    """Long names without their middle, to fit a column; different names remain different."""
    half, short = (length - 1) // 2, {}
    for name in dict.fromkeys(names):
        short[name] = name if len(name) <= length else f"{name[:half]}…{name[-half:]}"
    for label, count in collections.Counter(short.values()).items():
        if count == 1:
            continue
        same = [name for name in short if short[name] == label]  # show where they differ
        start = next(i for i, letters in enumerate(zip(*same, strict=False)) if len({*letters}) > 1)
        for name in same:
            short[name] = f"{name[: half - 3]}…{name[start : start + half]}"
    taken = collections.Counter(short.values())
    for number, (name, label) in enumerate(short.items(), 1):
        if taken[label] > 1:  # still
            short[name] = f"{label[: length - 5]} ({number})"
    return [short[name] for name in names]


def name_axis(axis, names: list[str], notes=None, *, tilt: bool = False) -> None:
    """Write class names along an axis, and a note on each: not more than can be read.

    `tilt`: at an angle, unless they are very short.
    """
    step = -(-len(names) // MOST_NAMES)  # rounded up
    short = [a + b for a, b in zip(shorten(names), notes or [""] * len(names), strict=True)][::step]
    style = {"fontsize": 10 if len(names) <= 50 else 6}
    if tilt and max(map(len, short)) > 3:
        style |= {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axis.set_ticks(range(0, len(names), step), short, **style)


# ---------------------------------------------------------------- explanations


def scaled(heat) -> np.ndarray:
    """A map (h, w) from 0 (its lowest value) to 1 (its highest); a constant map becomes 0."""
    heat = np.asarray(heat, dtype=np.float32)
    span = heat.max() - heat.min()
    return (heat - heat.min()) / span if span > 0 else np.zeros_like(heat)


def colored(heat, signed: bool = False) -> np.ndarray:
    """A map (h, w) as colours (h, w, 3) from 0 to 1; `signed`: 0 is white."""
    if not signed:
        return COLORS(scaled(heat))[:, :, :3]
    heat = np.asarray(heat, dtype=np.float32)
    return SIGNED_COLORS(0.5 + 0.5 * heat / max(abs(heat).max(), 1e-30))[:, :, :3]


def overlay(image: np.ndarray, heat: torch.Tensor, signed: bool = False) -> np.ndarray:
    """A map (h, w) smoothly enlarged and laid in colour over an image uint8 (H, W, 3)."""
    smooth = F.interpolate(heat[None, None].float(), image.shape[:2], mode="bilinear")[0, 0]
    grey = image.mean(2, keepdims=True)  # so that all colour is the map's
    return (0.5 * grey + 0.5 * 255 * colored(smooth, signed)).round().astype(np.uint8)


def plot_explanations(pictures: list[np.ndarray], names: list[str], columns: list[dict]) -> Figure:
    """A row per image: the image, then for each column of maps the raw grid and the overlay.

    A column is a dict: `header` (model, method), `signed`, `maps` (B, h, w), `titles` and `colors`,
    one per image.
    """
    rows, cols = len(pictures), 1 + 2 * len(columns)
    height = 2.05 * rows + 0.95  # inches
    figure = Figure(figsize=(1.75 * cols, height))
    note = SCALE if not all(column["signed"] for column in columns) else ""
    if any(column["signed"] for column in columns):
        note = f"{note} {SIGNED_SCALE}".strip()
    note = textwrap.fill(note, 23 * cols)  # two lines below a narrow figure
    figure.text(0.5, 0.06 / height, note, ha="center", va="bottom", fontsize=10)
    models = list(dict.fromkeys(column["header"][0] for column in columns))
    models = dict(zip(models, shorten(models, 32), strict=True))
    texts = list(dict.fromkeys(column["header"][1] for column in columns))
    texts = dict(zip(texts, shorten(texts, 34), strict=True))
    grid = figure.subplots(rows, cols, squeeze=False)
    figure.subplots_adjust(0.01, 0.5 / height, 0.99, 1 - 0.85 / height, wspace=0.06, hspace=0.2)
    for axes in grid.ravel():
        axes.set_axis_off()
    for i, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        grid[i, 0].imshow(picture, interpolation="nearest")
        grid[i, 0].set_title(name, fontsize=10)
        big = Image.fromarray(picture)
        if min(big.size) < 256:  # so that the smooth map is smooth and the pixels stay sharp
            big = big.resize((256, 256), Image.Resampling.NEAREST)
        for j, column in enumerate(columns):
            raw, smooth = grid[i, 1 + 2 * j], grid[i, 2 + 2 * j]
            raw.imshow(colored(column["maps"][i], column["signed"]), interpolation="nearest")
            smooth.imshow(overlay(np.asarray(big), column["maps"][i], column["signed"]))
            raw.set_title(column["titles"][i], fontsize=10, color=column["colors"][i], x=1.03)
            if i == 0:
                model, text = column["header"]
                header = f"{models[model]}\n{texts[text]}"
                raw.text(
                    1.03, 1.22, header, transform=raw.transAxes, ha="center",
                    va="bottom", fontsize=11, weight="bold",
                )  # fmt: skip
    return figure


def _attention_grid(rows: int, columns: int, inches: tuple[float, float], title: str):
    """A titled figure of empty panels without axes: (figure, panels (rows, columns))."""
    figure = Figure(figsize=inches, layout="constrained")
    figure.suptitle(title, weight="bold", fontsize=11)
    figure.supxlabel(textwrap.fill(SCALE, int(14 * inches[0])), fontsize=9)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_axis_off()
    return figure, grid


def plot_attention_layers(pictures, names, attention: torch.Tensor, title: str) -> Figure:
    """A row per image, a column per layer: attention (B, L, heads, h, w) averaged over heads.

    Of a very deep network the last layers are drawn.
    """
    skipped = max(0, attention.shape[1] - MOST_LAYERS)
    attention = attention[:, skipped:]
    B, L = attention.shape[:2]
    figure, grid = _attention_grid(B, L + 1, (1.6 * (L + 1), 1.8 * B + 0.5), title)
    for i in range(B):
        grid[i, 0].imshow(pictures[i], interpolation="nearest")
        grid[i, 0].set_title(names[i], fontsize=10)
        for l in range(L):
            grid[i, l + 1].imshow(scaled(attention[i, l].mean(0)), cmap=COLORS)
            grid[i, l + 1].set_title(f"layer {skipped + l + 1}" if i == 0 else "", fontsize=10)
    return figure


def plot_attention_heads(picture, name: str, attention: torch.Tensor, title: str) -> Figure:
    """One image; a row per layer, a column per head: attention (L, heads, h, w).

    Of very many, the last layers and the first heads are drawn; the mean is of all heads.
    """
    skipped = max(0, attention.shape[0] - MOST_LAYERS)
    attention = attention[skipped:]
    L, heads = len(attention), min(attention.shape[1], MOST_HEADS)
    figure, grid = _attention_grid(L, heads + 2, (1.5 * (heads + 2), 1.6 * L + 0.7), title)
    grid[0, 0].imshow(picture, interpolation="nearest")
    grid[0, 0].set_title(name, fontsize=10)
    for l in range(L):
        left = grid[l, 1]
        left.text(-0.06, 0.5, f"layer {skipped + l + 1}", transform=left.transAxes, rotation=90,
                  ha="right", va="center", fontsize=10)  # fmt: skip
        for head in range(heads):
            grid[l, 1 + head].imshow(scaled(attention[l, head]), cmap=COLORS)
        grid[l, 1 + heads].imshow(scaled(attention[l].mean(0)), cmap=COLORS)
    for head in range(heads):
        grid[0, 1 + head].set_title(f"head {head + 1}", fontsize=10)
    grid[0, 1 + heads].set_title("mean", fontsize=10)
    return figure


# ---------------------------------------------------------------- evaluation


def plot_confusion(metrics: dict[str, dict], classes: list[str]) -> Figure:
    """A panel per model; a cell has the number of images and their fraction of the true class."""
    metrics = dict(itertools.islice(metrics.items(), MOST_MATRICES))
    C, few = len(classes), len(classes) <= MOST_BARS
    side = max(4.0, 0.66 * C) if few else 12.0 if len(metrics) == 1 else 8.0
    columns = min(len(metrics), 3)
    rows = -(-len(metrics) // columns)
    figure = Figure(figsize=((side + 1.6) * columns, (side + 1.6) * rows), layout="compressed")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    names = shorten(list(metrics), int(7 * side))
    for axes, name, scores in zip(panels, names, metrics.values(), strict=False):
        counts = np.array(scores["confusion_matrix"])
        shares = counts / counts.sum(1, keepdims=True).clip(1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        name_axis(axes.xaxis, classes, tilt=True)
        name_axis(axes.yaxis, classes, ["" if n else " (no images)" for n in counts.sum(1)])
        axes.set(xlabel="predicted", ylabel="true")
        correct = f"{scores['accuracy']:.2%} of {scores['images']:,} images correct"
        axes.set_title(f"{name}\n{correct}")
        if len(classes) <= MOST_NAMES:
            axes.set_xticks(np.arange(C - 1) + 0.5, minor=True)
            axes.set_yticks(np.arange(C - 1) + 0.5, minor=True)
            axes.grid(which="minor", color="0.9", linewidth=0.8)
            axes.tick_params(which="minor", length=0)
        for i, j in np.argwhere(counts) if few else ():
            color = "white" if shares[i, j] > 0.5 else "black"
            text = {"ha": "center", "color": color}
            axes.text(j, i - 0.04, f"{counts[i, j]}", va="bottom", fontsize=9, **text)
            axes.text(j, i + 0.06, f"{shares[i, j]:.1%}", va="top", fontsize=7, **text)
    return figure


def plot_curves(histories: dict[str, list[dict]]) -> Figure:
    """Accuracy and loss of trainings, by epoch and by training time; validation is solid."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    grid = figure.subplots(2, 2, sharey="row", sharex="col")
    histories = dict(itertools.islice(histories.items(), MOST_CURVES))
    names = shorten(list(histories), 40)
    for row, quantity in zip(grid, ("accuracy", "loss"), strict=True):
        for axes, unit in zip(row, ("epoch", "minutes of training"), strict=True):
            for color, (name, history) in enumerate(zip(names, histories.values(), strict=True)):
                x = [r["epoch"] if unit == "epoch" else r["seconds"] / 60 for r in history]
                for part, style in (("val", "-"), ("train", "--")):
                    y = [r[f"{part}_{quantity}"] for r in history]
                    if None not in y:
                        # The name is last: matplotlib leaves out a label that begins with _.
                        label = f"{'validation' if part == 'val' else 'training'}, {name}"
                        look = {"marker": "o" if len(y) < 40 else None, "markersize": 3}
                        axes.plot(x, y, style, color=f"C{color}", label=label, **look)
            axes.grid(alpha=0.3)
            if quantity == "loss":
                axes.set_xlabel(unit)
        row[0].set_ylabel(quantity)
    grid[0, 0].yaxis.set_major_formatter("{x:.0%}")
    grid[1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[0, 0].legend(fontsize=10 if len(histories) <= 4 else 6)
    return figure


def plot_examples(split: Split, classes: list[str]) -> Figure:
    """The first image of each class in a split, of the first classes if there are many."""
    drawn = shorten(classes, 14)[:MOST_EXAMPLES]
    columns = min(len(drawn), 10)
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(1.5 * columns, 1.8 * rows + 0.3), layout="constrained")
    if len(drawn) < len(classes):
        figure.suptitle(f"the first {len(drawn)} of {len(classes)} classes")
    labels = split.labels[split.indices]
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels:
        axes.axis("off")
    for label, (axes, name) in enumerate(zip(panels, drawn, strict=False)):
        where = (labels == label).nonzero()[:1, 0]
        if len(where):
            axes.imshow(split.rows(where)[0][0].permute(1, 2, 0).numpy(), interpolation="nearest")
        else:
            axes.text(0.5, 0.5, "no images", ha="center", va="center")
        axes.set_title(name, fontsize=11)
    return figure


def plot_counts(data: Data) -> Figure:
    """Images per class in each split."""
    C = len(data.classes)
    figure = Figure(figsize=(min(max(6.0, 0.9 * C), 22.5), 4), layout="constrained")
    axes, x = figure.subplots(), np.arange(C)
    for i, part in enumerate(("train", "val", "test")):
        split = getattr(data, part)
        if not len(split):
            continue
        counts = torch.bincount(split.labels[split.indices], minlength=C).numpy()
        label = f"{part}: {len(split):,}"
        if len(data.classes) > MOST_BARS:
            axes.plot(x, counts, ".", markersize=4, label=label)
        else:
            bars = axes.bar(x + (i - 1) * 0.28, counts, 0.28, label=label)
            axes.bar_label(bars, fontsize=7, rotation=90 if C > 5 else 0, padding=2)
    name_axis(axes.xaxis, data.classes, tilt=True)
    axes.set_ylabel("images")
    axes.margins(x=0.5 / C, y=0.15)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
