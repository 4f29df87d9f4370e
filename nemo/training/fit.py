"""One training loop for every method: standard, MwT, NeMo, distillation and fine-tuning (ours)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn

from nemo.data import Batches
from nemo.device import repeatable
from nemo.distributed import (
    broadcast_from_main,
    ddp,
    distributed,
    is_main,
    rank_and_world_size,
)
from nemo.fields import Family
from nemo.sections import Recipe
from nemo.training.checkpoint import Checkpoint
from nemo.training.gradients import Gradients, RecordedGradients, TaskFunction

Row = dict[str, float]


class Memory(Protocol):
    """What a task knows of the epochs so far."""

    def before_epoch(self, history: list[Row]) -> None:
        """Called with the rows of all epochs so far, also those before a resumption."""

    def state_dict(self) -> dict[str, Any]:
        """What must be known to go on after an epoch, besides the history."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


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
    t_max: int  # epochs in which the cosine falls to 0; steps, where `steps` says how many
    steps: int | None = None  # the training ends after these, also amid an epoch

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
    cuda_graphs: bool = False,
    memory: Memory | None = None,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[[int, Row], None] = lambda epoch, row: None,
    title: str = "training",
) -> list[Row]:
    """Train `model` in place for `plan.epochs` epochs; return a row of averages for each.

    The order and augmentation of the data are a function of (seed, epoch) alone, and the rest of
    the state is in the checkpoint: a resumed training ends with the weights of an undisturbed one.

    Of several processes each calls this, with an equal model, its part of the batches and, but for
    the first, no checkpoint; all end with the same weights and rows.

    Args:
        task: gives a dict with `loss` and parts, all scalars, of the whole batch.
        cuda_graphs: on a CUDA device, replay one recording of the step; see RecordedGradients.
        memory: of a task that changes from epoch to epoch.
        validate: gives the validation columns of a row; runs after each epoch.
        on_epoch: called with (epoch, row) after the checkpoint of that epoch is written.

    Raises:
        NonFiniteLossError: the loss, or a weight at the end of an epoch, became NaN or infinite.
        ParamsError: `cuda_graphs` where a step cannot be recorded.
    """
    assert not (cuda_graphs and distributed()), "params say that they do not go together"
    state = _State(model, plan, device, memory)
    saved = broadcast_from_main(
        lambda: checkpoint.load(torch.device("cpu")) if checkpoint else None
    )
    if saved is not None:
        state.restore(saved)
    trained = ddp(model)
    gradients = Gradients(trained, task, device, amp)
    if cuda_graphs and device.type == "cuda":
        gradients = RecordedGradients(trained, task, device, amp, batches.batch_size)
    with repeatable(device), _progress() as progress:
        done = len(state.history)
        bar = progress.add_task(title, total=plan.epochs, completed=done, shown="")
        for epoch in range(done + 1, plan.epochs + 1):
            batches.set_epoch(epoch)
            if memory is not None:
                memory.before_epoch(state.history)
            _decorrelate(batches.seed, epoch)
            lr = state.scheduler.get_last_lr()[0]
            means = _train_epoch(gradients, batches, state, epoch, plan.steps)
            _check_weights(model, epoch)
            if plan.steps is None:
                state.scheduler.step()
            row: Row = {"epoch": epoch, "lr": float(lr), **means, **validate()}
            state.history.append(row)
            if checkpoint:
                checkpoint.save(state.to_save())
            on_epoch(epoch, row)
            progress.update(bar, advance=1, shown=f"loss {row['loss']:.3f}")
    return state.history


class _State:
    """All that changes from epoch to epoch, as a checkpoint holds it."""

    def __init__(
        self, model: nn.Module, plan: Plan, device: torch.device, memory: Memory | None
    ) -> None:
        self.device = device
        self.optimizer = plan.make_optimizer(model)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, plan.t_max)
        self.parts: dict[str, Any] = {
            "model": model, "optimizer": self.optimizer, "scheduler": self.scheduler
        }  # fmt: skip
        if memory is not None:
            self.parts["task"] = memory
        self.history: list[Row] = []

    def to_save(self) -> dict[str, Any]:
        states = {name: part.state_dict() for name, part in self.parts.items()}
        return {**states, "history": self.history, "rng": _get_rng(self.device)}

    def restore(self, saved: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        self.history = saved["history"]
        _set_rng(saved["rng"], self.device)


def _train_epoch(
    gradients: Gradients, batches: Batches, state: _State, epoch: int, steps: int | None
) -> Row:
    left = None if steps is None else steps - (epoch - 1) * len(batches)
    gradients.model.train()
    # looking at a loss makes the CPU wait for a GPU, which then waits for the next launch
    every = 1 if gradients.device.type == "cpu" else 16
    log: list[Tensor] = []
    sizes: list[int] = []
    for images, labels in islice(batches, left):
        log.append(gradients(images, labels))
        sizes.append(len(labels))
        if len(log) % every == 0:
            _check_loss(gradients, log[-every:], epoch, len(log) - every)
        state.optimizer.step()
        if steps is not None:
            state.scheduler.step()
    _check_loss(gradients, log[-every:], epoch, len(log[:-every]))
    share = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    means = share @ torch.stack(log).cpu().double()
    return {n: round(mean, 6) for n, mean in zip(gradients.names, means.tolist(), strict=True)}


def _check_loss(gradients: Gradients, log: list[Tensor], epoch: int, before: int) -> None:
    """Raise NonFiniteLossError at the first step whose loss is not finite; of several processes
    all see the same loss, and all stop."""
    for step, parts in enumerate(torch.stack(log).tolist(), before + 1):
        values = dict(zip(gradients.names, parts, strict=True))
        if not math.isfinite(values["loss"]):
            bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
            raise NonFiniteLossError(
                f"epoch {epoch}, step {step}: {bad} is not finite; try a smaller lr"
                + getattr(gradients.task, "remedy", "")
            )


def _decorrelate(seed: int, epoch: int) -> None:
    """Give each of several processes dropout of its own: a function of the epoch, as the data is,
    so that resuming needs no random state of theirs."""
    if distributed():
        mixed = np.random.SeedSequence([seed, epoch, *rank_and_world_size()]).generate_state(1)
        torch.manual_seed(int(mixed[0]))


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
    """A bar on the first process's terminal, nothing elsewhere."""
    console = Console(stderr=True)
    return Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        console=console,
        disable=not (console.is_terminal and is_main()),
    )
