"""The pictures of `explain.py`: maps as raw grids and as overlays, attention by layer and head.

B images   L layers   h, w grid of a map   H, W image height and width
"""

import textwrap

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image

COLORS = matplotlib.colormaps["turbo"]
SCALE = "Each map has its own scale, from its lowest value (dark blue) to its highest (dark red)."
matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $


def short(name: str, length: int = 20) -> str:
    """A long name without its middle: what a column has room for."""
    half = (length - 1) // 2
    return name if len(name) <= length else f"{name[:half]}…{name[-half:]}"


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
    height = 2.05 * rows + 0.95  # inches
    figure = Figure(figsize=(1.75 * cols, height))
    note = textwrap.fill(SCALE, 23 * cols)  # two lines below a narrow figure
    figure.text(0.5, 0.06 / height, note, ha="center", va="bottom", fontsize=10)
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
            raw.imshow(scaled(column["maps"][i]), cmap=COLORS, interpolation="nearest")
            smooth.imshow(overlay(np.asarray(big), column["maps"][i]))
            raw.set_title(column["titles"][i], fontsize=10, color=column["colors"][i], x=1.03)
            if i == 0:
                raw.text(
                    1.03, 1.22, column["header"], transform=raw.transAxes, ha="center",
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
    """A row per image, a column per layer: attention (B, L, heads, h, w) averaged over heads."""
    B, L = attention.shape[:2]
    figure, grid = _attention_grid(B, L + 1, (1.6 * (L + 1), 1.8 * B + 0.5), title)
    for i in range(B):
        grid[i, 0].imshow(pictures[i], interpolation="nearest")
        grid[i, 0].set_title(names[i], fontsize=10)
        for l in range(L):
            grid[i, l + 1].imshow(scaled(attention[i, l].mean(0)), cmap=COLORS)
            grid[i, l + 1].set_title(f"layer {l + 1}" if i == 0 else "", fontsize=10)
    return figure


def plot_attention_heads(picture, name: str, attention: torch.Tensor, title: str) -> Figure:
    """One image; a row per layer, a column per head: attention (L, heads, h, w)."""
    L, heads = attention.shape[:2]
    figure, grid = _attention_grid(L, heads + 2, (1.5 * (heads + 2), 1.6 * L + 0.7), title)
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
    return figure
