"""Changes of a network or of its training batches, for ablation.py: `change(model, batches)`."""

import itertools
import types

import torch
import torch.nn.functional as F
from common import DEVICE
from torch import nn

import models
import train_cnn
from batches import Batches


def activation(function):
    """Another activation for the CNN, which looks up `models.F.gelu` at each call."""

    def change(model, batches):  # ablation.py undoes it after the training
        models.F = types.SimpleNamespace(**vars(F) | {"gelu": function})

    return change


gelu, relu, silu = activation(F.gelu), activation(F.relu), activation(F.silu)


def whitened_stem(model, batches):
    train_cnn.whiten(model, next(iter(batches))[0])


def whitened_start(model, batches):
    """The stem starts as the whitening filters, and is trained."""
    whitened_stem(model, batches)
    model.stem.weight.requires_grad_(True)


def zero_last_norm(model, batches):
    """Residual blocks start as the identity (Goyal et al. 2017, sec. 5.1)."""
    for module in model.modules():
        if isinstance(module, models.ResidualBlock):
            nn.init.zeros_(module.norm2.weight)


class SqueezeExcitation(nn.Module):
    """Channels weighted by what is in the whole map (Hu et al. 2018, arXiv 1709.01507)."""

    def __init__(self, channels: int):
        super().__init__()
        self.squeeze = nn.Linear(channels, channels // 8)
        self.excite = nn.Linear(channels // 8, channels)

    def forward(self, x):
        weights = self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()
        return x * weights[:, :, None, None]


def squeeze_excitation(model, batches):
    for module in model.modules():
        if isinstance(module, models.ResidualBlock):
            scale = SqueezeExcitation(module.norm2.num_features).to(DEVICE)
            module.norm2 = nn.Sequential(module.norm2, scale)


def alternating_flip(model, batches):
    """Each image is mirrored in every second epoch; half of them, at random, in the first."""
    first = torch.rand(len(batches.split), generator=torch.Generator().manual_seed(0)) < 0.5
    epochs = itertools.count()
    begin, rows_of = Batches.__iter__, batches._on_device

    class Alternating(Batches):
        def __iter__(self):
            self.mirrored = first ^ bool(next(epochs) % 2)
            return begin(self)

        def _on_device(self, rows):
            images, labels = rows_of(rows)
            mirrored = self.mirrored[rows].to(images.device)[:, None, None, None]
            return torch.where(mirrored, images.flip(3), images), labels

    batches.flip, batches.__class__ = False, Alternating


class NormedAttention(models.Attention):
    """Queries and keys normalised per head (QK-norm, Dehghani et al. 2023, arXiv 2302.05442)."""

    def forward(self, x, return_attention: bool = False, queries: int | None = None):
        B, N, D = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (self.scale[i] * F.layer_norm(t, t.shape[-1:]) for i, t in enumerate((q, k)))
        q = q[:, :, :queries]
        attention = (q @ k.mT / (D // self.heads) ** 0.5).softmax(-1) if return_attention else None
        out = attention @ v if return_attention else F.scaled_dot_product_attention(q, k, v)
        out = self.project(out.transpose(1, 2).flatten(2))
        return (out, attention) if return_attention else out


def qk_norm(model, batches):
    for block in model.blocks:
        attention = block.attention
        attention.__class__ = NormedAttention
        width = attention.project.in_features // attention.heads
        attention.scale = nn.Parameter(torch.ones(2, 1, 1, width, device=DEVICE))


class LayerScale(nn.Module):
    """A learned factor per channel, small at first (Touvron et al. 2021, arXiv 2103.17239)."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x):
        return x * self.scale


def layer_scale(model, batches):
    for block in model.blocks:
        dim = block.attention.project.out_features
        for parent, name in ((block.attention, "project"), (block, "mlp")):
            scaled = nn.Sequential(getattr(parent, name), LayerScale(dim).to(DEVICE))
            setattr(parent, name, scaled)


@torch.no_grad()
def mimetic(model, batches):
    """Attention starts as if trained: q^T k near .7 I in each head, project after v near -.4 I.

    Trockman and Kolter 2023 (arXiv 2305.09828), sec. 3.
    """

    def factors(n, scale):  # of scale (I + noise), with singular values split
        noise = torch.randn(n, dim, dim, device=DEVICE) / dim**0.5
        u, s, vt = torch.linalg.svd(scale * (torch.eye(dim, device=DEVICE) + noise))
        return u * s.sqrt()[:, None], s.sqrt()[:, :, None] * vt

    for block in model.blocks:
        attention = block.attention
        dim, heads = attention.project.in_features, attention.heads
        q, k, v = attention.qkv.weight.view(3, heads, dim // heads, dim)
        left, right = factors(heads, 0.7)
        q.copy_(left.mT[:, : dim // heads])
        k.copy_(right[:, : dim // heads])
        left, right = factors(1, -0.4)
        attention.project.weight.copy_(left[0])
        v.copy_(right.view_as(v))
