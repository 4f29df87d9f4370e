"""What else has the size of a module: the obvious alternatives, with the same fine-tuning budget.

Per class subset, each with at most as many parameters as NeMo's module and trained as it is:
`random` is the module's own architecture with fresh weights, `pruned` the standard model cut down
by magnitude (torch-pruning) with its head restricted to the subset, `dense` a narrower model of the
same family from scratch. `nemo, mean` is NeMo's module with the mean masks of gap.py folded into
its weights. Of full size are `standard, tuned`, the standard model with its head restricted to the
subset, and, not fine-tuned, the standard model of the evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.study.gap import scaled, subset_means
from benchmarks.study.plan import Unit
from nemo.cells import Cell, Layout
from nemo.config import CnnShape, Params, VitShape
from nemo.cost import count_flops, count_parameters
from nemo.cut import decompose
from nemo.data import Batches, Prepared, parse_subset
from nemo.device import resolve_device
from nemo.evaluation.modular import load_class_masks
from nemo.masking.generators import Modular
from nemo.models import build_model, family_of
from nemo.module.files import load
from nemo.predict import accuracy, predict
from nemo.trained import load_cell, weights_sha256
from nemo.training.finetune import finetune

STEPS = 12  # of the bisections for a size


def baselines(
    params: Params, unit: Unit, data: Prepared, layout: Layout
) -> Iterator[tuple[Path, Callable[[], list[dict[str, Any]]]]]:
    """A file for each subset and baseline, and what makes its row."""
    for subset in params.subsets:
        for name, make in BASELINES.items():
            file = layout.root / "baselines" / f"{subset}-{name}.json"
            yield file, partial(_measure, name, make, params, unit, data, layout, subset)


def _measure(
    name: str,
    make: Callable[..., nn.Module],
    params: Params,
    unit: Unit,
    data: Prepared,
    layout: Layout,
    subset: str,
) -> list[dict[str, Any]]:
    torch.manual_seed(unit.seed)
    model = make(params, unit, data, layout, subset)
    title = f"{unit.name} {subset} {name}"
    return [{"baseline": name, "subset": subset, **tuned(model, params, unit, data, subset, title)}]


def tuned(
    model: nn.Module, params: Params, unit: Unit, data: Prepared, subset: str, title: str
) -> dict[str, Any]:
    """Size, and test accuracy before and after the fine-tuning that a module gets."""
    part = data.restrict(parse_subset(subset, data.classes))
    device = resolve_device(params.device)
    test = Batches(part.splits["test"], data.mean, data.std, 256, device=device)
    costs = {
        "parameters": count_parameters(model),
        "flops": count_flops(model, torch.zeros(1, 3, *data.size)),
        "accuracy_step0": accuracy(*predict(model.to(device), test)),
    }
    family = family_of(unit.model, model)
    history, metrics = finetune(model, part, family, params, unit.seed, title, watch_test=True)
    return {
        **costs,
        **metrics,
        "accuracy": accuracy(*predict(model, test)),
        "best_test_accuracy": max(row["test_accuracy"] for row in history),
    }


def _random(params: Params, unit: Unit, data: Prepared, layout: Layout, subset: str) -> nn.Module:
    module = load(layout.module(nemo_cell(unit, data), subset))
    own = {
        id(p) for m in module.modules() if hasattr(m, "reset_parameters") for p in m.parameters()
    }
    for layer in module.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    for parameter in module.parameters():
        if id(parameter) not in own:  # tokens and position embeddings
            nn.init.trunc_normal_(parameter, std=0.02)
    return module


def _dense(params: Params, unit: Unit, data: Prepared, layout: Layout, subset: str) -> nn.Module:
    shape, classes = params.architecture.of(unit.model), parse_subset(subset, data.classes)

    def narrower(share: float) -> nn.Module:
        if isinstance(shape, VitShape):
            dim = max(shape.heads, int(shape.dim * share) // shape.heads * shape.heads)
            smaller = shape.model_copy(update={"dim": dim})
        else:
            assert isinstance(shape, CnnShape)
            smaller = CnnShape(width=shape.width * share)
        return build_model(unit.model, len(classes), data.size[0], smaller)

    return _largest_within(_budget(unit, data, layout, subset), narrower)


def _whole(params: Params, unit: Unit, data: Prepared, layout: Layout, subset: str) -> nn.Module:
    trained = load_cell(layout.train(Cell(data.name, unit.model, "standard", unit.seed)))
    trained.requires_grad_(True)
    _restrict_heads(trained, parse_subset(subset, data.classes), len(data.classes))
    return trained


def _pruned(params: Params, unit: Unit, data: Prepared, layout: Layout, subset: str) -> nn.Module:
    import torch_pruning as tp

    trained = load_cell(layout.train(Cell(data.name, unit.model, "standard", unit.seed)))
    trained.requires_grad_(True)
    heads = _restrict_heads(trained, parse_subset(subset, data.classes), len(data.classes))
    example = torch.zeros(1, 3, *data.size)

    def pruned(share: float) -> nn.Module:
        model = copy.deepcopy(trained)
        attention = {
            m.qkv: m.num_heads
            for m in model.modules()
            if hasattr(m, "qkv") and hasattr(m, "num_heads")
        }
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=1 - share,
            ignored_layers=[model.get_submodule(name) for name in heads],
            num_heads=attention,
        )
        pruner.step()
        for block in model.modules():  # timm reads these in forward
            if hasattr(block, "qkv") and hasattr(block, "num_heads"):
                block.num_heads = pruner.num_heads[block.qkv]
                block.attn_dim = block.qkv.out_features // 3
                block.head_dim = block.attn_dim // block.num_heads
        return model

    return _largest_within(_budget(unit, data, layout, subset), pruned)


def _mean(params: Params, unit: Unit, data: Prepared, layout: Layout, subset: str) -> nn.Module:
    cell = nemo_cell(unit, data)
    modular = load_cell(layout.train(cell)).to(resolve_device(params.device))
    assert isinstance(modular, Modular)
    masks = load_class_masks(
        layout.masks(cell), modular.layers, weights_sha256(layout.train(cell))
    ).select(parse_subset(subset, data.classes))
    return decompose(scaled(modular, subset_means(params, modular, data, subset)).cpu(), masks)


BASELINES = {
    "random": _random,
    "pruned": _pruned,
    "dense": _dense,
    "nemo, mean": _mean,
    "standard, tuned": _whole,
}


def _restrict_heads(model: nn.Module, classes: Sequence[int], count: int) -> list[str]:
    """Keep the rows of `classes` in the last Linear with one output per class; its name."""
    names = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == count
    ]
    head = names[-1]
    linear = model.get_submodule(head)
    assert isinstance(linear, nn.Linear)
    rows = list(classes)
    linear.weight = nn.Parameter(linear.weight.detach()[rows].clone())
    linear.bias = nn.Parameter(linear.bias.detach()[rows].clone())
    linear.out_features = len(rows)
    return [head]


def _largest_within(budget: int, make: Callable[[float], nn.Module]) -> nn.Module:
    """The model with the largest share in (0, 1] and at most `budget` parameters."""
    low, high = 0.0, 1.0
    best = make(1.0)
    if count_parameters(best) <= budget:
        return best
    found: nn.Module | None = None
    for _ in range(STEPS):
        middle = (low + high) / 2
        model = make(middle)
        if count_parameters(model) <= budget:
            low, found = middle, model
        else:
            high = middle
    if found is None:
        raise ValueError(f"no model of this family has at most {budget} parameters")
    return found


def _budget(unit: Unit, data: Prepared, layout: Layout, subset: str) -> int:
    return count_parameters(load(layout.module(nemo_cell(unit, data), subset)))


def nemo_cell(unit: Unit, data: Prepared) -> Cell:
    return Cell(data.name, unit.model, "nemo", unit.seed)
