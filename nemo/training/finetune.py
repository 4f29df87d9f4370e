"""Fine-tune a module on the images of its classes (paper section 4.5).

The epoch is chosen on validation images; the authors' code takes the best one on the test set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nemo.calibration import recalibrate_bn, training_batches
from nemo.config import Params
from nemo.data import Batches, Prepared
from nemo.device import resolve_device
from nemo.distributed import rank_and_world_size
from nemo.fields import Family
from nemo.predict import accuracy, predict
from nemo.training.fit import Plan, Row, fit
from nemo.training.tasks import Task, cross_entropy


def reset_head(module: nn.Module, names: Sequence[str]) -> None:
    """Draw the classifier's weights anew: the head of the authors' modules is a new one.

    Raises:
        ValueError: no names; the classifier is no Linear that reads one vector per image.
    """
    if not names:
        raise ValueError("finetune.head: this module's classifier cannot be replaced; use inherit")
    for name in names:
        head = module.get_submodule(name)
        if not isinstance(head, nn.Linear):
            kind = type(head).__name__
            raise ValueError(f"finetune.head: the classifier {name} is a {kind}; accepted: inherit")
        head.reset_parameters()


def finetune(
    module: nn.Module,
    data: Prepared,
    family: Family,
    params: Params,
    seed: int,
    title: str,
    *,
    heads: Sequence[str] = (),
) -> tuple[list[Row], dict[str, float]]:
    """Fine-tune `module` in place on `data`, whose labels must be those of its logits.

    Epoch 0 is the module with its new head or re-estimated BatchNorm, where params ask for them,
    before any training step. The weights of the epoch with the best validation accuracy are kept,
    the lower validation loss deciding between equals.

    Args:
        heads: names of the classifier's layers, which `finetune.head: new` draws anew.

    Returns:
        The history, a row per epoch, and the metrics: validation accuracy as cut, at the chosen
        epoch, and that epoch.
    """
    recipe, device = params.finetune, resolve_device(params.device)
    module.to(device)
    torch.manual_seed(seed)
    validate = _validation(module, data, device, recipe.watch_test)
    as_cut = validate()
    if recipe.head == "new":
        reset_head(module, heads)
    if recipe.recalibrate_bn:
        recalibrate_bn(module, training_batches(data, recipe.batch_size, device, seed))
    start = validate()
    best = _Best(module)
    best.see(0, start)
    history = fit(
        module,
        Task(cross_entropy),
        training_batches(data, recipe.batch_size, device, seed, part=rank_and_world_size()),
        Plan.of(recipe, family, recipe.t_max.of(family) if recipe.t_max else None),
        device=device,
        validate=validate,
        cuda_graphs=recipe.cuda_graphs,
        on_epoch=best.see,
        title=title,
    )
    epoch, row = best.restore()
    metrics = {
        "best_epoch": epoch,
        "val_accuracy": row["val_accuracy"],
        "val_accuracy_recalibrated": start["val_accuracy"],
        "val_accuracy_step0": as_cut["val_accuracy"],
    }
    return history, metrics


def _validation(
    module: nn.Module, data: Prepared, device: torch.device, watch_test: bool
) -> Callable[[], Row]:
    """What measures `module` on the validation images, and where asked for on the test images."""
    where: Any = {"device": device, "part": rank_and_world_size()}
    validation, test = (
        Batches(data.splits[split], data.mean, data.std, 512, **where) for split in ("val", "test")
    )

    def validate() -> Row:
        logits, labels = predict(module, validation)
        row: Row = {
            "val_accuracy": accuracy(logits, labels),
            "val_loss": cross_entropy(logits, logits, labels).item(),
        }
        if watch_test:
            row["test_accuracy"] = accuracy(*predict(module, test))
        return row

    return validate


class _Best:
    """Remembers the weights of the best epoch."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.epoch = 0
        self.row: Row = {"val_accuracy": -1.0, "val_loss": 0.0}
        self.state: dict[str, Tensor] = {}

    def see(self, epoch: int, row: Row) -> None:
        better = (row["val_accuracy"], -row["val_loss"])
        if better > (self.row["val_accuracy"], -self.row["val_loss"]):
            self.epoch, self.row = epoch, row
            self.state = {k: v.detach().clone() for k, v in self.module.state_dict().items()}

    def restore(self) -> tuple[int, Row]:
        self.module.load_state_dict(self.state)
        return self.epoch, self.row
