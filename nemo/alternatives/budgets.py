"""Accuracy after little fine-tuning and after much, of modules and of what has their size (ours).

Each competitor is made once for a subset and a size, its BatchNorms are estimated anew, and a copy
of it is fine-tuned for each budget, with a cosine over exactly that budget. What counts is the end:
no epoch is chosen.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import torch
from torch import nn

from nemo.alternatives import ALTERNATIVES
from nemo.alternatives.context import Context, TooSmallError
from nemo.alternatives.rows import Row, kept_rows
from nemo.calibration import recalibrate_bn, training_batches
from nemo.cells import Cell, Layout
from nemo.config import STANDARD, Params
from nemo.cost import count_flops, count_parameters
from nemo.cut import decompose
from nemo.data import Batches, Prepared
from nemo.device import resolve_device
from nemo.models import family_named
from nemo.module import files as modules
from nemo.predict import accuracy, predict
from nemo.trained import WEIGHTS
from nemo.training.fit import NonFiniteLossError, Plan, fit
from nemo.training.tasks import Task, cross_entropy

MODULE = "module"  # the competitor that the others are measured against


def budgets(params: Params, cell: Cell, data: Prepared, layout: Layout) -> list[Row]:
    """A row for each subset, size, competitor and budget of `params.budgets`.

    Args:
        params: those of the cell's method.

    Raises:
        OSError, ValueError: what an earlier stage makes is missing or damaged, or a competitor
            cannot be made of this model.
    """
    asked, standard = params.budgets, replace(cell, method=STANDARD)
    subsets = asked.subsets or list(params.subsets)
    flops = subsets if asked.flops_subsets is None else asked.flops_subsets
    files = [layout.train(cell) / WEIGHTS, layout.train(standard) / WEIGHTS]
    files += [layout.module(cell, subset) / modules.WEIGHTS for subset in subsets]
    rows: list[Row] = []
    rates: dict[str, float] = {}  # of each competitor: chosen where it is made first
    with kept_rows("budgets", params, cell, data, files) as keep:
        for subset in subsets:
            for equal in asked.equal:
                if equal == "flops" and subset not in flops:
                    continue
                context = Context(params, cell, subset, data, layout, equal, "budgets")
                for name in (MODULE, *asked.kinds):
                    curve = partial(_curve, context, name, rates.get(name))
                    size = "" if name == MODULE else f"{equal} "  # it is one module for both sizes
                    found = keep(f"{subset} {size}{name}", curve)
                    if found[0]["lr"] is not None:
                        rates.setdefault(name, found[0]["lr"])
                    rows += [{**row, "equal": equal} for row in found]
    return rows


def _curve(context: Context, name: str, lr: float | None) -> list[Row]:
    """The rows of a competitor; its learning rate is chosen where none is given."""
    asked = context.params.budgets
    bench = _Bench.of(context, name)
    named: Row = {"subset": context.subset, "competitor": name, "equal": context.equal}
    named["device"] = bench.device.type
    torch.manual_seed(context.cell.seed)
    start = perf_counter()
    try:
        model = _cut(context) if name == MODULE else ALTERNATIVES.named(name).make(context)
    except TooSmallError as error:
        sizes = dict.fromkeys(("lr", "parameters", "flops", "accuracy", "val_accuracy"))
        return [{**named, "epochs": e, **sizes, "note": str(error)} for e in asked.epochs]
    recalibrate_bn(model.to(bench.device), bench.train)
    named["make_seconds"] = bench.since(start)
    if name != MODULE:
        context.check_size(ALTERNATIVES.named(name), model)
    if lr is None:
        lr = bench.best_rate(model)
    named |= {"lr": lr, **_sizes(model, context.data)}
    return [
        {**named, "epochs": epochs, **bench.after(model, epochs, lr)} for epochs in asked.epochs
    ]


def _cut(context: Context) -> nn.Module:
    """The module, cut anew and checked: that is what its making takes."""
    modular = context.modular().cpu()
    return decompose(modular, context.masks(modular))


def _sizes(model: nn.Module, data: Prepared) -> Row:
    example = torch.zeros(1, 3, *data.size, device=next(model.parameters()).device)
    return {"parameters": count_parameters(model), "flops": count_flops(model, example)}


@dataclass(frozen=True)
class _Bench:
    """The images of a subset, and how models are fine-tuned and measured on them."""

    params: Params
    cell: Cell
    device: torch.device
    train: Batches
    validation: Batches
    test: Batches
    title: str

    @classmethod
    def of(cls, context: Context, name: str) -> _Bench:
        params, cell = context.params, context.cell
        part, device = context.data.restrict(context.classes()), resolve_device(params.device)
        size = params.finetune.batch_size
        validation, test = (
            Batches(part.splits[split], part.mean, part.std, 512, device=device)
            for split in ("val", "test")
        )
        train = training_batches(part, size, device, cell.seed)
        title = f"{cell.name} {context.subset} {name}"
        return cls(params, cell, device, train, validation, test, title)

    def since(self, start: float) -> float:
        """Seconds since then, once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return round(perf_counter() - start, 4)

    def after(self, model: nn.Module, epochs: float, lr: float) -> Row:
        """What a copy of the model reaches after so many epochs; a part of one is so many steps,
        one at least."""
        tuned = copy.deepcopy(model)
        start = perf_counter()
        if epochs:
            self._tune(tuned, epochs, lr)
        seconds = self.since(start)
        reached, validated = (accuracy(*predict(tuned, b)) for b in (self.test, self.validation))
        return {"accuracy": reached, "val_accuracy": validated, "tune_seconds": seconds}

    def best_rate(self, model: nn.Module) -> float:
        """The learning rate with the best validation accuracy after 1 epoch, or else the largest
        budget; between equals the lower validation loss decides.

        Raises:
            NonFiniteLossError: none of them trains.
        """
        asked, recipe = self.params.budgets, self.params.finetune
        epochs = 1.0 if 1 in asked.epochs else max(asked.epochs)
        found: dict[float, tuple[float, float]] = {}
        for scale in asked.lr_scales:
            lr, tuned = scale * recipe.lr.of(family_named(self.cell.model)), copy.deepcopy(model)
            try:
                if epochs:
                    self._tune(tuned, epochs, lr)
            except NonFiniteLossError as error:
                failed = error
                continue
            logits, labels = predict(tuned, self.validation)
            loss = cross_entropy(logits, logits, labels).item()
            found[lr] = (accuracy(logits, labels), -loss)
        if not found:
            raise failed
        return max(found, key=lambda lr: found[lr])

    def _tune(self, model: nn.Module, epochs: float, lr: float) -> None:
        recipe, each = self.params.finetune, len(self.train)
        steps = max(1, round(epochs * each))
        plan = Plan.of(recipe, family_named(self.cell.model))
        torch.manual_seed(self.cell.seed)
        fit(
            model,
            Task(cross_entropy),
            self.train,
            replace(plan, epochs=math.ceil(steps / each), lr=lr, t_max=steps, steps=steps),
            device=self.device,
            validate=_nothing,
            cuda_graphs=recipe.cuda_graphs,
            title=self.title,
        )


def _nothing() -> Row:
    """What is measured after an epoch: only the end counts."""
    return {}
