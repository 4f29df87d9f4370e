"""Small networks around one op each: exact, saved and loaded, and cut where they can be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nemo
from nemo.cut import decompose
from tests.cut.helpers import assert_same, randomise

WIDTH = 12


class Network(nn.Module):
    """A masked convolution, `middle` on its (B, 12, 8, 8) maps, their mean, a classifier."""

    def __init__(self, middle: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.middle = middle
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self.conv(x))
        result: Tensor = self.head(y.flatten(2).mean(2))
        return result


class Normed(nn.Module):
    """A LayerNorm over channels, windows, and a Linear that reads them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.permute(0, 2, 3, 1)).roll((1, 1), (1, 2))
        y = y.reshape(-1, 2, 4, 2, 4, WIDTH).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, WIDTH)
        y = F.gelu(self.fc(y))
        return y.reshape(-1, 64, WIDTH).transpose(1, 2)


class Padded(nn.Module):
    """The same before a convolution that pads, which sees zeros that no norm wrote."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, WIDTH)
        self.fc = nn.Conv2d(WIDTH, WIDTH, 3, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.fc(self.norm(x)))


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool, bias: bool, layers: int, projected: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.lstm = nn.LSTM(
            WIDTH, 4, layers, bias, batch_first, bidirectional=True, proj_size=projected
        )
        self.first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.flatten(2).transpose(1, 2))
        y = self.lstm(y if self.first else y.transpose(0, 1))[0]
        return (y if self.first else y.transpose(0, 1)).transpose(1, 2)


class Shared(nn.Module):
    """One Linear, called twice on what the same channels are zero of."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        return (self.fc(y) + self.fc(y.flip(1))).permute(0, 3, 1, 2)


class TwiceRead(nn.Module):
    """A fused projection whose parts are read twice each, whole and in pieces."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.qkv(x.flatten(2).transpose(1, 2)).reshape(-1, 64, 3, 2, 6).permute(2, 0, 3, 1, 4)
        q, k, v = y.unbind(0)
        y = q @ (k.softmax(2).transpose(-1, -2) @ v) + F.pad(
            q[:, :, 1:] * v[:, :, 1:], (0, 0, 1, 0)
        )
        return y.transpose(1, 2).reshape(-1, 64, WIDTH).transpose(1, 2)


class Casts(nn.Module):
    """float32 inside, whatever the model's type: what linear attention of timm does."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.float().relu() * 2).to(x.dtype) + x.mul(3).type_as(x)


