"""What labels, classes and batches must be like (ours)."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nemo.signature import check_targets


def positions(classes: Any) -> list[int]:
    """Classes as integers. Raise ValueError where they are something else, also bools."""
    try:
        listed = list(classes)
        if not any(getattr(c, "dtype", type(c)) in (bool, torch.bool) for c in listed):
            return [operator.index(c) for c in listed]
    except TypeError:
        pass
    raise ValueError(f"classes: {classes!r}; accepted: positions, such as [3, 5]")


def integer(name: str, value: Any, least: int) -> int:
    """Raise ValueError, which calls it `name`, unless it is an integer and `least` or above."""
    try:
        if operator.index(value) >= least:
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{name}: {value!r}; accepted: integers from {least}")


def integers(name: str, values: Any, least: int) -> list[int]:
    """A list of these; raise ValueError unless it is one."""
    try:
        listed = list(values)
    except TypeError:
        raise ValueError(f"{name}: {values!r}; accepted: a list of integers from {least}") from None
    return [integer(name, value, least) for value in listed]


def check_labels(labels: Tensor, masks: Mapping[str, Tensor], classes: int | None = None) -> None:
    """Raise ValueError unless labels are (B,) integers, one for each row of the masks (B, N_l),
    and positions of `classes`: others would broadcast to something."""
    if not isinstance(masks, Mapping):
        kind = type(masks).__name__
        raise ValueError(f"masks: a {kind}; accepted: {{layer: (B, N_l)}}, of (logits, masks)")
    check_targets(labels)
    if classes is not None:
        wide = labels.long()  # uint8 ends at 255
        unknown = wide[(wide < 0) | (wide >= classes)]
        if len(unknown):
            raise ValueError(f"labels hold {int(unknown[0])}; accepted: 0..{classes - 1}")
    for layer, mask in masks.items():
        if mask.ndim != 2 or len(mask) != len(labels):
            raise ValueError(
                f"masks[{layer!r}] has shape {tuple(mask.shape)}: expected ({len(labels)}, N_l), "
                "one row per label"
            )
