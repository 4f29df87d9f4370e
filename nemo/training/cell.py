"""Train one cell of the experiment, and load it again: standard, MwT or NeMo (paper section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from nemo.calibration import training_batches
from nemo.cells import Cell
from nemo.config import STANDARD, Params
from nemo.cost import count_parameters
from nemo.data import Batches, Prepared
from nemo.device import resolve_device
from nemo.distributed import broadcast_from_main, main_only, rank_and_world_size
from nemo.fields import Family, ParamsError
from nemo.files import new_folder, write_csv, write_json
from nemo.masking.generators import Modular, modularize
from nemo.masking.objectives import OBJECTIVES, Objective, Remembers
from nemo.models import DeitShape, build_model, family_named, family_of
from nemo.models.registry import Shape
from nemo.predict import accuracy, guess_accuracy, predict
from nemo.provenance import provenance
from nemo.recipe import training
from nemo.sections import TrainParams
from nemo.trained import ABOUT, WEIGHTS, save_weights
from nemo.training.checkpoint import Checkpoint, open_checkpoint
from nemo.training.cut_pass import ScheduledCutPass
from nemo.training.fit import Plan, Row, fit
from nemo.training.tasks import Task, guess_loss, label_loss, make_task

OnEpoch = Callable[[int, Row], None]


class AtChanceError(ArithmeticError):
    """A trained model knows no more than which class is the most frequent; see the message."""


def train_cell(
    params: Params,
    cell: Cell,
    data: Prepared,
    out: Path,
    on_epoch: OnEpoch = lambda e, r: None,
) -> list[Row]:
    """Train `cell` on `data` and write weights, history and metrics to the folder `out`; of several
    processes each calls this, and the first one writes. Returns the history.

    Raises:
        OSError: `out` cannot be written; found before any training.
        NonFiniteLossError: the loss became NaN or infinite.
        AtChanceError: the model learned nothing, and params do not say to keep it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    start, params = params.start_of(cell.method), params.for_method(cell.method)
    shape = params.architecture.of(cell.model)
    before, begin = params, None
    if start is not None:
        before = params.model_copy(update={"train": start})
        standard = Cell(cell.dataset, cell.model, STANDARD, cell.seed)
        begin = _standard(before, standard, data, shape, "start")
    teacher = _teacher(before, cell, data, shape)
    # the checkpoint goes only once the result is there
    key = _key(params, cell, data, shape, start)
    with main_only(open_checkpoint(key)) as checkpoint, main_only(new_folder(out)) as folder:
        model, history = _train(params, cell, data, shape, teacher, checkpoint, on_epoch, begin)
        if params.train.at_chance == "fail":
            check_learned(history[-1], data, params.base_of(cell.method), cell.name)
        if folder is not None:
            _write(folder, model, history, _describe(params, cell, data, shape, key["settings"]))
    return history


def check_learned(last: Row, data: Prepared, method: Objective, name: str) -> None:
    """Raise AtChanceError if a model's last epoch is no better on the validation images than
    always saying their most frequent class; or is by no more than luck, two standard errors, and
    its loss is none below that of a guess, in an epoch after the first, whose mean has the
    beginning in it."""
    labels = data.splits["val"].labels
    accuracy, chance = last["val_accuracy"], guess_accuracy(labels)
    luck = 2 * (chance * (1 - chance) / len(labels)) ** 0.5
    guess = guess_loss(data.splits["train"].labels)
    if accuracy <= chance or (
        last["epoch"] > 1 and label_loss(last) >= guess and accuracy <= chance + luck
    ):
        fields = method.params.model_fields if method.modular and method.params else {}
        tries = ["more train.epochs", "another train.lr"]
        if last.get("penalty_share") != 0:  # else the loss on masks is not to blame
            tries += [f"a smaller {method.pull}"] if method.pull else []
            tries += [f"a longer {method.section}.warmup"] if "warmup" in fields else []
        raise AtChanceError(
            f"{name}: validation accuracy {100 * accuracy:.1f} % is no better "
            f"{'' if accuracy <= chance else 'but by luck '}than always saying "
            f"the most frequent class ({100 * chance:.1f} %); try {', '.join(tries[:-1])} or "
            f"{tries[-1]}"
        )


