"""Names to models. A builder takes (num_classes, image_size, shape); its decorator registers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from nemo.config import (
    MODEL_FAMILIES,
    CnnShape,
    Family,
    TimmShape,
    VitShape,
    check_model_name,
)

Shape = CnnShape | VitShape | TimmShape
Builder = Callable[[int, int, Any], nn.Module]
MODELS: dict[str, Builder] = {}


def register(name: str) -> Callable[[Builder], Builder]:
    def add(builder: Builder) -> Builder:
        assert name in MODEL_FAMILIES, name
        MODELS[name] = builder
        return builder

    return add


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
    if name.startswith("timm/"):
        model = _timm_model(name.removeprefix("timm/"), num_classes, image_size, shape)
    else:
        model = MODELS[name](num_classes, image_size, shape)
    model.input_size = (3, image_size, image_size)  # type: ignore[assignment]
    return model


def family_of(name: str, model: nn.Module) -> Family:
    """Whose hyperparameters a model takes; a timm model with more Linears than convolutions is a
    Transformer."""
    if name in MODEL_FAMILIES:
        return MODEL_FAMILIES[name]
    modules = list(model.modules())
    linears = sum(isinstance(m, nn.Linear) for m in modules)
    convs = sum(isinstance(m, nn.Conv2d) for m in modules)
    return "transformer" if linears > convs else "cnn"


def _timm_model(name: str, num_classes: int, image_size: int, shape: Any) -> nn.Module:
    import timm

    pretrained = isinstance(shape, TimmShape) and shape.pretrained
    options = {"pretrained": pretrained, "num_classes": num_classes}
    try:  # Transformers must be told the size, most convolutional nets do not know the argument
        return timm.create_model(name, img_size=image_size, **options)  # type: ignore[no-any-return]
    except TypeError:
        return timm.create_model(name, **options)  # type: ignore[no-any-return]
