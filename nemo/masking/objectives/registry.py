"""The objectives by name, and the decorator that adds one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Protocol, runtime_checkable

from pydantic import Field

from nemo.fields import Count, Family, PerFamily, Positive, Share, Strict, Whole
from nemo.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Parts = dict[str, "Tensor"]
Penalty = Callable[[Mapping[str, "Tensor"], "Tensor"], "tuple[Tensor, Parts]"]
Maker = Callable[[Any, Family], Penalty]


@runtime_checkable
class Remembers(Protocol):
    """A penalty that knows the steps so far; what it knows is part of a checkpoint."""

    def begin(self, layers: Mapping[str, int], classes: int, device: torch.device) -> None:
        """Called before the training, with {masked layer: N_l}."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class CutPassParams(Strict):
    """The cut pass; `nemo.masking.cut_pass` has the formula."""

    weight: Positive = 1.0
    every: Count = 1  # steps
    after: Whole = 3  # epochs without it, once the task loss has left chance
    last: Share | None = 0.3  # of all epochs, in which alone it runs; None: no such limit
    # of the subsets; all classes together are always one more
    sizes: list[Annotated[int, Field(ge=2, strict=True)]] = Field(default_factory=lambda: [2, 3, 5])
    rate: Share = 0.05  # at which frequencies follow the batches
    threshold: Share = 0.9  # as in `masks`


class ObjectiveParams(Strict):
    """Settings that a section may have besides its own.

    `warmup`: over so many epochs the penalty rises from 0, once the task loss has left chance;
    without it, all of it counts from the first step. `cut`: train as you cut.
    """

    warmup: PerFamily[Count] | None = None
    cut: CutPassParams | None = None


@dataclass(frozen=True)
class Objective:
    """A method of training.

    Attributes:
        label: what tables and figures call it.
        section: the key of params.yaml that holds its settings; None where it has none.
        params: the class of that section.
        make: gives the penalty on a batch's masks; None where the model has no mask generators.
        remedy: what to try when the loss is not finite, besides a smaller learning rate.
        pull: the keys that make masks smaller and further apart, as a diagnosis names them.
        colour: of its points and lines in figures.
    """

    name: str
    label: str
    section: str | None = None
    params: type[Strict] | None = None
    make: Maker | None = None
    remedy: str = ""
    pull: str = ""
    colour: str = "#009E73"

    @property
    def modular(self) -> bool:
        """Whether the model gets mask generators, class masks and modules."""
        return self.make is not None


OBJECTIVES: Registry[Objective] = Registry("method")


def objective(
    name: str, *, label: str, section: str, params: type[Strict], **about: str
) -> Callable[[Maker], Maker]:
    """Register a function (settings, family) -> penalty as the method `name`.

    The penalty gets masks {layer: (B, N_l)} and labels (B,), both of the whole batch, and returns
    what is added to the task loss (a scalar) and the named parts of it that the history shows.

    Args:
        about: `remedy`, `pull` and `colour` of the `Objective`.
    """

    def add(make: Maker) -> Maker:
        OBJECTIVES.add(name, Objective(name, label, section, params, make, **about))
        return make

    return add


OBJECTIVES.add("standard", Objective("standard", "standard", colour="#555555"))