def idle(history: Sequence[Row]) -> list[str]:
    """What params ask for, and what never acted: masks may be those of an untrained generator."""
    lines, where = [], f"in {len(history)} epochs; try more of them,"
    share = history[-1].get("penalty_share", 1)
    if share == 0:
        lines.append(
            f"the loss on masks waited for the task loss, and never counted {where} or another "
            "learning rate"
        )
    elif share < 1:
        lines.append(
            f"the loss on masks rose to {int(100 * share)} % of its weight {where} or a shorter "
            "warm-up"
        )
    if "cut_loss" in history[-1] and not any(row["cut_loss"] for row in history):
        lines.append(f"the cut pass never ran {where} a smaller `after`, or another learning rate")
    return lines


def _write(folder: Path, model: nn.Module, history: list[Row], about: dict[str, Any]) -> None:
    parameters = count_parameters(model.model if isinstance(model, Modular) else model)
    metrics = {
        "epochs": len(history),
        "generator_parameters": count_parameters(model) - parameters,
        "parameters": parameters,
        "val_accuracy": history[-1]["val_accuracy"],
    }
    save_weights(model, folder / WEIGHTS)
    write_csv(folder / "history.csv", history)
    write_json(folder / ABOUT, about)
    write_json(folder / "metrics.json", metrics)


def _teacher(params: Params, cell: Cell, data: Prepared, shape: Shape) -> nn.Module | None:
    """DeiT's teacher: the standard ResNet18 of the same data and seed, by the CNNs' recipe."""
    if not isinstance(shape, DeitShape):
        return None
    teacher = Cell(cell.dataset, "resnet18", STANDARD, cell.seed)
    return _standard(params, teacher, data, shape.teacher, "teacher")


def _standard(params: Params, cell: Cell, data: Prepared, shape: Shape, role: str) -> nn.Module:
    """A trained standard model that another training needs.

    It is trained inside the other's cell and kept beside the checkpoints for the next one, so that
    a cell depends on nothing but its own params.
    """
    key = {**_key(params, cell, data, shape), "role": role}
    teacher = _teacher(params, cell, data, shape)
    with main_only(open_checkpoint(key, keep=True)) as checkpoint:
        saved = checkpoint.folder / WEIGHTS if checkpoint else Path()  # the others do not look
        if not broadcast_from_main(saved.exists):
            trained, history = _train(
                params, cell, data, shape, teacher, checkpoint, lambda epoch, row: None
            )
            if params.train.at_chance == "fail":
                check_learned(history[-1], data, OBJECTIVES[STANDARD], cell.name)
            if checkpoint:
                unfinished = saved.with_suffix(".partial")
                save_weights(trained, unfinished)
                unfinished.replace(saved)
        # always from the file, so that all who need it see the same bits
        model = build_model(cell.model, len(data.classes), data.size[0], shape)
        model.load_state_dict(broadcast_from_main(lambda: load_file(saved)))
        return model.to(resolve_device(params.device))


