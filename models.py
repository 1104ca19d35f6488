"""The two networks, written out: a residual CNN and a Vision Transformer.

    B batch   C channels   H, W image height and width   K feature channels   h, w feature map
    N tokens = 1 class token + P patches   D width   heads   hd = D / heads, head width

Both have `forward(x) = forward_head(forward_features(x))`. Explanations read what a network
computes on the way: `forward_features(x, return_intermediates=True)` returns `(features, dict)`.
The dict has any of these keys, each a list with one tensor per layer, the first layer first, with
its graph attached:

    "map"        feature maps (B, K, h, w)
    "attention"  attention (B, heads, N, N), all of one shape; token 0 is the class token
    "tokens"     tokens (B, N, D); token 0 is the class token

A network of your own needs the two methods and a line in `MODELS`, at the end of this file.
"""

import contextlib
import inspect

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.ops import StochasticDepth


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with batch norm, and a shortcut around them (He et al. 2016, fig. 2)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x):  # (B, K, h, w) -> (B, K, h, w)
        y = F.gelu(self.norm1(self.conv1(x)))
        return F.gelu(x + self.norm2(self.conv2(y)))


class Stage(nn.Module):
    """A 3×3 convolution to `channels`, 2×2 max pooling, then residual blocks."""

    def __init__(self, in_channels: int, channels: int, depth: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(depth)))

    def forward(self, x):  # (B, in_channels, h, w) -> (B, channels, h / 2, w / 2)
        x = F.gelu(self.norm(F.max_pool2d(self.conv(x), 2)))
        return self.blocks(x)


class CNN(nn.Module):
    """A residual network: stem, stages that each halve the image, global average pooling, linear.

    Only averaging and one linear layer follow the last map. So a logit is the sum of what each of
    the map's cells contributes, plus the bias (Zhou et al. 2016, arXiv 1512.04150, eq. 2).

    Args:
        classes: number of classes C.
        image_size: side of the square image in pixels.
        stem: channels of the first convolution, at full resolution.
        widths: channels of each stage; two stages make an 8×8 map of a 32×32 image.
        depths: residual blocks of each stage.

    Raises ValueError: widths and depths that do not describe a network.
    """

    def __init__(
        self,
        *,
        classes: int = 10,
        image_size: int = 32,
        stem: int = 16,
        widths: tuple[int, ...] = (48, 112),
        depths: tuple[int, ...] = (1, 2),
    ):
        super().__init__()
        if len(widths) != len(depths) or not widths:
            raise ValueError(
                f"widths has {len(widths)} numbers, depths {len(depths)}: give one each per stage"
            )
        if min(classes, stem, *widths) < 1 or min(depths) < 0:
            raise ValueError("classes, stem and widths must be at least 1, depths at least 0")
        if image_size < 2 ** (len(widths) + 1):
            raise ValueError(
                f"widths: {len(widths)} stages, each halving the image, are too many for "
                f"{image_size} pixels; use fewer"
            )
        self.stem = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(stem)
        ins = (stem, *widths[:-1])
        self.stages = nn.ModuleList(map(Stage, ins, widths, depths))
        self.head = nn.Linear(widths[-1], classes)

    def forward_features(self, x, return_intermediates: bool = False):
        """(B, 3, H, W) -> the last map (B, K, h, w); the intermediates are each stage's output."""
        x = F.gelu(self.stem_norm(self.stem(x)))  # (B, stem, H, W)
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return (x, {"map": maps}) if return_intermediates else x

    def forward_head(self, x):
        """The last map (B, K, h, w) -> logits (B, C)."""
        return self.head(x.mean((2, 3)))

    def forward(self, x):
        """Images (B, 3, H, W) -> logits (B, C)."""
        return self.forward_head(self.forward_features(x))


