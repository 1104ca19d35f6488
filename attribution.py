"""Attribution methods: which parts of an image a network uses.

    B batch   K feature channels   h, w feature map   N tokens = 1 class token + P patches
    L layers  heads

Each method is a function `(model, images, targets) -> maps (B, h, w)`, and a row of `METHODS`, the
table at the end. images (B, 3, H, W), normalised; targets (B,), the classes to explain. The model
is in eval mode; nothing of it is changed. Methods read what `forward_features` returns (see
`models.py`), so they need no hooks and no second copy of a network's forward.
"""

import dataclasses
from collections.abc import Callable

import torch


def intermediates_of(model, images: torch.Tensor) -> dict:
    """What `forward_features` returns beside the features."""
    return model.forward_features(images, return_intermediates=True)[1]


def patch_grid(patches: torch.Tensor) -> torch.Tensor:
    """Values of the patches (..., P), row by row, as a square grid (..., h, w)."""
    side = round(patches.shape[-1] ** 0.5)
    return patches.unflatten(-1, (side, side))


def token_map(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens (B, 1 + P, D) without the class token, as a map (B, D, h, w)."""
    return patch_grid(tokens[:, 1:].transpose(1, 2))


@torch.enable_grad()
def grad_cam(model, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391, eq. 1 and 2): maps (B, h, w), >= 0.

    A is the last feature map or, for a network without one, the tokens that enter its last
    attention, laid out as a map.
    """
    features, intermediates = model.forward_features(images, return_intermediates=True)
    A = intermediates["map" if "map" in intermediates else "tokens"][-1]
    logits = model.forward_head(features)  # (B, C)
    score = logits.gather(1, targets[:, None]).sum()  # images are independent: one backward
    (gradient,) = torch.autograd.grad(score, A)
    if "map" not in intermediates:
        A, gradient = token_map(A), token_map(gradient)
    alpha = gradient.mean((2, 3), keepdim=True)  # eq. 1: (B, K, 1, 1)
    return (alpha * A).sum(1).relu().detach()  # eq. 2


@torch.no_grad()
def attention_maps(model, images: torch.Tensor) -> torch.Tensor:
    """The class token's attention to the patches: (B, L, heads, h, w)."""
    attention = torch.stack(intermediates_of(model, images)["attention"], dim=1)
    rows = attention[:, :, :, 0, 1:]  # of (B, L, heads, N, N): (B, L, heads, P)
    return patch_grid(rows)


def last_attention(model, images: torch.Tensor, targets=None) -> torch.Tensor:
    """The class token's attention in the last layer, mean of the heads: (B, h, w), of no class."""
    return attention_maps(model, images)[:, -1].mean(1)


def rollout(attentions: list[torch.Tensor]) -> torch.Tensor:
    """Attention rollout (Abnar and Zuidema 2020, arXiv 2005.00928): (B, N, N), rows sum to 1.

    attentions: per layer (B, heads, N, N), the first layer first. Heads are averaged, and the
    shortcut around the attention counts as much as the attention: A <- (A + I) / 2.
    """
    total = torch.eye(attentions[0].shape[-1], device=attentions[0].device)
    for attention in attentions:
        A = attention.mean(1)  # (B, N, N)
        A = (A + torch.eye(A.shape[-1], device=A.device)) / 2
        total = A @ total
    return total


@torch.no_grad()
def attention_rollout(model, images: torch.Tensor, targets=None) -> torch.Tensor:
    """The class token's row of the rollout, over the patches: (B, h, w), of no class."""
    return patch_grid(rollout(intermediates_of(model, images)["attention"])[:, 0, 1:])


@torch.enable_grad()
def input_x_gradient(model, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Input × gradient (Shrikumar et al. 2016, arXiv 1605.01713), summed over the channels.

    Signed: > 0 speaks for the class, < 0 against it. It needs nothing but `forward`.
    """
    images = images.detach().requires_grad_()
    score = model(images).gather(1, targets[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, images)
    return (images * gradient).sum(1).detach()  # (B, H, W)


@dataclasses.dataclass(frozen=True)
class Method:
    """An attribution method, as `explain.py` uses it."""

    compute: Callable  # (model, images, targets) -> maps (B, h, w)
    title: str
    needs: frozenset[str]  # any one of these intermediates suffices; empty: needs `forward` only
    takes_target: bool = False  # whether the map is of one class
    signed: bool = False  # whether values below 0 speak against the class


METHODS = {
    "grad-cam": Method(grad_cam, "Grad-CAM", frozenset({"map", "tokens"}), takes_target=True),
    "attention": Method(last_attention, "attention, last layer", frozenset({"attention"})),
    "rollout": Method(attention_rollout, "rollout", frozenset({"attention"})),
    "input-x-gradient": Method(
        input_x_gradient, "input × gradient", frozenset(), takes_target=True, signed=True
    ),
}


@torch.no_grad()
def methods_for(model, image_size: int, wanted: list[str] | None = None) -> list[str]:
    """The methods that a network can be explained by, in the order of the table.

    One blank image tells which intermediates it offers. Without `wanted`:
    input × gradient only where nothing else is possible.
    """
    offered = set()
    if hasattr(model, "forward_features"):
        blank = torch.zeros(1, 3, image_size, image_size, device=next(model.parameters()).device)
        offered = set(intermediates_of(model, blank))
    possible = [name for name, m in METHODS.items() if not m.needs or m.needs & offered]
    if wanted:
        return [name for name in possible if name in wanted]
    return [name for name in possible if METHODS[name].needs] or possible
