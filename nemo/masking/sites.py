"""Where a model can be masked: its convolutions and Linears, in the order they run (ours).

Running the model answers what names alone cannot: which layers run, in what order, which
BatchNorm reads which convolution, which Linears work on tokens, which dimension of a layer's input
holds the samples, and which layer puts out the logits. The paper (section 4.1) never masks the
first convolution, the patch embedding, the first Transformer block or the fully connected head;
those stay in the list with the reason in `skip`, so that nothing is left out silently.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nemo.masking.classifier import classifiers
from nemo.masking.inspection import signature
from nemo.masking.probe import Call, is_layer, is_transposed, layout, probe
from nemo.signature import Signature
from nemo.signature import call as called_with

PLAIN = (  # whose backward pass does not read their output
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
)  # fmt: skip
HEAD = "fully connected: reads one vector per image"
CLASSIFIER = "classifier: its outputs are the logits"
UNCALLED = "not called as a module in forward"


@dataclass(frozen=True)
class Site:
    """One maskable layer: rows `start:stop` of the output of `module`.

    Attributes:
        norm: the only BatchNorm that reads the output: the mask acts on its output.
        part: the parameter, or q, k or v, of a layer that is called as a function.
        batch, fold: the dimension that holds the samples, see `nemo.masking.probe.layout`; None if
            it is not known.
    """

    layer: str
    module: str
    norm: str | None
    start: int
    stop: int
    skip: str | None = None
    part: str | None = None
    batch: int | None = None
    fold: str = ""

    @property
    def neurons(self) -> int:
        return self.stop - self.start


def example_input(model: nn.Module) -> Tensor:
    """A random float batch (2, channels, height, width) of the size the model says it takes.

    Looks at `input_size` (ours), timm's `default_cfg`, and a patch embedding's `img_size`;
    without any of them, 3 x 32 x 32.

    Raises:
        ValueError: what the model says is no size.
    """
    size = _declared(model) or (3, 32, 32)
    reference = next(model.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(2, *size, generator=generator)
    return batch.to(reference.device, reference.dtype)


def _declared(model: nn.Module) -> list[int] | None:
    """The size of a sample that a model says it takes, if it does."""
    where, size = "input_size", getattr(model, "input_size", None)
    if size is None:
        where = "patch_embed.img_size"
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        if isinstance(size, int):
            size = (size, size)
        size = (3, *size) if isinstance(size, (tuple, list)) else size
    if size is None:
        where, size = "default_cfg", (getattr(model, "default_cfg", None) or {}).get("input_size")
    if size is None:
        return None
    try:
        sizes = [index(n) for n in size]
    except TypeError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ValueError(
            f"the model's {where} is {size!r}; accepted: a size such as (3, 32, 32), or example="
        )
    return sizes


def seen(model: nn.Module, example: Any = None, output: str | int | None = None) -> Signature:
    """`signature`; without an example, of images of the size the model says it takes."""
    if example is not None:
        return signature(model, example, output)
    images = example_input(model)
    size = " x ".join(map(str, images.shape[1:]))
    tried = f"images of {size} (tried, as there is no example=)"
    return signature(model, images, output, tried)


def find_sites(model: nn.Module, example: Any = None) -> list[Site]:
    """Every convolution and Linear of `model`, in call order, each masked or with a `skip` reason.

    A fused attention projection (a Linear called `qkv`, or that of nn.MultiheadAttention) is three
    sites: q, k and v.

    Args:
        example: a batch, or the `Signature` seen from one; by default images.
    """
    if not isinstance(example, Signature):
        example = seen(model, example)
    calls, logits = probe(model, example)
    heads = classifiers(model, example)
    counts = Counter((call.name, call.part) for call in calls)
    whole = {call.name for call in calls if call.part is None}
    calls = [call for call in calls if call.part is None or call.name not in whole]
    if not heads:  # something follows it that mixes the logits
        heads = {(c.name, c.part) for c in calls[-1:] if c.width in logits.shape[1:]}
    layouts = [layout(call) for call in calls]
    reason = _Reasons(calls, layouts)
    sites: dict[tuple[str, str | None], list[Site]] = {}
    known: dict[tuple[str, str | None], tuple[int, str] | str] = {}
    for call, where in zip(calls, layouts, strict=True):
        key = (call.name, call.part)
        if known.setdefault(key, where) != where:
            where = "its calls differ in where the samples are"
        skip = "called more than once in forward" if counts[key] > 1 else None
        skip = skip or (CLASSIFIER if key in heads else reason.of(call, where))
        sites[key] = _sites_of(call, where, skip)
    found = [site for parts in sites.values() for site in parts]
    called = {site.module for site in found}
    for name, module in model.named_modules():
        if is_layer(module) and name not in called:
            found.append(Site(name, name, None, 0, _width(module), UNCALLED))
    return found


def head_names(model: nn.Module, num_classes: int) -> list[str]:
    """The classifier's last layers: one, or two in a distilled model."""
    sites = find_sites(model)
    return [s.module for s in sites if s.skip == CLASSIFIER and s.neurons == num_classes]