class Attention(nn.Module):
    """Multi-head self-attention, softmax(q k^T / sqrt(hd)) v (Vaswani et al. 2017, eq. 1).

    Raises ValueError: `heads` does not divide `dim`.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads {heads} does not divide dim {dim}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)

    def forward(self, x, return_attention: bool = False, queries: int | None = None):
        """(B, N, D) -> (B, N, D); if asked, also the attention (B, heads, N, N), rows sum to 1.

        `queries`: compute only the first `queries` tokens; the others supply keys and values only.
        """
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, hd)
        q = q[:, :, :queries]
        # In bfloat16 on a CPU the fused kernel's backward is slow: 43% of a training step, N = 65.
        slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and N <= 128
        if return_attention or slow:
            scores = q / (D // self.heads) ** 0.5 @ k.transpose(-2, -1)  # (B, heads, N, N)
            attention = scores.softmax(dim=-1)
            out = attention @ v
        else:  # the same without keeping the (N, N) matrix: faster, less memory
            out = F.scaled_dot_product_attention(q, k, v)
        out = self.project(out.transpose(1, 2).flatten(2))  # heads side by side again
        return (out, attention) if return_attention else out


class Block(nn.Module):
    """One transformer layer, normalised before each half: attention, then a two-layer MLP.

    In training each half is skipped with probability `drop_path`, and scaled up where it is not:
    stochastic depth (Huang et al. 2016, arXiv 1603.09382), drawn for each image as in torchvision.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float = 0.0):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.drop_path = StochasticDepth(drop_path, mode="row")

    def forward(self, x, return_intermediates: bool = False, queries: int | None = None):
        """(B, N, D) -> (B, N, D), or the first `queries` of the tokens."""
        tokens = self.norm1(x)
        if return_intermediates:
            out, attention = self.attention(tokens, return_attention=True)
        else:
            out, attention = self.attention(tokens, queries=queries), None
        x = x[:, :queries] + self.drop_path(out)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        return (x, attention, tokens) if return_intermediates else x


def sine_positions(grid: int, dim: int) -> torch.Tensor:
    """Where each token is, as sines and cosines of its row and column: (1, 1 + grid², dim).

    A quarter of the width each for sin(y f), cos(y f), sin(x f), cos(x f), with frequencies f
    from 1 down to nearly 1 / 10,000 (Vaswani et al. 2017, sec. 3.5; in two dimensions Beyer et al.
    2022, arXiv 2205.01580). The class token, which is nowhere, has zeros.
    """
    f = 10_000 ** (-torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    y, x = y.flatten()[:, None] * f, x.flatten()[:, None] * f  # (P, dim / 4)
    patches = torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=1)
    return torch.cat([torch.zeros(1, dim), patches])[None]


class ViT(nn.Module):
    """A Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929, eq. 1 to 4).

    Args:
        classes: number of classes C.
        image_size: side of the square image in pixels.
        patch_size: side of a patch in pixels; it must divide `image_size`.
        dim: width D of a token; `heads` must divide it.
        depth: number of blocks.
        heads: attention heads in each block.
        mlp_ratio: width of the hidden layer of each MLP, as a multiple of `dim`.
        drop_path: probability that the last block's attention or MLP is skipped for an image in
            training; it grows linearly from 0 in the first block.
        patch_dropout: fraction of the patches that each image loses at random in training, so that
            fewer tokens are computed (Liu et al. 2023, arXiv 2208.07220).

    Raises ValueError: arguments that do not describe a network.
    """

    def __init__(
        self,
        *,
        classes: int = 10,
        image_size: int = 32,
        patch_size: int = 4,
        dim: int = 192,
        depth: int = 6,
        heads: int = 6,
        mlp_ratio: float = 2.0,
        drop_path: float = 0.0,
        patch_dropout: float = 0.0,
    ):
        super().__init__()
        if not 0 < patch_size <= image_size or image_size % patch_size:
            raise ValueError(
                f"patch_size {patch_size} does not divide an image of {image_size} pixels"
            )
        if dim < 4 or dim % 4:
            raise ValueError(f"dim {dim} is not a positive multiple of 4")
        if min(classes, depth, dim * mlp_ratio) < 1:
            raise ValueError("classes, depth, dim × mlp_ratio must be at least 1")
        self.grid = image_size // patch_size  # P = grid × grid
        self.patches_in_training = max(1, round((1 - patch_dropout) * self.grid**2))
        self.patchify = nn.Conv2d(3, dim, patch_size, stride=patch_size)  # a linear map per patch
        # Weight decay spares both by these names: see optimizers.py.
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(sine_positions(self.grid, dim))  # learned from there on
        self.blocks = nn.ModuleList(
            Block(dim, heads, mlp_ratio, drop_path * i / max(depth - 1, 1)) for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5 / 2)
                nn.init.zeros_(module.bias)

    def forward_features(self, x, return_intermediates: bool = False, keep=None):
        """(B, 3, H, W) -> the class token (B, 1, D), normalised.

        With intermediates it is followed by the patches: (B, N, D). Without them the last block
        computes the class token alone, since nothing else reaches the logits.

        `keep` (B, n): indices of the patches to use; the others are left out.

        The intermediates are each block's attention (B, heads, N, N), and the tokens (B, N, D) that
        enter it. The tokens that leave the last block are not among them: the logits do not depend
        on its patches.
        """
        x = self.patchify(x)  # (B, D, grid, grid)
        if x.shape[2:] != (self.grid, self.grid):  # 4×16 patches would be as many as 8×8
            h, w = x.shape[2:]
            raise ValueError(f"takes {self.grid}×{self.grid} patches, not {h}×{w}")
        x = x.flatten(2).transpose(1, 2)  # (B, P, D)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)  # (B, N, D)
        x = x + self.positions
        if self.training and keep is None and self.patches_in_training < self.grid**2:
            keep = torch.rand(len(x), self.grid**2, device=x.device).argsort(dim=1)
            keep = keep[:, : self.patches_in_training]
        if keep is not None:
            tokens = F.pad(keep + 1, (1, 0))  # (B, 1 + n); the class token is token 0
            x = x.gather(1, tokens[:, :, None].expand(-1, -1, x.shape[2]))
        intermediates = {"attention": [], "tokens": []}
        for block in self.blocks:
            if return_intermediates:
                x, attention, tokens = block(x, return_intermediates=True)
                intermediates["attention"].append(attention)
                intermediates["tokens"].append(tokens)
            else:
                x = block(x, queries=1 if block is self.blocks[-1] else None)
        x = self.norm(x)
        return (x, intermediates) if return_intermediates else x

    def forward_head(self, x):
        """Tokens (B, N, D) -> logits (B, C), from the class token alone."""
        return self.head(x[:, 0])

    def forward(self, x):
        """Images (B, 3, H, W) -> logits (B, C)."""
        return self.forward_head(self.forward_features(x))


