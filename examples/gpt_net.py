"""A small GPT on bytes; see docs/sequences.md."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.texts import LENGTH

HEADS = 4


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, HEADS, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class GPT(nn.Module):
    """(B, 256) bytes -> logits (B, 256, 256) of the byte after each.

    A position is embedded with the three bytes before it, for which it would learn to look first.
    """

    def __init__(self, width: int, depth: int, outputs: int = 256) -> None:
        super().__init__()
        self.embed = nn.ModuleList([nn.Embedding(256, width) for _ in range(4)])
        self.position = nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.blocks = nn.Sequential(*[Block(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedded(x))))

    def embedded(self, x: Tensor) -> Tensor:
        before = [F.pad(x, (back, 0))[:, :LENGTH] for back in range(len(self.embed))]
        each = [embed(bytes_) for embed, bytes_ in zip(self.embed, before, strict=True)]
        return self.position + sum(each)
