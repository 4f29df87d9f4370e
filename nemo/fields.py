"""The kinds of values that params.yaml holds; they cost pydantic only (ours)."""

from __future__ import annotations

import re
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Family = Literal["cnn", "transformer"]
T = TypeVar("T")


class ParamsError(ValueError):
    """What is wrong in a params file: one line per key, each saying what is accepted."""


class Strict(BaseModel):
    """A section of params: no unknown keys, no changes, no infinities."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class PerFamily(Strict, Generic[T]):
    """A value for every model, or one for each family: `{cnn: ..., transformer: ...}`."""

    cnn: T
    transformer: T

    @model_validator(mode="before")
    @classmethod
    def _one_for_all(cls, value: Any) -> Any:
        return (
            value if isinstance(value, dict | PerFamily) else {"cnn": value, "transformer": value}
        )

    def of(self, family: Family) -> T:
        return self.cnn if family == "cnn" else self.transformer


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"a number is accepted, got {value}")
    return value


def _on_or_absent(value: Any) -> Any:
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"true or false is accepted, got {value}")
    return value or None


def check_device(name: Any) -> str:
    """The name of a device; ValueError for any other. Whether it is there, torch knows."""
    if not isinstance(name, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", name):
        raise ValueError(f"unknown device {name!r}; accepted: auto, cpu, mps, cuda, cuda:N")
    return name


Device = Annotated[str, BeforeValidator(check_device)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
MethodName = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?$")]
Count = Annotated[int, Field(ge=1, strict=True)]
Whole = Annotated[int, Field(ge=0, strict=True)]
NonNegative = Annotated[float, Field(ge=0), BeforeValidator(_no_bool)]
Positive = Annotated[float, Field(gt=0), BeforeValidator(_no_bool)]
# On or absent: a switch that is off leaves no trace in the settings of a result.
Switch = Annotated[Literal[True] | None, BeforeValidator(_on_or_absent)]
Share = Annotated[float, Field(gt=0, le=1), BeforeValidator(_no_bool)]