MODELS = {"cnn": CNN, "vit": ViT}  # the registry: a checkpoint stores the name and the arguments


def build_model(name: str, config: dict) -> nn.Module:
    """The network that the registry calls `name`, with the constructor arguments `config`.

    Raises ValueError: an unknown name, or arguments that do not describe a network.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: models.MODELS has {', '.join(MODELS)}")
    return MODELS[name](**config)


def model_arguments(name: str, flags: dict) -> dict:
    """Those of the flags that the constructor of network `name` takes; none if it is unknown."""
    arguments = inspect.signature(MODELS.get(name, object)).parameters
    return {key: flags[key] for key in arguments if key in flags}


def network_defaults(name: str) -> dict:
    """The constructor arguments of network `name` that have a default; tuples as lists."""
    parameters = inspect.signature(MODELS[name]).parameters.items()
    known = {key: p.default for key, p in parameters if p.default is not inspect.Parameter.empty}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in known.items()}


def count_parameters(model: nn.Module) -> int:
    """The number of parameters, frozen ones included."""
    return sum(p.numel() for p in model.parameters())


@contextlib.contextmanager
def counting_operations():
    """A `FlopCounterMode` of what the block computes.

    Attention is two matrix products there, because the fused one is not counted on a CPU.
    """
    from torch.utils.flop_counter import FlopCounterMode  # takes half a second

    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def count_multiply_adds(model: nn.Module, image: torch.Tensor) -> int:
    """Multiply-adds of a forward pass of one image (1, 3, H, W)."""
    with torch.no_grad(), counting_operations() as counter:
        model(image)
    return counter.get_total_flops() // 2


@torch.enable_grad()
def check_intermediates(network: nn.Module, image: torch.Tensor) -> None:
    """Check what a network offers to `explain.py`; see the top of this file.

    Raises ValueError: it differs from that description, or `forward` is not
    `forward_head(forward_features(x))`.
    """
    if not hasattr(network, "forward_features"):
        return
    if not hasattr(network, "forward_head"):
        raise ValueError("it has forward_features, but no forward_head: define both")
    features, found = network.forward_features(image, return_intermediates=True)
    for key, tensors in found.items():
        if key not in ("map", "attention", "tokens"):
            raise ValueError(f"unknown intermediates {key!r}: use map, attention or tokens")
        if not isinstance(tensors, list) or not tensors or not all(map(torch.is_tensor, tensors)):
            raise ValueError(f"intermediates {key!r} are not a list of tensors, one per layer")
        if key == "attention" and len({tensor.shape for tensor in tensors}) > 1:
            raise ValueError(f"intermediates {key!r} differ in shape from layer to layer")
        patches = tensors[-1].shape[-1 if key == "attention" else 1] - 1
        if key != "map" and round(patches**0.5) ** 2 != patches:
            raise ValueError(f"{key!r} must have a class token and a square number of patches")
        if not tensors[-1].requires_grad and any(p.requires_grad for p in network.parameters()):
            raise ValueError(f"intermediates {key!r} are detached")
    if not torch.allclose(network.forward_head(features), network(image), rtol=1e-2, atol=1e-3):
        raise ValueError("forward(x) is not forward_head(forward_features(x))")


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile's
            model = model._orig_mod
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model
