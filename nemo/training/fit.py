"""One training loop for every method: standard, MwT, NeMo, distillation and fine-tuning (ours)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from nemo.config import Family, Recipe
from nemo.data import Batches
from nemo.training.checkpoint import Checkpoint

# What to try besides a smaller lr, by the part of the loss that says which method it is.
REMEDIES = {
    "contrast": ", a smaller loss.alpha or a larger loss.tau",
    "cohesion_loss": " or smaller mwt.alpha and mwt.beta",
}
Row = dict[str, float]
TaskFunction = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]


class NonFiniteLossError(FloatingPointError):
    """Training met NaN or infinity; the message says where and what to try."""


@dataclass(frozen=True)
class Plan:
    """A recipe for one family of models."""

    epochs: int
    optimizer: str
    lr: float
    momentum: float
    weight_decay: float
    t_max: int  # epochs in which the cosine falls to 0

    @classmethod
    def of(cls, recipe: Recipe, family: Family, t_max: int | None = None) -> Plan:
        epochs = recipe.epochs.of(family)
        return cls(
            epochs,
            recipe.optimizer.of(family),
            recipe.lr.of(family),
            recipe.momentum,
            recipe.weight_decay.of(family),
            t_max or epochs,
        )

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        weights = [p for p in model.parameters() if p.requires_grad]
        if self.optimizer == "adamw":
            return torch.optim.AdamW(weights, self.lr, weight_decay=self.weight_decay, fused=True)
        return torch.optim.SGD(
            weights,
            self.lr,
            momentum=self.momentum,
            nesterov=self.momentum > 0,
            weight_decay=self.weight_decay,
            fused=True,
        )


def fit(
    model: nn.Module,
    task: TaskFunction,
    batches: Batches,
    plan: Plan,
    *,
    device: torch.device,
    validate: Callable[[], Row],
    amp: bool = False,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[[int, Row], None] = lambda epoch, row: None,
    title: str = "training",
) -> list[Row]:
    """Train `model` in place for `plan.epochs` epochs; return a row of averages for each.

    The order and augmentation of the data are a function of (seed, epoch) alone, and the rest of
    the state is in the checkpoint: a resumed training ends with the weights of an undisturbed one.

    Args:
        task: gives a dict with `loss` and parts, all scalars.
        validate: gives the validation columns of a row; runs after each epoch.
        on_epoch: called with (epoch, row) after the checkpoint of that epoch is written.

    Raises:
        NonFiniteLossError: the loss, or a weight at the end of an epoch, became NaN or infinite.
    """
    optimizer = plan.make_optimizer(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.t_max)
    state = checkpoint.load(device) if checkpoint else None
    history: list[Row] = []
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        history = state["history"]
        _set_rng(state["rng"], device)
    with _progress() as progress:
        bar = progress.add_task(title, total=plan.epochs, completed=len(history), shown="")
        for epoch in range(len(history) + 1, plan.epochs + 1):
            batches.set_epoch(epoch)
            lr = scheduler.get_last_lr()[0]
            means = _train_epoch(model, task, batches, optimizer, device, amp, epoch)
            _check_weights(model, epoch)
            scheduler.step()
            row: Row = {"epoch": epoch, "lr": float(lr), **means, **validate()}
            history.append(row)
            if checkpoint:
                checkpoint.save(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "scheduler": scheduler.state_dict(),
                        "history": history,
                        "rng": _get_rng(device),
                    }
                )
            on_epoch(epoch, row)
            progress.update(bar, advance=1, shown=f"loss {row['loss']:.3f}")
    return history


def _train_epoch(
    model: nn.Module,
    task: TaskFunction,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    amp: bool,
    epoch: int,
) -> Row:
    model.train()
    totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))
    seen = 0
    for step, (images, labels) in enumerate(batches, 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            parts = task(model, images, labels)
        if not torch.isfinite(parts["loss"]):
            raise NonFiniteLossError(_non_finite(parts, epoch, step))
        optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        optimizer.step()
        seen += len(labels)
        for name, value in parts.items():
            totals[name] += value.detach() * len(labels)
    return {name: round(total.item() / seen, 6) for name, total in totals.items()}


def _non_finite(parts: dict[str, Tensor], epoch: int, step: int) -> str:
    bad = [name for name, value in parts.items() if not math.isfinite(value.item())]
    remedy = "".join(text for name, text in REMEDIES.items() if name in parts)
    return f"epoch {epoch}, step {step}: {', '.join(bad)} is not finite; try a smaller lr{remedy}"


def _check_weights(model: nn.Module, epoch: int) -> None:
    """The loss of a step does not see what the last step of an epoch does to the weights."""
    if not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise NonFiniteLossError(
            f"epoch {epoch}, after its last step: weights are not finite; try a smaller lr"
        )


def _get_rng(device: torch.device) -> dict[str, Tensor]:
    """The random states that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def _set_rng(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    elif "mps" in state:
        torch.mps.set_rng_state(state["mps"].cpu())


def _progress() -> Progress:
    """A bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
