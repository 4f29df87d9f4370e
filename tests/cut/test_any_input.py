"""Models that take ids, masks and tables and return dicts and dataclasses, cut right."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nemo
from tests.cut.helpers import randomise

torch.set_num_threads(1)
VOCABULARY, LENGTH = 40, 7


def mlp() -> nn.Module:
    sizes = [(9, 24), (24, 20), (20, 16)]
    layers = [layer for a, b in sizes for layer in (nn.Linear(a, b), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(16, 5))


class Text(nn.Module):
    """Token ids and a mask of those that are words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 16, padding_idx=0)
        self.places = nn.Parameter(torch.randn(LENGTH, 16) * 0.2)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.encoder(self.words(ids) + self.places, src_key_padding_mask=mask == 0)
        kept = mask.unsqueeze(-1).to(x.dtype)
        return self.head((x * kept).sum(1) / kept.sum(1))


class Ids(nn.Module):
    """One tensor, which is not of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.l, self.m = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 24)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.m(torch.relu(self.l(self.e(x))))).mean(1))


class Both(nn.Module):
    """An image and what is known of it: a row of numbers, a kind, a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        self.kinds = nn.Embedding(6, 4)
        self.wide, self.fc = nn.Linear(12 + 4 + 4, 16), nn.Linear(16, 5)

    def forward(self, image: Tensor, row: Tensor, kind: Tensor, *, flag: Tensor) -> dict[str, Any]:
        x = torch.relu(self.second(torch.relu(self.first(image)))).mean((2, 3))
        known = torch.where(flag[:, None], row, -row)
        features = torch.cat([x, known, self.kinds(kind)], 1)
        return {"features": features, "logits": self.fc(torch.relu(self.wide(features)))}


class Bytes(nn.Module):
    """Images as bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.fc.weight.dtype) / 255
        return self.fc(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


class Least(nn.Module):
    """Attention with the least number of the type in place of minus infinity."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 16)
        self.q, self.k, self.v, self.out, self.fc = (nn.Linear(16, n) for n in (16, 16, 16, 16, 5))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        q, k, v = self.q(x), self.k(x), self.v(x)
        ones = torch.ones_like(mask, dtype=x.dtype, device=x.device)
        off = (ones - mask)[:, None] * torch.finfo(x.dtype).min
        return self.fc(self.out(torch.softmax(q @ k.transpose(1, 2) / 4 + off, -1) @ v).mean(1))


@dataclass
class Said:
    logits: Tensor
    loss: Tensor | None = None


class Dataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Said:
        return Said(self.net(x))


class Tuple(Dataclass):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = self.net(x)
        return logits.softmax(1), logits


def inputs_of(name: str, batch: int, seed: int) -> Any:
    random = torch.Generator().manual_seed(seed)

    def floats(*size: int) -> Tensor:
        return torch.randn(batch, *size, generator=random)

    def whole(high: int, *size: int) -> Tensor:
        return torch.randint(high, (batch, *size), generator=random)

    if name == "mlp":
        return floats(9)
    if name == "bytes":
        return whole(256, 3, 8, 8).to(torch.uint8)
    if name in ("text", "least"):
        mask = whole(2, LENGTH)
        mask[:, 0] = 1
        return whole(VOCABULARY, LENGTH), mask
    if name == "ids":
        return whole(50, 12)
    if name == "both":
        return {"image": floats(3, 8, 8), "row": floats(4), "kind": whole(6),
                "flag": whole(2).bool()}  # fmt: skip
    return floats(3, 8, 8)


MODELS = {
    "mlp": (mlp, None),
    "text": (Text, None),
    "ids": (Ids, None),
    "bytes": (Bytes, None),
    "least": (Least, None),
    "both": (Both, "logits"),
    "dataclass": (Dataclass, "logits"),
    "tuple": (Tuple, 1),
}


def by_hand(model: nn.Module, masks: Mapping[str, Tensor], batch: Any) -> Any:
    """What the model returns in float64, when hooks multiply the outputs of its layers."""
    model = copy.deepcopy(model).double().eval()
    missed = set(masks)

    def multiply(name: str, mask: Tensor) -> Any:
        def hook(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            missed.discard(name)
            conv = isinstance(module, nn.Conv2d)
            return y * (mask.double().view(-1, 1, 1) if conv else mask.double())

        return hook

    for name, mask in masks.items():
        owner, _, part = name.rpartition(".")
        attention = dict(model.named_modules()).get(owner)
        if isinstance(attention, nn.MultiheadAttention):  # it calls no module: zero rows instead
            _silence(attention, part, ~mask)
            missed.discard(name)
        else:
            model.get_submodule(name).register_forward_hook(multiply(name, mask))

    def wide(x: Tensor) -> Tensor:
        return x.double() if x.is_floating_point() else x

    with torch.no_grad():
        if isinstance(batch, dict):
            returned = model(**{name: wide(x) for name, x in batch.items()})
        else:
            returned = model(*map(wide, batch)) if isinstance(batch, tuple) else model(wide(batch))
    assert not missed
    return returned


def _silence(attention: nn.MultiheadAttention, part: str, off: Tensor) -> None:
    weight, bias = attention.out_proj.weight, attention.out_proj.bias
    if part != "out_proj":
        start = "qkv".index(part) * len(off)
        packed = attention.in_proj_weight, attention.in_proj_bias
        weight, bias = (parameter[start : start + len(off)] for parameter in packed)
    with torch.no_grad():
        weight[off], bias[off] = 0, 0


def said(returned: Any, output: Any) -> Tensor:
    if output is None:
        return returned
    if isinstance(returned, dict) or isinstance(output, int):
        return returned[output]
    return getattr(returned, output)


def run(model: Any, batch: Any) -> Any:
    with torch.no_grad():
        if isinstance(batch, dict):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple) else model(batch)


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_module_computes_what_its_masked_parent_does(name: str, tmp_path: Path) -> None:
    make, output = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make())
    modular = nemo.modularize(model, inputs_of(name, 3, 0), output=output)
    random = torch.Generator().manual_seed(2)
    masks = {n: torch.rand(w, generator=random) < 0.6 for n, w in modular.layers.items()}
    nemo.save(nemo.decompose(modular, masks, [3, 0]), tmp_path)
    module = nemo.load(tmp_path)
    assert module.report["parameters"] < module.report["parent_parameters"]
    for batch in (1, 5):
        inputs = inputs_of(name, batch, 3)
        expected = said(by_hand(model, masks, inputs), output)[:, [3, 0]]
        actual = run(module, inputs)
        assert actual.shape == expected.shape
        whole = said(by_hand(model, {}, inputs), output)[:, [3, 0]]
        assert (whole - expected).abs().max() > 0.05 * expected.abs().max()  # masks matter
        assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()
