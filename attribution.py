"""Attribution methods: which parts of an image a network uses.

    B batch   C classes   K feature channels   h, w feature map   H, W image
    N tokens = 1 class token + P patches

Each method is a function `(forward, weights, layer) -> maps (B, h, w)`, and a row of `METHODS`, at
the end. `forward` is a `ForwardPass`: the logits, and what `forward_features` returns on the way
(see `models.py`). So methods need no hooks, and several can share one pass. `weights` (B, C) choose
the score that is explained, the sum of weights × logits: 1 for a class; 1 and -1 for the difference
of two. `layer` counts as a list does: -1 is the last.
"""

import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from models import unwrap

GRID = 8  # cells along each side of an image, where maps are compared or parts hidden


@dataclasses.dataclass
class ForwardPass:
    """What a network computed for B images."""

    model: nn.Module
    images: torch.Tensor  # (B, 3, H, W), normalised
    logits: torch.Tensor  # (B, C)
    layers: dict[str, list[torch.Tensor]]  # the intermediates of `models.py`; {}: it has none

    def gradient(self, weights: torch.Tensor, of):
        """The gradient of the score by a tensor, or by each of a list of tensors.

        In eval mode images are independent, so one backward pass serves the whole batch.
        """
        with torch.inference_mode(False), torch.enable_grad():
            score = (weights.clone() * self.logits).sum()
        gradients = torch.autograd.grad(score, of, retain_graph=True)
        return gradients if isinstance(of, list) else gradients[0]


