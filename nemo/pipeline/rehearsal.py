"""What can be cut out of a model, seen before it is trained (ours).

A rehearsal takes one step of training with a copy, and cuts every masked layer of another one at
random. So an architecture that cannot be trained or traced, or an op that cannot be saved, costs
seconds and not a training, and the ops at which neurons must stay are known beforehand.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn

from nemo.calibration import recalibrate_bn
from nemo.cut import decompose
from nemo.data import Batches, Prepared
from nemo.masking.generators import Modular
from nemo.masking.losses import contrastive_loss
from nemo.module.codec import RefusedError, encode, rehearsed
from nemo.training.tasks import Distillation, cross_entropy

KEPT = 0.5  # of the neurons, by the rehearsal's masks
IMAGES = 8


def rehearse(modular: Modular, data: Prepared, distilled: bool = False) -> dict[str, Any]:
    """The report of a module cut at random out of a copy of `modular`, which stays as it is.

    A few images of `data` are those of the step, and give the BatchNorms their statistics.

    Args:
        distilled: the model gives two logits in train mode, one of them for a teacher.

    Raises:
        ValueError: the model cannot be trained, traced or cut, or its module could not be saved.
    """
    random = torch.Generator().manual_seed(0)
    batch = next(iter(Batches(data.splits["train"], data.mean, data.std, IMAGES)))
    _train_step(modular, *batch, len(data.classes), distilled)
    model = copy.deepcopy(modular.model).cpu().eval()
    _enliven(model, random)
    recalibrate_bn(model, [batch])
    masks = {
        layer: torch.rand(neurons, generator=random) < KEPT
        for layer, neurons in modular.layers.items()
    }
    try:
        module = decompose(model, masks, example=batch[0])
    except (RuntimeError, ArithmeticError) as error:
        raise ValueError(f"the model cannot be cut: {' '.join(str(error).split())}") from error
    try:  # as `save` does
        rehearsed(json.loads(json.dumps(encode(module))), module.state_dict())
    except RefusedError as error:
        raise ValueError(f"a module of this model could not be saved: {error}") from None
    return module.report


def _train_step(
    modular: Modular, images: Tensor, labels: Tensor, classes: int, distilled: bool
) -> None:
    """One step forward and backward, as the training will take it."""
    twin = copy.deepcopy(modular).cpu().train()
    task = Distillation(copy.deepcopy(twin.model)) if distilled else cross_entropy
    wrong = "the model cannot be trained: "
    with torch.random.fork_rng():
        try:
            output, masks = twin(images)
            shape = getattr(output, "shape", None)
            if not distilled and shape != (len(images), classes):
                got = type(output).__name__ if shape is None else tuple(shape)
                wanted = "that returns logits in both modes, such as one without auxiliary heads"
                raise ValueError(
                    f"in train mode it returns {got}, not (B, {classes}) logits; accepted: a model "
                    + (wanted if shape is None else f"of {classes} classes")
                )
            loss = task(output, images, labels) + contrastive_loss(masks, labels, tau=0.2)
            loss.backward()
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ValueError(wrong + " ".join(str(error).split())) from error
    if not bool(loss.isfinite()):
        raise ValueError(f"{wrong}the loss of its first step is {loss.item()}")


def _enliven(model: nn.Module, random: torch.Generator) -> None:
    """Parameters that all start at one value, such as a branch's last scale at zero, vary: a dead
    branch would go whole, and nothing be learned of its ops."""
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        if bool((flat == flat[0]).all()):
            noise = torch.randn(parameter.shape, generator=random)
            scale = 0.2 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.data = (float(flat[0] != 0) + scale * noise).to(parameter.dtype)


def coverage(modular: Modular, report: dict[str, Any]) -> list[str]:
    """Lines that say how much of a model is masked, what is not and why, and which ops block."""
    masked, skipped = modular.layers, modular.skipped
    width = max(map(len, skipped), default=0)
    return [
        f"masked: {len(masked)} of {len(masked) + len(skipped)} layers, "
        f"{sum(masked.values()):,} neurons",
        *(f"skipped: {layer:<{width}}  {why}" for layer, why in skipped.items()),
        f"ops at which neurons must stay: {', '.join(report['blocked']) or 'none'}",
    ]


def layer_table(layers: dict[str, int], kept: dict[str, Any] | None = None) -> list[str]:
    """A line per masked layer: its neurons, and those that a module kept of them.

    Args:
        kept: `report["layers"]` of the module.
    """
    width = max(map(len, [*layers, "layer"]))
    lines = [f"{'layer':<{width}}  neurons" + ("     kept" if kept else "")]
    for layer, neurons in layers.items():
        left = f"  {kept[layer]['kept']:>7,}" if kept else ""
        lines.append(f"{layer:<{width}}  {neurons:>7,}{left}")
    return lines
