"""Mask generators, and the modular model that carries them (paper section 4.1).

For a layer with input x and output y, `m = relu(tanh(W2 relu(W1 pool(x))))` in [0, 1), one value
per neuron and sample, multiplies y: after BatchNorm for a convolution, after the bias for a Linear.
Skip paths stay unmasked. Biases start at 1, so every mask starts almost fully on.

Shapes: B images, N_l neurons of layer l.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from nemo.masking.autograd import Scale
from nemo.masking.hooks import acting
from nemo.masking.inspection import signature
from nemo.masking.pooling import EVERYWHERE, PoolInput, by_sample, check_pool, mean_over, shown_by
from nemo.masking.probe import is_transposed
from nemo.masking.sites import PLAIN, Site, find_sites, overwritable, seen
from nemo.masking.under import Under, check_early
from nemo.signature import Signature, bare, moved, pick

Masks = dict[str, Tensor]


class MaskGenerator(nn.Module):
    """Maps the pooled input (B, in_features) of a layer to the mask (B, neurons) of its neurons."""

    def __init__(self, in_features: int, neurons: int, hidden: int, first_bias: bool) -> None:
        super().__init__()
        self.squeeze = nn.Linear(in_features, hidden, bias=first_bias)
        self.excite = nn.Linear(hidden, neurons)
        for linear in (self.squeeze, self.excite):
            nn.init.kaiming_normal_(linear.weight)
            if linear.bias is not None:
                nn.init.ones_(linear.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return torch.tanh(self.excite(torch.relu(self.squeeze(pooled)))).relu()

    @classmethod
    def for_layer(cls, module: nn.Module, neurons: int, part: str | None = None) -> MaskGenerator:
        """The paper's sizes: hidden width N_l, or N_l // 2 from 128 (conv) or 3073 (Linear) on."""
        if isinstance(module, _ConvNd):
            hidden = neurons if neurons < 128 else neurons // 2
            return cls(module.in_channels, neurons, hidden, first_bias=False)
        hidden = neurons if neurons < 3073 else neurons // 2
        if part is not None and isinstance(module, nn.MultiheadAttention):
            width = {"q": module.embed_dim, "k": module.kdim, "v": module.vdim}[part]
        else:
            width = module.get_parameter(part or "weight").shape[0 if is_transposed(module) else 1]
        return cls(width, neurons, hidden, first_bias=True)


