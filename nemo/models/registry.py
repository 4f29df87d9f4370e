"""Names to models: the paper's six, those that a user's file registers, and any of timm's.

Importing this costs pydantic only; a model's own file is imported when it is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from nemo.fields import Family, Strict
from nemo.models.shapes import CnnShape, DeitShape, TimmShape, VitShape
from nemo.registry import Registry

if TYPE_CHECKING:
    from torch import nn

Shape = Strict
Builder = Callable[[int, int, Any], "nn.Module"]
TIMM = "timm/"


@dataclass(frozen=True)
class Model:
    """A family for its hyperparameters, the class of its shape, and the file that builds it."""

    family: Family
    shape: type[Strict]
    home: str


MODELS: Registry[Model] = Registry("model")
_builders: dict[str, Builder] = {}
for _name in ("simcnn", "vgg16", "rescnn", "resnet18"):
    MODELS.add(_name, Model("cnn", CnnShape, "nemo.models.cnn"))
MODELS.add("vit_small", Model("transformer", VitShape, "nemo.models.vit"))
MODELS.add("deit_small", Model("transformer", DeitShape, "nemo.models.vit"))


def model(name: str, family: Family, shape: type[Strict]) -> Callable[[Builder], Builder]:
    """Register a function (num_classes, image_size, shape) -> nn.Module as the model `name`.

    Args:
        family: whose hyperparameters it takes, where params.yaml has two values.
        shape: the class of its section under `architecture`; None is passed for its full size.
    """

    def add(build: Builder) -> Builder:
        if name not in MODELS or MODELS[name].home != build.__module__:
            MODELS.add(name, Model(family, shape, build.__module__))
        _builders[name] = build
        return build

    return add


def check_model_name(name: str) -> None:
    """Raise ValueError unless `name` is registered, or is `timm/NAME` with a NAME that timm has."""
    if name in MODELS:
        return
    if not name.startswith(TIMM):
        raise ValueError(f"unknown model {name!r}; accepted: {', '.join(MODELS)}, timm/NAME")
    if "." in name:
        raise ValueError(f"{name!r}: give the timm name without its pretrained tag (the dot)")
    import timm  # costs seconds, so only where a timm model is named

    if not timm.is_model(name.removeprefix(TIMM)):
        raise ValueError(
            f"timm has no model {name.removeprefix(TIMM)!r}; accepted: those of timm.list_models()"
        )


def build_model(
    name: str, num_classes: int, image_size: int = 32, shape: Shape | None = None
) -> nn.Module:
    """A freshly initialised model for images (3, image_size, image_size).

    Args:
        name: one of `MODELS`, or `timm/NAME`.
        shape: its width (CNNs), or dim, depth, heads and patch (Transformers); None is full size.

    Raises:
        ValueError: an unknown name, or a shape that does not fit the image size.
    """
    check_model_name(name)
    if name.startswith(TIMM):
        made = _timm_model(name.removeprefix(TIMM), num_classes, image_size, shape)
    else:
        if name not in _builders:
            import_module(MODELS[name].home)
        made = _builders[name](num_classes, image_size, shape)
    made.input_size = (3, image_size, image_size)  # type: ignore[assignment]
    return made


@cache
def family_named(name: str) -> Family:
    """`family_of` a model that is not at hand: one of timm's is built for it, without weights."""
    if name in MODELS:
        return MODELS[name].family
    import torch

    with torch.device("meta"):
        return family_of(name, build_model(name, 2, 224))


def family_of(name: str, model: nn.Module) -> Family:
    """Whose hyperparameters a model takes; a timm model with more Linears than convolutions is a
    Transformer."""
    if name in MODELS:
        return MODELS[name].family
    from torch import nn

    modules = list(model.modules())
    linears = sum(isinstance(m, nn.Linear) for m in modules)
    convs = sum(isinstance(m, nn.Conv2d) for m in modules)
    return "transformer" if linears > convs else "cnn"


def _timm_model(name: str, num_classes: int, image_size: int, shape: Any) -> nn.Module:
    import timm

    own = shape if isinstance(shape, TimmShape) else TimmShape()
    options = {"pretrained": own.pretrained, "num_classes": num_classes, **(own.arguments or {})}
    try:  # Transformers must be told the size, most convolutional nets do not know the argument
        return timm.create_model(name, img_size=image_size, **options)  # type: ignore[no-any-return]
    except TypeError:
        if not own.arguments:
            return timm.create_model(name, **options)  # type: ignore[no-any-return]
    try:
        return timm.create_model(name, **options)  # type: ignore[no-any-return]
    except TypeError as error:
        raise ValueError(f"{TIMM}{name}: arguments {own.arguments}: {error}") from None
