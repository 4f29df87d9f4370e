"""Random small networks under random masks: no counterexample to exactness.

NEMO_EXAMPLES sets how many are tried (default 60, about a minute).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from nemo.cut import decompose
from tests.cut.helpers import random_masks, randomise
from tests.oracles.masked import masked_logits

EXAMPLES = int(os.environ.get("NEMO_EXAMPLES", "60"))


class Residual(nn.Module):
    def __init__(self, width: int, norm: bool, act: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=not norm)
        self.bn1 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(width, width, 1)
        self.bn2 = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = activate(self.act, self.bn1(self.conv1(x)))
        x = x + self.bn2(self.conv2(y))
        return F.relu(x, inplace=True)


class Grouped(nn.Module):
    """A grouped (or depthwise) convolution between two pointwise ones."""

    def __init__(self, width: int, groups: int, act: str) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, 8, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 16 if groups < 8 else 8, 3, padding=1, groups=groups)
        self.project = nn.Conv2d(16 if groups < 8 else 8, width, 1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.project(activate(self.act, self.conv(self.bn(self.expand(x)))))


class Dense(nn.Module):
    """Concatenation with a branch, then a norm over old and new channels."""

    def __init__(self, width: int, act: str) -> None:
        super().__init__()
        self.branch = nn.Conv2d(width, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(width + 3)
        self.fuse = nn.Conv2d(width + 3, width, 1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(activate(self.act, self.bn(torch.cat([x, self.branch(x)], 1))))


class Squeeze(nn.Module):
    def __init__(self, width: int, gate: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.reduce = nn.Conv2d(width, 4, 1)
        self.expand = nn.Conv2d(4, width, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * (torch.sigmoid(gate) if self.gate == "sigmoid" else F.hardsigmoid(gate))


class Attention(nn.Module):
    """Pre-norm attention and MLP over the pixels."""

    def __init__(self, width: int, heads: int, fused: bool, scale: bool) -> None:
        super().__init__()
        self.inner, self.heads, self.fused = 8, heads, fused
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * self.inner)
        self.proj = nn.Linear(self.inner, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 12)
        self.fc2 = nn.Linear(12, width)
        self.gamma = nn.Parameter(torch.rand(width) + 0.5) if scale else None

    def attend(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            y = weights.softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(b, n, self.inner))

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)
        y = self.attend(self.norm1(x))
        x = x + (y if self.gamma is None else y * self.gamma)
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x.transpose(1, 2).unflatten(2, (height, width))


class Gated(nn.Module):
    """A gated linear unit on channels, and a shuffle of two groups."""

    def __init__(self, width: int, act: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 8, 1)
        self.out = nn.Conv2d(4, width, 1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, 1)
        y = a * activate(self.act, b)
        n, c, h, w = y.shape
        return self.out(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Normed(nn.Module):
    """GroupNorm, or a LayerNorm over channels in front of a pointwise MLP."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm: nn.Module = nn.GroupNorm(groups, width) if groups else nn.LayerNorm(width)
        self.fc = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if isinstance(self.norm, nn.LayerNorm):
            return x + self.fc(F.silu(self.norm(y.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return x + self.fc(self.norm(y).movedim(1, -1)).movedim(-1, 1)


class Weights(nn.Module):
    """Two convolutions whose weights are computed or the same, or which are one."""

    def __init__(self, width: int, how: str, act: str) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, width, 3, padding=1)
        self.b = self.a if how == "one layer" else nn.Conv2d(width, width, 3, padding=1)
        if how == "tied":
            self.b.weight = self.a.weight
        elif how == "computed":
            weight_norm(self.a)
            weight_norm(self.b)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.b(activate(self.act, self.a(x)))


class PreActivation(nn.Module):
    """Two convolutions read by norms and by what adds them; with `shared`, it is one norm."""

    def __init__(self, width: int, shared: bool, affine: bool, act: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 1)
        self.norm1 = nn.BatchNorm2d(width, affine=affine)
        self.norm2 = self.norm1 if shared else nn.BatchNorm2d(width)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(activate(self.act, x))
        z = self.conv2(activate(self.act, self.norm1(y)))
        return y + z + self.norm2(z)


class Pool(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "max":
            return F.max_pool2d(x, 3, 1, 1)
        return F.avg_pool2d(x, 2, 1) if min(x.shape[2:]) > 2 else F.adaptive_avg_pool2d(x, 2)


def activate(name: str, x: Tensor) -> Tensor:
    functions = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "sigmoid": torch.sigmoid,
                 "hardswish": F.hardswish, "none": lambda t: t}  # fmt: skip
    return functions[name](x)


class Network(nn.Module):
    def __init__(self, width: int, blocks: list[nn.Module], tokens: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 4)
        self.tokens = tokens
        self.input_size = (3, 9, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(x.flatten(2)[..., 0] if self.tokens else x.mean((2, 3)))


@dataclass
class Case:
    width: int
    blocks: list[tuple[str, Any]]
    tokens: bool
    keep: float
    seed: int
    classes: list[int] | None

    def build(self) -> nn.Module:
        torch.manual_seed(self.seed)
        kinds = {"residual": Residual, "grouped": Grouped, "dense": Dense, "squeeze": Squeeze,
                 "attention": Attention, "gated": Gated, "normed": Normed,
                 "weights": Weights, "preactivation": PreActivation}  # fmt: skip
        blocks: list[nn.Module] = []
        for name, arguments in self.blocks:
            blocks.append(
                Pool(*arguments) if name == "pool" else kinds[name](self.width, *arguments)
            )
        return randomise(Network(self.width, blocks, self.tokens), self.seed)


ACTS = st.sampled_from(["relu", "gelu", "silu", "sigmoid", "hardswish", "none"])
BLOCKS = st.one_of(
    st.tuples(st.just("residual"), st.tuples(st.booleans(), ACTS)),
    st.tuples(st.just("grouped"), st.tuples(st.sampled_from([2, 4, 8]), ACTS)),
    st.tuples(st.just("dense"), st.tuples(ACTS)),
    st.tuples(st.just("squeeze"), st.tuples(st.sampled_from(["sigmoid", "hard"]))),
    st.tuples(
        st.just("attention"), st.tuples(st.sampled_from([1, 2, 4]), st.booleans(), st.booleans())
    ),
    st.tuples(st.just("gated"), st.tuples(ACTS)),
    st.tuples(st.just("normed"), st.tuples(st.sampled_from([0, 1, 2]))),
    st.tuples(
        st.just("weights"), st.tuples(st.sampled_from(["computed", "tied", "one layer"]), ACTS)
    ),
    st.tuples(st.just("preactivation"), st.tuples(st.booleans(), st.booleans(), ACTS)),
    st.tuples(st.just("pool"), st.tuples(st.sampled_from(["max", "avg"]))),
)
CASES = st.builds(
    Case,
    width=st.sampled_from([4, 6, 10]),
    blocks=st.lists(BLOCKS, min_size=1, max_size=4),
    tokens=st.booleans(),
    keep=st.sampled_from([0.15, 0.4, 0.7, 0.9]),
    seed=st.integers(0, 1000),
    classes=st.sampled_from([None, [2], [3, 0]]),
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 100,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # a case is short enough as it is
    suppress_health_check=[HealthCheck.too_slow],
)
@given(CASES)
def test_random_networks_decompose_exactly(case: Case) -> None:
    model = case.build().double()
    masks = random_masks(model, case.keep, case.seed, every=True)
    module = decompose(model, masks, case.classes)
    images = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(1)).double()
    expected = masked_logits(model, masks, images)
    expected = expected if case.classes is None else expected[:, case.classes]
    with torch.no_grad():
        actual = module(images)
    assert (actual - expected).abs().max() <= 1e-11 * (1 + expected.abs().max())
    shared = [b for b in case.blocks if b[0] == "weights" and b[1][0] != "computed"]  # cut apart
    assert shared or module.report["parameters"] <= module.report["parent_parameters"] + 16