class Modular(nn.Module):
    """A model with mask generators on its layers; calling it gives (logits, masks).

    Attributes:
        model: the model itself, unchanged. Its own call ignores the generators, and its state_dict
            keys are the ones it had.
        sites: the masked layers, in call order.
        skipped: {layer: why it is not masked}.
        found: the sites of both.
        overwritable: modules whose output is masked in place, unless they have forward hooks,
            which may keep it.
        takes: how it is called, and what counts of what the model returns in eval mode.
        output: what counts of what it returns in train mode, which may be several tensors.
        pool: what a generator sees of its layer's input, as `modularize` was told.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: list[Site],
        overwritable: Collection[str],
        takes: Signature,
        output: str | int | None = None,
        pool: PoolInput = EVERYWHERE,
    ) -> None:
        super().__init__()
        self.model = model
        self.pool = pool
        self.overwritable = frozenset(overwritable)
        self.takes = takes
        self.output = takes.output if output is None else output
        self.found = list(sites)
        self.sites = [site for site in sites if site.skip is None]
        self.skipped = {site.layer: site.skip for site in sites if site.skip is not None}
        if not self.sites:
            reasons = "; ".join(map(": ".join, self.skipped.items())) or "no convolution or Linear"
            raise ValueError(f"the model has no layer to mask ({reasons})")
        check_pool(pool)
        self._functional = any(site.part is not None for site in self.sites)
        self._keys = _keys(self.sites)
        reference = next(model.parameters())
        self.generators = nn.ModuleDict(
            {
                self._keys[site.layer]: MaskGenerator.for_layer(
                    model.get_submodule(site.module), site.neurons, site.part
                ).to(reference.device, reference.dtype)
                for site in self.sites
            }
        )

    @property
    def layers(self) -> dict[str, int]:
        """Masked layers and their numbers of neurons; the values add up to K."""
        return {site.layer: site.neurons for site in self.sites}

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, Masks]:
        """Logits (B, C) of the masked model and the masks {layer: (B, N_l)}, with gradients.

        It is called as the model is; the logits are the output that `modularize` was told. A mask
        is (B, ..., N_l) where `pool` keeps the positions. Raise ValueError where B is 0.
        """
        if self._functional and torch.compiler.is_compiling():
            # a compiler would hand such linears to the mode that masks them a second time
            found: tuple[Any, Masks] = torch.compiler.disable(self._masked)(*args, **kwargs)
            return found
        return self._masked(*args, **kwargs)

    def _masked(self, *args: Any, **kwargs: Any) -> tuple[Any, Masks]:
        count = len(next(iter((*args, *kwargs.values())), ()))
        if not count:
            raise ValueError("the modular model got no samples; accepted: one or more")
        with self._attached(count) as masks:
            logits = pick(self.model(*args, **kwargs), self.output)
        for site in self.sites:
            if site.layer not in masks:  # left out of this pass, as LayerDrop does: nothing is on
                first = next(self.generators.parameters())
                masks[site.layer] = first.new_zeros(count, site.neurons)
        return logits, {site.layer: masks[site.layer] for site in self.sites}

    def under(self, masks: Mapping[str, Tensor]) -> Under:
        """The model under constant masks in place of its generators', as an ordinary module.

        Args:
            masks: {layer: bool or float, (N_l,) for all samples or (B, N_l)}. Other layers are not
                masked. A fused layer may also be named by its module, at full width.

        Returns:
            A module that is called as the base model is, and returns what that returns: logits
            without masks. It shares the model's parameters.

        Raises:
            ValueError: a layer that cannot be masked, or a mask that does not fit it.
        """
        return Under(self.model, self.found, masks)

    @contextmanager
    def _attached(self, count: int) -> Iterator[Masks]:
        """Hooks for one forward pass of `count` samples only, so that the model stays an ordinary
        one outside it."""
        masks: Masks = {}
        free = {n for n in self.overwritable if not self.model.get_submodule(n)._forward_hooks}

        def scale(output: Tensor, mask: Tensor, name: str) -> Tensor:
            if len(mask) != len(output):
                return output * mask
            return cast(Tensor, Scale.apply(output, mask, name in free))

        generate = partial(self._generate, masks, count)
        with acting(self.model, self.sites, masks, scale, generate):
            yield masks

    def _generate(self, masks: Masks, count: int, sites: Sequence[Site], x: Tensor) -> Tensor:
        """Masks from the input of a layer, which is returned; its gradient takes up theirs."""
        site, module = sites[0], self.model.get_submodule(sites[0].module)
        # a plain layer's gradient is its own, unless a hook was given it
        hooked = module._backward_hooks or module._backward_pre_hooks
        in_place = site.part is None and type(module) in PLAIN and not hooked
        channels = 1 if isinstance(module, _ConvNd) else x.ndim - 1
        assert site.batch is not None
        rows = x.shape[site.batch]
        if rows % count or (rows != count and not site.fold):
            raise RuntimeError(
                f"{site.layer}: its input holds {rows} rows for {count} samples, unlike that of "
                "the example of modularize: give it one of this size"
            )
        if isinstance(self.pool, slice):
            x, pooled = mean_over(self.pool, x, site, channels, count, in_place)
        else:
            shown = by_sample(x, site, channels, count)
        for site in sites:
            if not isinstance(self.pool, slice):
                pooled = shown_by(self.pool, shown, site)
            masks[site.layer] = self.generators[self._keys[site.layer]](pooled)
        return x


def modularize(
    model: nn.Module,
    example: Any = None,
    *,
    output: str | int | None = None,
    pool: PoolInput = EVERYWHERE,
) -> Modular:
    """Attach mask generators to every maskable layer of `model` (paper section 4.1).

    Args:
        model: any module of convolutions and Linears; it is wrapped, not edited or copied.
        example: a batch, as the model takes it: a tensor, a tuple of tensors, or a dict of tensors
            that are passed by name; of any type, with the samples in the first dimension. It is
            run, to see which layers are used and in what order. By default images of the size that
            the model declares, else 3 x 32 x 32. `decompose` uses the same sizes.
        output: which tensor counts, of a model that returns several: its key, attribute or index.
            Some, such as GoogLeNet, return several in train mode only.
        pool: what a generator sees of its layer's input; by default the mean over all positions.
            A slice is the mean over these positions, such as `slice(64)` of a model of sequences
            whose later tokens are not known yet. They are counted in what the layer reads, in the
            first dimension after the samples: rows of images, heads where these come before the
            tokens, fewer after strides. A function `pool(layer, x)` is given x as (B, ..., F), the
            samples first and the features last. It returns (B, F), for a mask per sample; or
            (B, ..., F), for a mask per position, which is then (B, ..., N_l).

    The model is traced once, so that one which cannot be cut is refused before its training. The
    masks live in hooks that exist during the forward pass only. Activation checkpointing repeats
    parts of the pass later, without them: it raises, or, if reentrant, gives wrong gradients.

    Returns:
        A `Modular`: call it for (logits, {layer: (B, N_l)}); see its `layers` and `skipped`.

    Raises:
        ValueError: the model has nothing to mask, or it is called in a way that cannot be cut; see
            `nemo.masking.inspection`. The modular model raises it if `pool` gives another shape.
    """
    model = bare(model)
    if isinstance(model, Modular):
        raise ValueError("the model is modular already; accepted: what it is made of, its .model")
    takes = takes_of(model, example, output)
    check_early(model, takes)
    return attach(model, takes, output, pool)


def as_modular(model: nn.Module) -> Modular:
    """A modular model out of torch's wrappers. Raise ValueError if it is none."""
    found = bare(model)
    if not isinstance(found, Modular):
        kind = type(found).__name__
        raise ValueError(f"the model is a {kind}; accepted: what nemo.modularize returns")
    return found


