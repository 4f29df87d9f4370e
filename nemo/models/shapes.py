"""How large a model is: its section under `architecture` in params.yaml (paper section 5.1)."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from nemo.fields import Count, Positive, Strict


class CnnShape(Strict):
    width: Positive = 1.0


class VitShape(Strict):
    dim: Count = 384
    depth: Annotated[int, Field(ge=2, strict=True)] = 12
    heads: Count = 12
    patch: Count = 4

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"heads must divide dim, got heads {self.heads} and dim {self.dim}")
        return self


class DeitShape(VitShape):
    heads: Count = 6
    teacher: CnnShape = CnnShape()  # the ResNet18 it is distilled from


class TimmShape(Strict):
    pretrained: bool = False
    arguments: dict[str, Any] | None = None  # others of timm.create_model


class FactoryShape(Strict):
    """Of a model that a function of the user's own makes."""

    source_sha256: str  # of the file that the function is in: another one is another model
    arguments: dict[str, Any] | None = None  # of the function
