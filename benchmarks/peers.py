"""The networks that ours are compared with, written from their descriptions."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn


class NotebookCNN(nn.Sequential):
    """The notebook's CNN: five 3×3 convolutions, 559,178 parameters."""

    def __init__(self, classes: int = 10):
        def convolution(ins, outs):
            return nn.Conv2d(ins, outs, 3, padding=1), nn.BatchNorm2d(outs), nn.ReLU()

        super().__init__(
            *convolution(3, 64), *convolution(64, 64), nn.MaxPool2d(2), nn.Dropout(0.25),
            *convolution(64, 128), *convolution(128, 128), nn.MaxPool2d(2), nn.Dropout(0.25),
            *convolution(128, 256), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Dropout(0.5), nn.Linear(256, classes),
        )  # fmt: skip


class NotebookViT(nn.Module):
    """The notebook's ViT: 192 wide, 6 deep, 6 heads, MLP ×4, dropout .2, 2.7M parameters."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.patchify, self.norm_in = nn.Conv2d(3, 192, 4, stride=4), nn.LayerNorm(192)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, 192))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 65, 192))
        self.dropout = nn.Dropout(0.2)
        layer = nn.TransformerEncoderLayer(
            192, 6, 768, dropout=0.2, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 6, nn.LayerNorm(192), enable_nested_tensor=False)
        self.head = nn.Linear(192, classes)

    def forward(self, x):
        """Images (B, 3, 32, 32) -> logits (B, C)."""
        x = self.norm_in(self.patchify(x).flatten(2).transpose(1, 2))
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.blocks(self.dropout(x))[:, 0])


class ResNet20(nn.Module):
    """ResNet-20 for CIFAR: 269,722 parameters (He et al. 2016, arXiv 1512.03385, sec. 4.2).

    Shortcuts have no parameters: every second pixel, and zeros for new channels.
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16))
        widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(ins, outs, 3, 1 + (ins < outs), 1, bias=False), nn.BatchNorm2d(outs),
                nn.ReLU(), nn.Conv2d(outs, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs),
            )
            for ins, outs in itertools.pairwise(widths)
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        """Images (B, 3, H, W) -> logits (B, C)."""
        x = F.relu(self.stem(x))
        for block in self.blocks:
            y = block(x)
            if y.shape != x.shape:
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, y.shape[1] - x.shape[1]))
            x = F.relu(x + y)
        return self.head(x.mean((2, 3)))


class TutorialBlock(nn.Module):
    """Attention, then an MLP, each after a layer norm. Dropout of .2 is in the MLP alone."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(256)
        self.attention = nn.MultiheadAttention(256, 8, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(256), nn.Linear(256, 512), nn.GELU(), nn.Dropout(0.2),
            nn.Linear(512, 256), nn.Dropout(0.2),
        )  # fmt: skip

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y)[0]
        return x + self.mlp(x)


class TutorialViT(nn.Module):
    """The ViT of the UvA deep learning tutorials, no. 15: 256 wide, 6 deep, 8 heads, 3.2M."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.patchify = nn.Conv2d(3, 256, 4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, 1, 256))
        self.positions = nn.Parameter(torch.randn(1, 65, 256))
        self.dropout = nn.Dropout(0.2)
        self.blocks = nn.Sequential(*(TutorialBlock() for _ in range(6)))
        self.head = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, classes))

    def forward(self, x):
        """Images (B, 3, 32, 32) -> logits (B, C)."""
        x = self.patchify(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.blocks(self.dropout(x))[:, 0])
