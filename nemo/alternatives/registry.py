"""What an alternative is, and the decorator that adds one (ours)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo.registry import Registry

if TYPE_CHECKING:
    from torch import nn

    from nemo.alternatives.context import Context

Make = Callable[["Context"], "nn.Module"]


@dataclass(frozen=True)
class Alternative:
    """A model that a module is compared with.

    Attributes:
        label: what tables and figures call it.
        make: gives the model, not yet fine-tuned, whose logits are those of the subset's classes.
        budget: whether it has at most the parameters of the module; it is an error if it has more.
    """

    name: str
    label: str
    make: Make
    budget: bool


ALTERNATIVES: Registry[Alternative] = Registry("alternative")


def alternative(name: str, *, label: str, budget: bool) -> Callable[[Make], Make]:
    """Register a function (context) -> nn.Module as the alternative `name`."""

    def add(make: Make) -> Make:
        ALTERNATIVES.add(name, Alternative(name, label, make, budget))
        return make

    return add
