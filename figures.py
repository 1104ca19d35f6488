"""Figures of explanations: maps over images, attention, faithfulness. Class names on an axis.

B images   L layers   h, w grid of a map   H, W image height and width   C classes
"""

import collections
import contextlib
import dataclasses
import itertools
import os
import sys
import textwrap

import numpy as np
import torch
import torch.nn.functional as F


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
    from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter  # noqa: F401 (for charts.py)

# What a figure of readable size holds.
MAX_BARS, MAX_NAMES = 25, 100  # classes: with numbers, with a name
MAX_LAYERS, MAX_HEADS = 24, 16  # of attention
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "Hiragino Sans")
# A decorator for functions that draw. A $ in a name is a $, and names may be Chinese or Japanese.
in_our_style = matplotlib.rc_context({
    "text.parse_math": False,
    "font.family": [name for name in FONTS if name in matplotlib.font_manager.get_font_names()],
    "axes.titlesize": 11, "figure.titlesize": 11, "legend.fontsize": 9, "legend.frameon": False,
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
        letters = itertools.zip_longest(*same)  # of the same place
        start = next(i for i, found in enumerate(letters) if len(set(found)) > 1)
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
    step = -(-len(names) // MAX_NAMES)  # rounded up
    short = [a + b for a, b in zip(shorten(names), notes or [""] * len(names), strict=True)][::step]
    style = {"fontsize": 10 if len(names) <= 50 else 6}
    if tilt and max(map(len, short)) > 3:
        style |= {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axis.set_ticks(range(0, len(names), step), short, **style)


# ---------------------------------------------------------------- explanations


@dataclasses.dataclass(frozen=True)
class Scale:
    """How the values of maps become colours, which colour-blind people can tell apart."""

    colors: matplotlib.colors.Colormap
    says: str

    def norm(self, maps: torch.Tensor):
        """From values to 0 ... 1, up to the largest; of pixels up to the 99th percentile."""
        size = maps.clamp(min=0) if self is SCALES["positive"] else maps.abs()
        top = float(size.max() if maps[0].numel() <= 256 else np.quantile(size, 0.99))
        if self is SCALES["uniform"]:
            top = max(top, 2.0)  # so that nearly uniform attention is pale
            return LogNorm(1 / top, top, clip=True)
        return Normalize(-(top or 1) if self is SCALES["signed"] else 0, top or 1, clip=True)

    def strength(self, shares: np.ndarray) -> np.ndarray:
        """How much of an overlay is colour, for values normalised to 0 ... 1."""
        if self is SCALES["positive"]:
            return shares
        return abs(2 * shares - 1) if self is SCALES["signed"] else (2 * shares - 1).clip(0)


ATTENTION_COLORS = LinearSegmentedColormap.from_list(
    "attention", [(0, "#bcbddc"), (0.5, "#f7f7f7"), (0.75, "#fdb863"), (1, "#7f3b08")]
)
SCALES = {
    "signed": Scale(
        matplotlib.colormaps["RdBu_r"],
        "Red is evidence for the class, blue is evidence against it.",
    ),
    "uniform": Scale(
        ATTENTION_COLORS,
        "Attention: orange is more than uniform (1), pale purple less, on a logarithmic scale. It "
        "shows where information is mixed, not why a class was chosen.",
    ),
    "positive": Scale(
        matplotlib.colormaps["Oranges"], "Relevance, LayerCAM: the darker, the more."
    ),
}
NOTE = "A map shows what the network uses, not whether the network is right."
RIGHT, WRONG = "✓ ", "✗ "  # before a predicted class
PANEL, BAR, LINES_PER_FIGURE = 1.5, 0.8, 10  # inches, inches


def overlay(image: np.ndarray, heat: torch.Tensor, scale: Scale, norm) -> np.ndarray:
    """A map (h, w), smoothly enlarged, over a grey image uint8 (H, W, 3)."""
    smooth = F.interpolate(heat[None, None].float(), image.shape[:2], mode="bilinear")[0, 0]
    shares = np.asarray(norm(smooth.numpy()))
    weight = 0.8 * scale.strength(shares)[:, :, None] ** 0.7
    grey, colors = image.mean(2, keepdims=True), 255 * scale.colors(shares)[:, :, :3]
    return ((1 - weight) * grey + weight * colors).round().astype(np.uint8)


def plot_explanations(pictures, inputs, names: list[str], columns: list) -> list[Figure]:
    """The picture, then every map as a raw grid and as an overlay, in figures of some images each.

    pictures: uint8 (H, W, 3); inputs: what the networks saw, if pictures are larger photographs,
    else None; names: above the pictures; columns: of maps, as `examples.Column`.
    """
    count = -(-len(columns) // (3 if inputs is None else 2))  # lines for an image, rounded up
    lines = [[columns[j] for j in part] for part in np.array_split(range(len(columns)), count)]
    pages = -(-len(pictures) // max(1, LINES_PER_FIGURE // count))
    parts = np.array_split(range(len(pictures)), pages)
    return [_plot_page(rows, pictures, inputs, names, lines) for rows in parts]


def _plot_page(rows, pictures, inputs, names, lines: list[list]) -> Figure:
    """One figure of `plot_explanations`. Lengths are inches, from the upper left corner."""
    repeated = len(lines) > 1  # headers are on every line, and inputs below pictures
    beside = inputs is not None and not repeated
    left, pair = 0.3 + PANEL + beside * (PANEL + 0.1), 2 * PANEL + 0.05 + BAR
    width = left + pair * len(lines[0])
    columns = list(itertools.chain(*lines))
    says = list(dict.fromkeys(SCALES[column.method.scale].says for column in columns))
    titles = [title for column in columns for title in column.titles]
    if any(title[:2] in (RIGHT, WRONG) for title in titles):
        says.append(f"{RIGHT}right, {WRONG}wrong.")
    note = textwrap.fill(" ".join([*says, NOTE]), int(14.5 * width))
    header, title, foot = 0.5, 0.25, 0.16 * (note.count("\n") + 1) + 0.15
    line_height = title + PANEL + 0.1 + header * repeated
    height = header * (not repeated) + line_height * len(lines) * len(rows) + foot
    figure = Figure(figsize=(width, height))
    figure.text(0.1 / width, 0.08 / height, note, va="bottom", fontsize=9)

    def panel(x, y, across=PANEL):
        box = (x / width, 1 - (y + PANEL) / height, across / width, PANEL / height)
        return figure.add_axes(box, xticks=[], yticks=[])

    def draw_map(x, y, column, i):
        scale, heat, norm = SCALES[column.method.scale], column.maps[i], column.norm(i)
        raw, smooth = panel(x, y), panel(x + PANEL + 0.05, y)
        drawn = raw.imshow(heat.numpy(), cmap=scale.colors, norm=norm, interpolation="nearest")
        times = -(-256 // min(pictures[i].shape[:2]))  # larger pixels, under a smooth map
        large = pictures[i].repeat(times, 0).repeat(times, 1)
        smooth.imshow(overlay(large, heat, scale, norm))
        raw.set_title(column.titles[i], fontsize=9, x=1.03)
        _color_bar(drawn, cax=panel(x + 2 * PANEL + 0.1, y, 0.07))
        if repeated or i == rows[0]:
            at = (x + PANEL) / width, 1 - (y - title) / height
            figure.text(*at, column.header, ha="center", va="bottom", fontsize=9, weight="bold")

    for number, (i, line) in enumerate(itertools.product(rows, lines)):
        y = header + title + number * line_height
        shown = [(pictures[i], names[i])] if line is lines[0] else []
        if inputs is not None and line is lines[repeated]:
            shown.append((inputs[i], "seen as {}×{}".format(*inputs[i].shape)))
        for j, (picture, name) in enumerate(shown):
            axes = panel(0.1 + j * (PANEL + 0.1), y)
            axes.imshow(picture, interpolation="nearest")
            axes.set_title(name, fontsize=9)
        for j, column in enumerate(line):
            draw_map(left + j * pair, y, column, i)
    return figure


def _color_bar(drawn, label: str = "", **place) -> None:
    """A bar with the two ends of a scale and, between them, its neutral value.

    Colours do not go beyond the ends: ≤ and ≥ say that values do.
    """
    low, high, values = drawn.norm.vmin, drawn.norm.vmax, drawn.get_array()
    ticks = [low, *([0.0] if low < 0 else [1.0] if 0 < low < 1 < high else []), high]
    bar = drawn.figure.colorbar(drawn, **place)
    bar.ax.minorticks_off()
    labels = [f"{tick:.2g}".replace("-", "−") for tick in ticks]
    labels[0] = "≤" * bool(values.min() < low or isinstance(drawn.norm, LogNorm)) + labels[0]
    labels[-1] = "≥" * bool(values.max() > high) + labels[-1]
    bar.set_ticks(ticks, labels=labels, fontsize=8)
    bar.set_label(label, fontsize=9)


def plot_attention(pictures, names, maps, beside, above, title: str) -> Figure:
    """A grid of attention maps (R, M, h, w) with one scale; pictures left of the first rows.

    beside: what is written left of each row of maps; above: above each column.
    """
    (R, M), scale = maps.shape[:2], SCALES["uniform"]
    figure = Figure(figsize=(1.6 * (M + 1) + 0.8, 1.6 * R + 0.8), layout="compressed")
    figure.suptitle(title, weight="bold")
    figure.supxlabel(textwrap.fill(scale.says, 23 * (M + 1)), fontsize=9)
    grid, norm = figure.subplots(R, M + 1, squeeze=False), scale.norm(maps.flatten(0, 1))
    for axes in grid[:, 0]:
        axes.set_axis_off()
    for axes, picture, name in zip(grid[:, 0], pictures, shorten(names, 16), strict=False):
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(name, fontsize=9)
    for i, j in itertools.product(range(R), range(M)):
        axes = grid[i, 1 + j]
        drawn = axes.imshow(maps[i, j].numpy(), cmap=scale.colors, norm=norm)
        heading, label = "" if i else above[j], "" if j else beside[i]
        axes.set(xticks=[], yticks=[], title=heading, ylabel=label)
    _color_bar(drawn, "times uniform", ax=grid, shrink=min(1, 3 / R))
    return figure


def plot_statistics(tables: dict, similarity: torch.Tensor | None, title: str) -> Figure:
    """Numbers of each attention head, and how similar position embeddings are.

    tables: {name: (values (L, heads), the value of uniform attention)}; similarity (h, w, h, w):
    drawn as a small map for each position.
    """
    count = len(tables) + (similarity is not None)
    L, heads = next(iter(tables.values()))[0].shape
    size = max(4.2, 0.26 * heads) * count, max(3.6, 0.35 * L + 1.6)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{title}. It does not tell why a class was chosen.")
    panels = figure.subplots(1, count)
    for axes, (name, (values, uniform)) in zip(panels, tables.items(), strict=False):
        most = max(uniform, values.max().item())
        drawn = axes.imshow(values.numpy(), cmap="Purples", vmin=0, vmax=most, aspect="auto")
        axes.set(xlabel="head", ylabel="layer", title=f"{name} (uniform: {uniform:.1f})")
        name_axis(axes.xaxis, [str(1 + head) for head in range(heads)])
        name_axis(axes.yaxis, [str(1 + l) for l in range(L)])
        if heads > MAX_HEADS:  # too many for numbers
            _color_bar(drawn, ax=axes)
        for l, head in itertools.product(range(L), range(heads)) if heads <= MAX_HEADS else ():
            look = {"fontsize": 8, "color": "white" if values[l, head] > most / 2 else "black"}
            axes.text(head, l, f"{values[l, head]:.1f}", ha="center", va="center", **look)
    if similarity is not None:
        axes, side = panels[-1], len(similarity)
        colors = matplotlib.colormaps["Purples"].with_extremes(bad="0.6")
        gaps = F.pad(similarity, (0, 1, 0, 1), value=torch.nan)  # between the small maps
        picture = gaps.permute(0, 2, 1, 3).reshape(side * (side + 1), -1)[:-1, :-1]
        drawn = axes.imshow(picture.numpy(), cmap=colors, interpolation="nearest")
        axes.set(xticks=[], yticks=[], title="position embeddings, each against all")
        _color_bar(drawn, "cosine similarity", ax=axes)
    return figure


def plot_faithfulness(curves: dict, title: str) -> Figure:
    """Deletion and insertion: {fill: {method: {"deletion": (n,), "insertion": (n,)}}}."""
    figure = Figure(figsize=(10, 3.3 * len(curves) + 0.8), layout="constrained")
    note = "Compare with chance (the mean of random orders), not across networks or fillings."
    figure.suptitle(f"{title}: probability of the predicted class\n{note}")
    grid = figure.subplots(len(curves), 2, sharex=True, sharey=True, squeeze=False)
    for row, (fill, methods) in zip(grid, curves.items(), strict=True):
        for axes, kind in zip(row, ("deletion", "insertion"), strict=True):
            for number, (name, values) in enumerate(methods.items()):
                style = ":" if name in ("random", "center", "edges") else "-"
                look = {"color": f"C{number - 1}", "linestyle": style}
                if name == "chance":
                    look = {"color": "0.8", "linewidth": 6}
                axes.plot(np.linspace(0, 100, len(values[kind])), values[kind], label=name, **look)
            axes.grid(alpha=0.3)
            axes.set_title(f"{kind}, hidden parts: {fill}")
    grid[0, 0].set_ylim(0, 1)
    for axes, what in zip(grid[-1], ("hidden", "shown"), strict=True):
        axes.set_xlabel(f"% of the image {what}, highest values first")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure
