"""The selectors by name, and the decorator that adds one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo.fields import Strict
from nemo.registry import Registry

if TYPE_CHECKING:
    from nemo.masking.class_masks import ClassMasks
    from nemo.masking.observed import Observed

Choose = Callable[["Observed", Any], "ClassMasks"]


@dataclass(frozen=True)
class Selector:
    """How class masks are chosen, and the class of its settings."""

    name: str
    params: type[Strict]
    choose: Choose


SELECTORS: Registry[Selector] = Registry("selector")


def selector(name: str, *, params: type[Strict]) -> Callable[[Choose], Choose]:
    """Register a function (observed, settings) -> `ClassMasks` as the selector `name`.

    `observed` gives the modular model, the batches of training images, and on demand the bits of
    every sample, so that a rule may look at bits, activations or gradients.
    """

    def add(choose: Choose) -> Choose:
        SELECTORS.add(name, Selector(name, params, choose))
        return choose

    return add