@contextlib.contextmanager
def undisturbed(model: nn.Module):
    """Eval mode and frozen parameters (faster); afterwards everything is as it was."""
    training = [module for module in model.modules() if module.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    for module in training:
        module.training = False
    for p in trainable:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for p in trainable:
            p.requires_grad_()


def forward_pass(model: nn.Module, images: torch.Tensor, *, graph: bool = True) -> ForwardPass:
    """Run a network in eval mode on images (B, 3, H, W). `graph`: record what gradients need."""
    model = unwrap(model)
    with undisturbed(model), torch.inference_mode(False), torch.set_grad_enabled(graph):
        images = images.clone() if images.is_inference() else images.detach()
        images.requires_grad_(graph)
        if not hasattr(model, "forward_features"):
            return ForwardPass(model, images, model(images), {})
        features, layers = model.forward_features(images, return_intermediates=True)
        return ForwardPass(model, images, model.forward_head(features), layers)


def attribute(model, images, targets, method="grad-cam", *, versus=None, layer=-1):
    """Maps (B, h, w) by one row of `METHODS`.

    The model, its mode, its gradients and the random state stay as they are.

    Args:
        model: any network that takes images and returns logits (B, C).
        images: (B, 3, H, W), normalised.
        targets: (B,), the classes to explain, as indices of the logits.
        method: a key of `METHODS`.
        versus: (B,), classes to compare with: explain the difference of the two logits.
        layer: the stage or block, from 0, or -1 for the last; ignored where there is no choice.
    """
    row = METHODS[method]
    forward = forward_pass(model, images, graph=row.gradients)
    return row.compute(forward, weights_of(targets, versus, forward.logits), layer).detach()


def weights_of(targets: torch.Tensor, versus: torch.Tensor | None, logits) -> torch.Tensor:
    """The weights of logits (B, C) that make a class's score, or the difference of two classes."""
    C = logits.shape[1]
    weights = F.one_hot(targets, C) - (0 if versus is None else F.one_hot(versus, C))
    return weights.to(logits)


# ---------------------------------------------------------------- maps


def patch_grid(patches: torch.Tensor) -> torch.Tensor:
    """Values of the patches (..., P), row by row, as a square grid (..., h, w)."""
    side = round(patches.shape[-1] ** 0.5)
    return patches.unflatten(-1, (side, side))


def token_map(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, D) without the class token, as a map (B, D, h, w)."""
    return patch_grid(tokens[:, 1:].transpose(1, 2))


def map_and_gradient(forward: ForwardPass, weights: torch.Tensor, layer: int):
    """A layer's features and the score's gradient by them, both (B, K, h, w).

    Features are a stage's map or, of a network without maps, the tokens that enter a block's
    attention. (At the last block's output the gradient by the patches is exactly 0.)
    """
    if "map" in forward.layers:
        A = forward.layers["map"][layer]
        return A, forward.gradient(weights, A)
    A = forward.layers["tokens"][layer]
    return token_map(A), token_map(forward.gradient(weights, A))


def grad_cam(forward: ForwardPass, weights: torch.Tensor, layer: int = -1) -> torch.Tensor:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391, eq. 1 and 2), without its ReLU.

    So values below 0 are evidence against the class, and no map is empty.
    """
    A, gradient = map_and_gradient(forward, weights, layer)
    alpha = gradient.mean((2, 3))  # eq. 1: (B, K)
    return torch.einsum("bk,bkhw->bhw", alpha, A)  # eq. 2


def layer_cam(forward: ForwardPass, weights: torch.Tensor, layer: int = -1) -> torch.Tensor:
    """LayerCAM (Jiang et al. 2021, IEEE TIP 30), without its last ReLU, which figures apply.

    Each cell has its own weights, so maps of early layers are useful too. Only what raises the
    score counts, so a value below 0 is not evidence against the class.
    """
    A, gradient = map_and_gradient(forward, weights, layer)
    return (gradient.relu() * A).sum(1)


# ---------------------------------------------------------------- attention


def class_token_maps(attention: torch.Tensor) -> torch.Tensor:
    """The class token's row of attention (..., N, N) over the patches, (..., h, w).

    In multiples of uniform attention: 1 is the weight that every token would have.
    """
    return patch_grid(attention[..., 0, 1:] * attention.shape[-1])


def last_attention(forward: ForwardPass, weights=None, layer: int = -1) -> torch.Tensor:
    """The class token's attention in a layer, mean of the heads; of no class."""
    return class_token_maps(forward.layers["attention"][layer].mean(1))


def rollout(attentions: list[torch.Tensor]) -> torch.Tensor:
    """Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928): (B, N, N), rows sum to 1.

    attentions: per layer (B, heads, N, N), the first layer first. Heads are averaged, and the
    shortcut around the attention counts as much as the attention: A <- (A + I) / 2.
    """
    total = identity = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for attention in attentions:
        total = (attention.mean(1) + identity) / 2 @ total
    return total


def attention_rollout(forward: ForwardPass, weights=None, layer=None) -> torch.Tensor:
    """The class token's row of the rollout; of no class.

    In multiples of what uniform attention in all L layers gives each patch: (1 - 1 / 2^L) / N.
    """
    attentions = forward.layers["attention"]
    return class_token_maps(rollout(attentions)) / (1 - 0.5 ** len(attentions))


def relevance(forward: ForwardPass, weights: torch.Tensor, layer=None) -> torch.Tensor:
    """Gradient-weighted attention (Chefer et al. 2021, arXiv 2103.15679, eq. 5 and 6): >= 0."""
    attentions = forward.layers["attention"]
    R = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for A, gradient in zip(attentions, forward.gradient(weights, attentions), strict=True):
        A = (gradient * A).relu_().mean(1)  # eq. 5: (B, N, N)
        R = R + A @ R  # eq. 6
    return patch_grid(R[:, 0, 1:])


# ---------------------------------------------------------------- any network


def input_x_gradient(forward: ForwardPass, weights: torch.Tensor, layer=None) -> torch.Tensor:
    """Input × gradient (Shrikumar et al. 2016, arXiv 1605.01713), summed over the colours."""
    return (forward.images * forward.gradient(weights, forward.images)).sum(1)  # (B, H, W)


@torch.no_grad()
def occlusion(forward: ForwardPass, weights: torch.Tensor, layer=None) -> torch.Tensor:
    """By how much the score falls when one of 8×8 cells gets the mean colour.

    (Zeiler and Fergus 2014, arXiv 1311.2901, sec. 4.2.) It needs 64 more forward passes.
    """
    cells = torch.eye(GRID**2, device=forward.images.device)
    cells = patch_grid(cells)[:, None, None]  # (64, 1, 1, 8, 8)
    drops = []
    with undisturbed(forward.model):
        for cell in cells:
            hidden = F.interpolate(cell, forward.images.shape[2:])  # nearest
            change = forward.logits - forward.model(forward.images * (1 - hidden))
            drops.append((weights * change).sum(1))
    return patch_grid(torch.stack(drops, dim=1))


# ---------------------------------------------------------------- of attention, positions, maps


def attention_statistics(forward: ForwardPass) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention distance in pixels and entropy in nats of each head, both (B, L, heads).

    Distance (Dosovitskiy et al. 2021, arXiv 2010.11929, app. D.7): how far apart the patches are,
    weighted by the attention among patches alone. Entropy is of all tokens; both are means over
    the queries.
    """
    attention = torch.stack(forward.layers["attention"], dim=1)  # (B, L, heads, N, N)
    patches, image_size = attention[..., 1:, 1:], forward.images.shape[-1]
    distance = patch_distances(patches.shape[-1], image_size).to(attention.device)
    patches = F.normalize(patches, p=1, dim=-1)
    entropy = torch.special.entr(attention).sum(-1)
    return (patches * distance).sum(-1).mean(-1), entropy.mean(-1)


def patch_distances(patches: int, image_size: int) -> torch.Tensor:
    """Distances (P, P) between the centres of square patches, in pixels."""
    side = round(patches**0.5)
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side)) * image_size / side
    return torch.cdist(places, places)


def position_similarity(positions: torch.Tensor) -> torch.Tensor:
    """Cosine similarities (h, w, h, w) of position embeddings (1, N, D), the class token's out."""
    unit = F.normalize(positions[0, 1:], dim=1)
    return (unit @ unit.T).reshape([round(len(unit) ** 0.5)] * 4)


def on_grid(maps: torch.Tensor, side: int = GRID) -> torch.Tensor:
    """Maps (B, h, w) on a common grid (B, side, side): means, or copies of larger cells."""
    return F.adaptive_avg_pool2d(maps[:, None], side)[:, 0]


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    """Spearman's rank correlation of the maps of each image, (B,); nan for a constant map."""
    from scipy.stats import rankdata  # takes long to import, and is needed for few commands

    ranks = (rankdata(maps.flatten(1).numpy(), axis=1) for maps in (a, b))
    a, b = (rank - rank.mean(1, keepdims=True) for rank in ranks)
    with np.errstate(invalid="ignore"):
        return (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))


# ---------------------------------------------------------------- the table


@dataclasses.dataclass(frozen=True)
class Method:
    """An attribution method, as `explain.py` and `faithfulness.py` use it."""

    compute: Callable  # (forward, weights, layer) -> maps (B, h, w)
    title: str
    needs: tuple[str, ...]  # any one of these intermediates suffices; (): logits suffice
    scale: str  # a key of `figures.SCALES`
    unit: str  # as it is written above maps
    default_with: str = ""  # used for networks that have this, unless --method says otherwise
    takes_target: bool = True  # whether the map is of one class
    takes_layer: bool = False
    gradients: bool = True


FEATURES, ATTENTION, NOTHING = ("map", "tokens"), ("attention",), ()
METHODS = {
    "grad-cam": Method(
        grad_cam, "Grad-CAM", FEATURES, "signed", "in logits", default_with="map", takes_layer=True
    ),
    "layer-cam": Method(layer_cam, "LayerCAM", FEATURES, "positive", "in logits", takes_layer=True),
    "attention": Method(
        last_attention, "attention", ATTENTION, "uniform", "1 is uniform", default_with="attention",
        takes_target=False, takes_layer=True, gradients=False,
    ),
    "rollout": Method(
        attention_rollout, "rollout", ATTENTION, "uniform", "1 is uniform",
        takes_target=False, gradients=False,
    ),
    "relevance": Method(
        relevance, "relevance", ATTENTION, "positive", "", default_with="attention"
    ),
    "occlusion": Method(
        occlusion, "occlusion", NOTHING, "signed", "in logits", gradients=False
    ),
    "input-x-gradient": Method(
        input_x_gradient, "input × gradient", NOTHING, "signed", "in logits"
    ),
}  # fmt: skip


def methods_for(model, image_size: int, layer: int = -1) -> tuple[list[str], dict[str, str]]:
    """The methods that are used for a network by default, and why others are not possible.

    One blank image tells. Of a network that offers nothing, the default is occlusion.
    """
    blank = torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device)
    forward, reasons = forward_pass(model, blank), {}
    for name, method in METHODS.items():
        found = [forward.layers[key] for key in method.needs if key in forward.layers]
        if method.needs and not found:
            reasons[name] = f"has no {' or '.join(method.needs)}"
        elif method.takes_layer and layer >= len(found[0]):
            reasons[name] = f"has {len(found[0])} layers"
        elif method.needs:
            try:
                maps = method.compute(forward, torch.ones_like(forward.logits), layer)
                if maps.shape[1:] == (1, 1):
                    reasons[name] = "has a map of one cell there"
            except RuntimeError:  # autograd finds no way from the logits to them
                reasons[name] = "has logits that do not depend on what the method needs"
    chosen = [name for name, method in METHODS.items()
              if method.default_with in forward.layers and name not in reasons]  # fmt: skip
    return chosen or ["occlusion"], reasons