def overwritable(model: nn.Module, sites: Sequence[Site], example: Any) -> set[str]:
    """The masked modules whose output nobody but the mask needs, so that it may write over it.

    One step forward of a copy in train mode shows after which of them a later operation writes over
    the output itself. A subclass may read its output in its backward pass, so it is never one.
    """
    outputs: dict[str, tuple[Tensor, int]] = {}
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng():
        trained = copy.deepcopy(model).train()
        for name in {site.norm or site.module for site in sites}:
            module = trained.get_submodule(name)
            if type(module) in PLAIN:
                module.register_forward_hook(
                    lambda m, a, y, name=name: outputs.update({name: (y, y._version)})
                )
        called_with(trained, tree_map(lambda x: torch.cat([x, x]), example))
    return {name for name, (output, version) in outputs.items() if output._version == version}


class _Reasons:
    """Why a layer that is called once, and is no classifier, is not masked; None if it is."""

    def __init__(self, calls: list[Call], layouts: list[tuple[int, str] | str]) -> None:
        self.first = calls[0] if calls else None
        self.first_conv = next((c.name for c in calls if c.is_conv), None)
        linears = [(c, w) for c, w in zip(calls, layouts, strict=True) if not c.is_conv]
        tokens = any(c.dims > 2 or w[1] in ("outer", "inner") for c, w in linears)
        self.is_mlp = self.first_conv is None and not tokens
        self.block = _first_token_block(calls)

    def of(self, call: Call, where: tuple[int, str] | str) -> str | None:
        if call.name == self.first_conv:
            return "first convolution or patch embedding"
        if self.is_mlp and call is self.first:
            return "first layer"
        if not call.is_conv and call.dims == 2 and where == (0, "") and not self.is_mlp:
            return HEAD
        if self.block is not None and not call.is_conv and call.name.startswith(self.block):
            return "first Transformer block"
        return where if isinstance(where, str) else None


def _first_token_block(calls: list[Call]) -> str | None:
    """The first numbered container (such as `blocks.0`) that holds a Linear working on tokens."""
    for call in calls:
        if not call.is_conv and call.dims == 3:
            parts = call.name.split(".")
            for number in (r"\d+", r".*_\d+"):
                found = [i for i, part in enumerate(parts[:-1]) if re.fullmatch(number, part)]
                if found:
                    return ".".join(parts[: found[-1] + 1]) + "."
    return None


def _sites_of(call: Call, where: tuple[int, str] | str, skip: str | None) -> list[Site]:
    batch, fold = (None, "") if isinstance(where, str) else where
    reads_all = call.part is None and (call.is_conv or call.dims == 2)
    norm = call.norms[0] if reads_all and len(call.norms) == 1 else None
    prefix, _, leaf = call.name.rpartition(".")
    width = call.width

    def site(layer: str, norm: str | None, start: int, stop: int) -> Site:
        layer = layer.lstrip(".")
        return Site(layer, call.name, norm, start, stop, skip, call.part, batch, fold)

    if call.part in ("q", "k", "v"):
        start = "qkv".index(call.part) * width
        return [site(f"{call.name}.{call.part}", None, start, start + width)]
    if call.part not in (None, "weight") or (call.part and not call.name):
        return [site(f"{call.name}.{call.part}", norm, 0, width)]
    if leaf != "qkv" or width % 3 or call.is_conv:
        return [site(call.name, norm, 0, width)]
    third = width // 3
    return [site(f"{prefix}.{p}", None, i * third, (i + 1) * third) for i, p in enumerate("qkv")]


def _width(module: nn.Module) -> int:
    if is_transposed(module):
        return cast(int, module.nf)
    return cast(int, module.out_features if isinstance(module, nn.Linear) else module.out_channels)
