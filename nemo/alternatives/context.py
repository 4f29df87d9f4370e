"""What an alternative is made from: one module's cell and class subset, and all that is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from nemo.alternatives.registry import Alternative
from nemo.cells import Cell, Layout
from nemo.config import STANDARD, Params
from nemo.cost import count_flops, count_parameters
from nemo.data import Prepared, parse_subset
from nemo.device import resolve_device
from nemo.evaluation.modular import load_class_masks
from nemo.masking.class_masks import SubsetMasks
from nemo.masking.generators import Modular
from nemo.masking.sites import head_names
from nemo.models import family_named
from nemo.module.decomposed import DecomposedModule
from nemo.module.files import load
from nemo.trained import load_cell, weights_sha256
from nemo.training.finetune import finetune

STEPS = 13  # of the bisection for a size; the first tries all of it
UNITS = {"parameters": "parameters", "flops": "FLOPs"}


class TooSmallError(ValueError):
    """No model of a kind is as small as the module."""


@dataclass(frozen=True)
class Context:
    """One module: its cell, its class subset, the params of its method, images and files.

    Attributes:
        equal: a key of UNITS: of what an alternative may have no more than the module.
        section: the section of params that asks for alternatives.
    """

    params: Params
    cell: Cell
    subset: str
    data: Prepared
    layout: Layout
    equal: str = "parameters"
    section: str = "alternatives"

    def classes(self) -> list[int]:
        return parse_subset(self.params.text_of(self.subset), self.data.classes)

    def module(self) -> DecomposedModule:
        """The module as cut, on the CPU."""
        return load(self.layout.module(self.cell, self.subset))

    def size(self, model: nn.Module) -> int:
        """Parameters, or FLOPs of one image, as `equal` says."""
        if self.equal == "parameters":
            return count_parameters(model)
        device = next(model.parameters()).device
        return count_flops(model, torch.zeros(1, 3, *self.data.size, device=device))

    def budget(self) -> int:
        """The size of the module."""
        return self.size(self.module())

    def check_size(self, kind: Alternative, model: nn.Module) -> None:
        """Raise ValueError where a model that must not be larger than the module is."""
        size, budget = self.size(model), self.budget()
        if kind.budget and size > budget:
            raise ValueError(
                f"{self.section}.kinds: {kind.name} has {size} {UNITS[self.equal]} for "
                f"{self.subset}; accepted: at most the {budget} of the module, or budget=False"
            )

    def masks(self, modular: Modular) -> SubsetMasks:
        """What the module keeps of the trained cell that it is cut from."""
        parent = weights_sha256(self.layout.train(self.cell))
        masks = load_class_masks(self.layout.masks(self.cell), modular.layers, parent)
        return masks.select(self.classes())

    def modular(self) -> Modular:
        """The trained cell that the module was cut from, on the device of params."""
        modular = load_cell(self.layout.train(self.cell)).to(resolve_device(self.params.device))
        assert isinstance(modular, Modular), self.cell.name
        return modular

    def standard(self) -> nn.Module:
        """The standard model of the same data, model and seed on the CPU, trainable, with only the
        subset's rows of its classifier.

        Raises:
            ValueError: the classifier is no Linear, or is not found, as one that normalizes its
                weights: the logits would stay those of all classes.
        """
        model = load_cell(self.layout.train(replace(self.cell, method=STANDARD)))
        model.requires_grad_(True)
        rows, heads = self.classes(), head_names(model, len(self.data.classes))
        if not heads:
            raise ValueError(
                f"{self.section}.kinds: the classifier of {self.cell.model} was not found; leave "
                "out what is made of the standard model, such as pruned, taylor, standard-tuned"
            )
        for name in heads:
            linear = model.get_submodule(name)
            if not isinstance(linear, nn.Linear):
                raise ValueError(
                    f"{self.cell.model}: alternatives need a Linear classifier, and {name} is a "
                    f"{type(linear).__name__}"
                )
            linear.weight = nn.Parameter(linear.weight.detach()[rows].clone())
            if linear.bias is not None:
                linear.bias = nn.Parameter(linear.bias.detach()[rows].clone())
            linear.out_features = len(rows)
        return model

    def tuned(self) -> nn.Module:
        """The standard model after all of the module's fine-tuning, on the CPU. Where budgets are
        measured, classifiers are kept."""
        params, cell, model = self.params, self.cell, self.standard()
        if self.section == "budgets":
            kept = params.finetune.model_copy(update={"head": "inherit"})
            params = params.model_copy(update={"finetune": kept})
        part = self.data.restrict(self.classes())
        heads = head_names(model, len(part.classes)) if params.finetune.head == "new" else []
        title, family = f"{cell.name} {self.subset} standard", family_named(cell.model)
        finetune(model, part, family, params, cell.seed, title, heads=heads)
        return model.cpu().eval()

    def largest(self, make: Callable[[float], nn.Module]) -> nn.Module:
        """The model of the largest share in (0, 1] that is at most the module's size.

        Raises:
            TooSmallError: none is so small.
        """
        budget, found = self.budget(), None
        low, high, share = 0.0, 1.0, 1.0
        for _ in range(STEPS):
            model = make(share)
            if self.size(model) > budget:
                high = share
            else:
                low, found = share, model
                if share == 1:
                    break
            share = (low + high) / 2
        if found is None:
            raise TooSmallError(
                f"{self.cell.name} {self.subset}: no smaller {self.cell.model} has at most the "
                f"{budget} {UNITS[self.equal]} of the module; leave this one out of "
                f"{self.section}.kinds"
            )
        return found