def _train(
    params: Params,
    cell: Cell,
    data: Prepared,
    shape: Shape,
    teacher: nn.Module | None,
    checkpoint: Checkpoint | None,
    on_epoch: OnEpoch,
    begin: nn.Module | None = None,
) -> tuple[nn.Module, list[Row]]:
    device = resolve_device(params.device)
    torch.manual_seed(cell.seed)
    base = build_model(cell.model, len(data.classes), data.size[0], shape)
    if begin is not None:
        base.load_state_dict(begin.state_dict())
    if teacher is not None:
        base.set_distilled_training(True)  # type: ignore[operator]
    family = family_of(cell.model, base)
    model = modularize(base) if params.base_of(cell.method).modular else base
    model.to(device)
    channels_last = params.train.channels_last and family == "cnn" and _may_be_channels_last(model)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    how: Any = {"channels_last": channels_last, "part": rank_and_world_size()}
    drawn: Any = {"per_class": params.train.per_class, "steps": params.train.steps}
    batch_size = params.train.batch_size
    batches = training_batches(data, batch_size, device, cell.seed, **how, **drawn)
    task = _task(params, cell, family, model, data, teacher, len(batches))
    history = fit(
        model,
        task,
        batches,
        Plan.of(params.train, family),
        device=device,
        validate=_validation(params, model, data, device, how),
        amp=params.train.amp,
        cuda_graphs=params.train.cuda_graphs,
        memory=task,
        checkpoint=checkpoint,
        on_epoch=on_epoch,
        title=cell.name,
    )
    return model, history


def _task(
    params: Params,
    cell: Cell,
    family: Family,
    model: nn.Module,
    data: Prepared,
    teacher: nn.Module | None,
    steps: int,
) -> Task:
    """What the `steps` of each epoch minimise."""
    method, device = params.base_of(cell.method), next(model.parameters()).device
    section, classes = params.section(method.section), len(data.classes)
    cut, cut_pass = getattr(section, "cut", None), None
    if isinstance(model, Modular) and cut is not None:
        if cut.every > steps:
            raise ParamsError(
                f"{method.section}.cut.every: {cut.every}; accepted: at most the {steps} steps of "
                "an epoch"
            )
        epochs = params.train.epochs.of(family)
        cut_pass = ScheduledCutPass(cut, model, classes, epochs, cell.seed)
    labels = data.splits["train"].labels
    task = make_task(method, section, family, labels, device, teacher, cut_pass)
    if isinstance(model, Modular) and isinstance(task.penalty, Remembers):
        task.penalty.begin(model.layers, classes, device)
    return task


def _validation(
    params: Params, model: nn.Module, data: Prepared, device: torch.device, how: dict[str, Any]
) -> Callable[[], Row]:
    """What measures `model` on the validation images, and where asked for on the test images."""
    watched = {
        f"{split}_accuracy": Batches(
            data.splits[split], data.mean, data.std, 512, device=device, **how
        )
        for split in (("val", "test") if params.train.watch_test else ("val",))
    }
    return lambda: {name: accuracy(*predict(model, images)) for name, images in watched.items()}


def _may_be_channels_last(model: nn.Module) -> bool:
    """Not with a strided 1 x 1 convolution of fewer than 16 channels: on more than one CPU thread,
    torch 2.14's channels-last kernel for it writes out of bounds."""
    return not any(
        isinstance(m, nn.Conv2d)
        and m.kernel_size == (1, 1)
        and max(m.stride) > 1
        and m.in_channels < 16
        for m in model.modules()
    )


def _key(
    params: Params, cell: Cell, data: Prepared, shape: Shape, start: TrainParams | None = None
) -> dict[str, Any]:
    """What decides the result of training a cell."""
    family = family_named(cell.model)
    return {
        **training(params, params.base_of(cell.method), cell.model, shape, family, start),
        "seed": cell.seed,
        "device": params.device,
        "data": data.sha256,
        "augment": [data.flip, data.crop],
    }


def _describe(
    params: Params, cell: Cell, data: Prepared, shape: Shape, settings: dict[str, Any]
) -> dict[str, Any]:
    return {
        "dataset": cell.dataset,
        "model": cell.model,
        "method": cell.method,
        "modular": params.base_of(cell.method).modular,
        "seed": cell.seed,
        "classes": len(data.classes),
        "image_size": data.size[0],
        "shape": shape.model_dump(),
        "settings": settings,
        "made": provenance(resolve_device(params.device)),
    }