class Of(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def windows(x: Tensor) -> Tensor:
    return x.unfold(2, 4, 2).unfold(3, 4, 2).flatten(2)


def patches(x: Tensor) -> Tensor:
    return F.fold(F.unfold(x, 3, padding=1).relu(), (8, 8), 3, padding=1)


def shuffled(x: Tensor) -> Tensor:
    order = torch.tensor([3, 1, 0, 2, 7, 5, 6, 4])
    return x.index_select(-1, order) * x


def narrowed(x: Tensor) -> Tensor:
    return x.narrow(2, -3, 3) * x.narrow(2, 1, 3)


def sums(x: Tensor) -> Tensor:
    return torch.addcmul(x, x, x.sigmoid())


MASK = torch.tensor([True, False, False, True] * 3)


def check(middle: nn.Module, masks: dict[str, Tensor], folder: Path, width: int = WIDTH) -> Any:
    """Cut, compare, save and load; the module."""
    torch.manual_seed(0)
    model = randomise(Network(middle, width))
    module = decompose(model, masks, example=torch.zeros(2, 3, 32, 32))
    assert module.certificate["error"] < 1e-9
    assert not module.certificate["vacuous"]
    assert_same(model, module, masks)
    nemo.save(module, folder / "module")
    assert_same(model, nemo.load(folder / "module"), masks)
    return module


@pytest.mark.parametrize("bias", [True, False])
def test_dead_channels_of_a_layer_norm_are_one_column(bias: bool, tmp_path: Path) -> None:
    module = check(Normed(bias), {"conv": MASK}, tmp_path)
    assert module.middle_fc.weight.shape == (WIDTH, int(MASK.sum()) + 1)


@pytest.mark.parametrize(("padding", "columns"), [(0, 7), (1, WIDTH)])
def test_dead_channels_stay_where_zeros_are_padded(
    padding: int, columns: int, tmp_path: Path
) -> None:
    module = check(Padded(padding), {"conv": MASK}, tmp_path)
    assert module.middle_fc.weight.shape[1] == columns


class Sequence(nn.Module):
    """A GroupNorm of one group over (B, C, L), and a Linear over its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.GroupNorm(1, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x.flatten(2)).transpose(1, 2)).transpose(1, 2)


class Filled(nn.Module):
    """A LayerNorm whose channels are padded with a value that is none of its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(WIDTH), nn.Linear(WIDTH + 1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(self.norm(x.flatten(2).transpose(1, 2)), (0, 1), value=2.0)
        return self.fc(y).transpose(1, 2)


@pytest.mark.parametrize(("middle", "columns"), [(Sequence, 7), (Filled, WIDTH + 1)])
def test_dead_channels_of_other_shapes(
    middle: type[nn.Module], columns: int, tmp_path: Path
) -> None:
    module = check(middle(), {"conv": MASK}, tmp_path)
    assert module.middle_fc.weight.shape[1] == columns


@pytest.mark.parametrize(
    ("first", "bias", "layers", "projected", "columns"),
    [
        (True, True, 1, 0, 7),
        (False, True, 2, 0, 7),
        (True, False, 1, 0, WIDTH),
        (True, True, 1, 3, 7),
        (False, False, 2, 3, WIDTH),
    ],
)
def test_lstms_read_fewer_channels(
    first: bool, bias: bool, layers: int, projected: int, columns: int, tmp_path: Path
) -> None:
    middle, width = Recurrent(first, bias, layers, projected), 2 * (projected or 4)
    module = check(middle, {"conv": MASK}, tmp_path, width)
    assert module.middle_lstm_weight_ih_l0.value.shape == (16, columns)


def test_shared_layers_stay_shared(tmp_path: Path) -> None:
    module = check(Shared(), {"conv": MASK, "middle.fc": MASK}, tmp_path)
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    assert [m.weight.shape for m in linears] == [(6, 6), (5, 6)]


def test_projections_that_are_read_twice_are_split(tmp_path: Path) -> None:
    off = {"middle.q": [0, 6], "middle.k": [3, 9], "middle.v": [2, 8]}  # in both heads
    masks = {layer: torch.ones(WIDTH, dtype=torch.bool) for layer in off}
    for layer, channels in off.items():
        masks[layer][channels] = False
    module = check(TwiceRead(), masks, tmp_path)
    widths = [m.weight.shape[0] for m in module.modules() if isinstance(m, nn.Linear)]
    assert widths == [10, 8, 10, 5]


@pytest.mark.parametrize("function", [windows, patches, shuffled, narrowed, sums])
def test_rearrangements_keep_few_channels(
    function: Callable[[Tensor], Tensor], tmp_path: Path
) -> None:
    module = check(Of(function), {"conv": MASK}, tmp_path)
    assert module.report["blocked"] == []
    assert module.conv.weight.shape[0] == 6
    assert module.head.weight.shape == (5, 6)


class PositionBias(nn.Module):
    """A bias per position and channel that an MLP makes of coordinates, without any image."""

    coords: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, WIDTH))
        self.register_buffer("coords", torch.linspace(-1, 1, 128).view(64, 2))

    def forward(self, x: Tensor) -> Tensor:
        bias: Tensor = self.mlp(self.coords)
        return x + bias.view(-1, WIDTH).permute(1, 0).reshape(1, WIDTH, 8, 8)


def test_layers_that_see_no_image_are_cut_too(tmp_path: Path) -> None:
    bias = torch.arange(8) % 2 == 0
    check(PositionBias(), {"conv": MASK, "middle.mlp.0": bias}, tmp_path)


def test_casts_follow_the_type_of_the_images(tmp_path: Path) -> None:
    module = check(Casts(), {"conv": MASK}, tmp_path)
    images = torch.zeros(1, 3, 32, 32)
    assert module(images).dtype == torch.float32
    assert module.double()(images.double()).dtype == torch.float64


def test_products_of_matrices(tmp_path: Path) -> None:
    other = torch.rand(64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    middle = Of(lambda x: (x.reshape(-1, 64) @ other.to(x.dtype)).reshape(-1, WIDTH, 8, 8))
    check(middle, {"conv": MASK}, tmp_path)
