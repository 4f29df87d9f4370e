"""Where a model can be masked: its convolutions and Linears, in the order they run (ours).

One forward pass with hooks answers what names alone cannot: which layers run, in what order, which
BatchNorm reads which convolution, and which Linears work on tokens. The paper (section 4.1) never
masks the first convolution, the patch embedding, the first Transformer block or the fully connected
head; those stay in the list with the reason in `skip`, so that nothing is left out silently.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nemo.signature import call as called_with

MASKABLE = (nn.Conv2d, nn.Linear)
PLAIN = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)  # whose backward pass does not read their output
HEAD = "fully connected: reads one vector per image"
UNCALLED = "not called as a module in forward"


@dataclass(frozen=True)
class Site:
    """One maskable layer: rows `start:stop` of the output of `module`."""

    layer: str
    module: str
    norm: str | None  # the BatchNorm that alone reads the convolution: the mask acts on its output
    start: int
    stop: int
    skip: str | None = None

    @property
    def neurons(self) -> int:
        return self.stop - self.start


@dataclass
class _Call:
    name: str
    module: nn.Module
    input_ndim: int
    output: Tensor


def example_input(model: nn.Module) -> Tensor:
    """A random float batch (2, channels, height, width) of the size the model says it takes.

    Looks at `input_size` (ours), timm's `default_cfg`, and a patch embedding's `img_size`;
    without any of them, 3 x 32 x 32.
    """
    size = getattr(model, "input_size", None)
    patches = getattr(model, "patch_embed", None)
    if size is None and getattr(patches, "img_size", None) is not None:
        size = (3, *patches.img_size)  # type: ignore[union-attr]
    if size is None:
        size = (getattr(model, "default_cfg", None) or {}).get("input_size")
    reference = next(model.parameters(), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(2, *(size or (3, 32, 32)), generator=generator)
    return batch.to(reference.device, reference.dtype)


def find_sites(model: nn.Module, example: Any = None) -> list[Site]:
    """Every Conv2d and Linear of `model`, in call order, each masked or with a `skip` reason.

    A fused attention projection (a Linear called `qkv`) is three sites: q, k and v.
    """
    calls, norm_of = _trace(model, example_input(model) if example is None else example)
    counts = Counter(call.name for call in calls)
    first_conv = next((c.name for c in calls if isinstance(c.module, nn.Conv2d)), None)
    first_block = _first_token_block(calls)
    sites: list[Site] = []
    for call in {c.name: c for c in calls}.values():
        skip = _skip_reason(call, counts[call.name], first_conv, first_block)
        sites += _sites_of(call, norm_of.get(call.name), skip)
    called = set(counts)
    for name, module in model.named_modules():
        if isinstance(module, MASKABLE) and name not in called:
            width = module.weight.shape[0]
            sites.append(Site(name, name, None, 0, width, UNCALLED))
    return sites


def head_names(model: nn.Module, num_classes: int) -> list[str]:
    """The classifier's last layers: one, or two in a distilled model."""
    return [s.module for s in find_sites(model) if s.skip == HEAD and s.neurons == num_classes]


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


def _trace(model: nn.Module, example: Any) -> tuple[list[_Call], dict[str, str]]:
    """Run once and record the maskable calls, and for each convolution the BatchNorm reading it."""
    calls: list[_Call] = []
    readers: dict[int, list[str]] = {}  # id of a tensor -> BatchNorms that read it
    alive: list[Tensor] = []  # an id is a tensor's own for only as long as the tensor lives

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, nn.BatchNorm2d):
                alive.append(args[0])
                readers.setdefault(id(args[0]), []).append(name)
            else:
                calls.append(_Call(name, module, args[0].ndim, output))

        return hook

    traced = (*MASKABLE, nn.BatchNorm2d)
    handles = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, traced)
    ]
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            called_with(model, example)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    reading = {call.name: readers.get(id(call.output), []) for call in calls}
    return calls, {name: norms[0] for name, norms in reading.items() if len(norms) == 1}


def _first_token_block(calls: list[_Call]) -> str | None:
    """The first numbered container (such as `blocks.0`) that holds a Linear working on tokens."""
    for call in calls:
        if isinstance(call.module, nn.Linear) and call.input_ndim == 3:
            parts = call.name.split(".")
            numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
            if numbers:
                return ".".join(parts[: numbers[-1] + 1]) + "."
    return None


def _skip_reason(call: _Call, count: int, first_conv: str | None, block: str | None) -> str | None:
    if count > 1:
        return "called more than once in forward"
    if call.name == first_conv:
        return "first convolution or patch embedding"
    if isinstance(call.module, nn.Linear):
        if call.input_ndim == 2:
            return HEAD
        if block is not None and call.name.startswith(block):
            return "first Transformer block"
    return None


def _sites_of(call: _Call, norm: str | None, skip: str | None) -> list[Site]:
    assert isinstance(call.module, MASKABLE)
    width = call.module.weight.shape[0]
    prefix, _, leaf = call.name.rpartition(".")
    if leaf != "qkv" or width % 3 or isinstance(call.module, nn.Conv2d):
        return [Site(call.name, call.name, norm, 0, width, skip)]
    third = width // 3
    return [
        Site(f"{prefix}.{part}".lstrip("."), call.name, None, i * third, (i + 1) * third, skip)
        for i, part in enumerate("qkv")
    ]
