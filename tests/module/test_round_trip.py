"""What `save` writes, `load` reads: networks of many kinds of layers, names and ops."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo.cut import decompose
from nemo.module.files import load, save
from tests.oracles.masked import masked_logits

SIZE = (3, 16, 16)


class Net(nn.Module):
    """Two convolutions, of which the second is masked; a body; a classifier."""

    def __init__(self, body: Any, width: int, **layers: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.body, self.layers = body, nn.ModuleDict(layers)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.a(x)))
        return self.fc(self.body(self.layers, x))


def lines(x: Tensor) -> Tensor:
    """(B, 8, 16, 16) as 16 steps of 128 channels."""
    return x.permute(0, 3, 1, 2).flatten(2)


def halves(x: Tensor) -> Tensor:
    left, right = x.flatten(1).split([1024, 1024], 1)
    return torch.where(left > 0.1, left, 0.0) + torch.logical_and(left > 0, right > 0).to(x.dtype)


def assigned(x: Tensor) -> Tensor:
    """Rows and whole tensors of constants, which neurons that are off get, too."""
    x = torch.relu(x)
    x[:, :, 0] = 0.5
    return x * x.sigmoid().fill_(2) + x.exp().fill_(0.25)


def of_the_batch(x: Tensor) -> Tensor:
    """Pieces of twice the batch, and a number that is made of its size."""
    twice = torch.cat([x, x.flip(2)])
    left, right = twice.tensor_split(2)
    part = twice.narrow(0, x.shape[0], x.shape[0])
    return left * right.sigmoid() + part * (x.numel() / x.shape[0] / 1000)


def spectrum(x: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(x) * 0.5, s=(16, 16)).mean((2, 3))


NETS = {
    "GRU": Net(lambda n, x: n["r"](lines(x))[0][:, -1], 8, r=nn.GRU(128, 8, batch_first=True)),
    "GRU, both ways": Net(
        lambda n, x: n["r"](lines(x))[0].mean(1), 16,
        r=nn.GRU(128, 8, num_layers=2, bidirectional=True, batch_first=True)),
    "RNN": Net(lambda n, x: n["r"](lines(x))[0][:, -1], 8, r=nn.RNN(128, 8, batch_first=True)),
    "LSTM": Net(lambda n, x: n["r"](lines(x))[0][:, -1], 8, r=nn.LSTM(128, 8, batch_first=True)),
    "GRUCell": Net(lambda n, x: n["r"](x.mean((2, 3))), 8, r=nn.GRUCell(8, 8)),
    "InstanceNorm": Net(
        lambda n, x: F.relu(n["n"](x)).mean((2, 3)), 8, n=nn.InstanceNorm2d(8, affine=True)),
    "InstanceNorm, running": Net(
        lambda n, x: n["n"](x).mean((2, 3)), 8, n=nn.InstanceNorm2d(8, track_running_stats=True)),
    "LocalResponseNorm": Net(lambda n, x: n["n"](x).mean((2, 3)), 8, n=nn.LocalResponseNorm(3)),
    "RMSNorm": Net(lambda n, x: n["n"](x).mean((2, 3)), 8, n=nn.RMSNorm(16)),
    "SELU with dropout": Net(
        lambda n, x: n["d"](F.selu(x)).mean((2, 3)), 8, d=nn.AlphaDropout(0.2)),
    "odd activations": Net(
        lambda n, x: (F.threshold(x, 0.1, 0.0) + F.softshrink(x) + torch.log1p(x.abs())
                      + F.softsign(x) + F.rrelu(x) + x.floor()).mean((2, 3)), 8),
    "GLU": Net(lambda n, x: F.glu(x, 1).mean((2, 3)), 4),
    "norms of tensors": Net(lambda n, x: F.normalize(x.flatten(2).norm(dim=2), dim=1), 8),
    "statistics": Net(lambda n, x: torch.cat([x.std((2, 3)), x.flatten(2).median(2)[0]], 1), 16),
    "branches on values": Net(lambda n, x: halves(x), 1024),
    "embedding of the brightest": Net(
        lambda n, x: n["e"](x.flatten(2).argmax(2)).mean(1) + x.mean((1, 2)), 16,
        e=nn.Embedding(256, 16)),
    "assigned": Net(lambda n, x: assigned(x).amax(3).flatten(1), 128),
    "of the batch": Net(lambda n, x: of_the_batch(x).mean((2, 3)), 8),
    "spectrum": Net(lambda n, x: spectrum(x), 8),
    "1-d": Net(
        lambda n, x: F.interpolate(F.adaptive_avg_pool1d(n["t"](x.flatten(2)), 8), 16).mean(2), 4,
        t=nn.ConvTranspose1d(8, 4, 3)),
    "volumes": Net(
        lambda n, x: F.interpolate(F.max_pool3d(x[:, None], 2), scale_factor=2.0).mean((1, 2, 3)),
        16),
    "spatial transformer": Net(
        lambda n, x: F.grid_sample(
            x, F.affine_grid(torch.tanh(n["f"](x.flatten(1))).view(-1, 2, 3), list(x.shape), False),
            align_corners=False).mean((2, 3)), 8,
        f=nn.Linear(2048, 6)),
    "antialiased": Net(
        lambda n, x: F.interpolate(
            x, size=(9, 9), mode="bilinear", antialias=True).mean((2, 3)), 8),
    "attention with weights": Net(
        lambda n, x: n["m"](*[lines(x)] * 3, need_weights=True)[0].mean(1), 128,
        m=nn.MultiheadAttention(128, 4, batch_first=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_it_computes_what_the_masked_network_does(name: str, tmp_path: Path) -> None:
    model = NETS[name].eval()
    masks = {"a": torch.arange(8) % 3 != 0, "b": torch.arange(8) % 2 == 0}
    module = decompose(model, masks, example=torch.zeros(2, *SIZE))
    save(module, tmp_path)
    loaded = load(tmp_path)
    for batch in (1, 3):
        images = torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            assert torch.equal(loaded(images), module(images))
            double = loaded.double()(images.double())
            assert (double - masked_logits(model, masks, images)).abs().max() < 1e-9 * double.std()
        loaded.float()


def named(*names: str) -> nn.Sequential:
    """Convolutions of these names, and a classifier."""
    model = nn.Sequential()
    for position, name in enumerate(names):
        model.add_module(name, nn.Conv2d(8 if position else 3, 8, 3, padding=1))
        model.add_module(f"{name}_act", nn.ReLU())
    model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(8, 4))
    return model.eval()


def test_names_of_layers_may_be_anything_that_torch_allows(tmp_path: Path) -> None:
    names = ["block-1", "block_1", "a b/c;d", "свёртка", "卷积", "steps", "x" * 300, "__class__-"]
    model = named(*names)
    masks = {name: torch.arange(8) % 2 == position % 2 for position, name in enumerate(names[1:])}
    module = decompose(model, masks, example=torch.zeros(2, *SIZE))
    assert set(names[1:]) <= set(module.report["layers"])
    save(module, tmp_path)
    loaded = load(tmp_path)
    convolutions = [n for n, m in loaded.named_children() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == len(names)
    assert all(re.fullmatch("[A-Za-z0-9_]{1,200}", name) for name in convolutions)
    images = torch.randn(3, *SIZE)
    with torch.no_grad():
        assert torch.equal(loaded(images), module(images))
        expected = masked_logits(model, masks, images)
        torch.testing.assert_close(module.double()(images.double()), expected)


def test_an_op_outside_the_table_is_refused_in_one_line(tmp_path: Path) -> None:
    model = Net(lambda n, x: torch.special.i0(x).mean((2, 3)), 8).eval()
    module = decompose(model, {"b": torch.arange(8) > 2}, example=torch.zeros(2, *SIZE))
    with pytest.raises(ValueError, match=r"^cannot save: aten\.special_i0\.default .*op table$"):
        save(module, tmp_path / "m")
    assert not (tmp_path / "m").exists()