def attach(
    model: nn.Module,
    takes: Signature,
    output: str | int | None = None,
    pool: PoolInput = EVERYWHERE,
) -> Modular:
    """`modularize` for a model that was checked before, such as one that is loaded."""
    batch = takes.batch(moved(takes.draw(2, 0), next(model.parameters())))
    sites = find_sites(model, takes)
    masked = [site for site in sites if site.skip is None]
    return Modular(model, sites, overwritable(model, masked, batch), takes, output, pool)


def takes_of(model: nn.Module, example: Any = None, output: str | int | None = None) -> Signature:
    """How a model is called, seen from an example; of a modular model without one, what it knows.

    Raises:
        ValueError: see `nemo.masking.inspection`.
    """
    if isinstance(model, Modular):
        output = model.takes.output if output is None else output
        return model.takes if example is None else signature(model.model, example, output)
    return seen(model, example, output)


def under(model: nn.Module, masks: Mapping[str, Tensor], example: Any = None) -> Under:
    """`Modular.under` for any model, also one that was trained elsewhere.

    Args:
        model: a `Modular`, or any model that `modularize` takes.
        masks: as for `Modular.under`.
        example: a batch for a plain model, as for `modularize`, or the `Signature` seen from it.

    Returns:
        As `Modular.under`, a module that is called as `model` is.

    Raises:
        ValueError: what that raises; of a plain model also what `takes_of` does.
    """
    if isinstance(model, Modular):
        return model.under(masks)
    return Under(model, find_sites(model, example), masks)


def _keys(sites: Sequence[Site]) -> dict[str, str]:
    """{layer: key of its generator}: a ModuleDict takes no dots, nor the names of what it has."""
    keys: dict[str, str] = {}
    for site in sites:
        key = site.layer.replace(".", "_")
        while key in keys.values() or hasattr(nn.ModuleDict(), key):
            key += "_"
        keys[site.layer] = key
    return keys
