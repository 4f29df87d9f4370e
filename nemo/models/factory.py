"""Models that a function of the user's own makes, named `package.module:function` (ours)."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo.models.registry import Shape, family_of, model
from nemo.models.shapes import FactoryShape

if TYPE_CHECKING:
    from torch import nn


def is_factory(name: str) -> bool:
    return re.fullmatch(r"[\w.]+:[\w.]+", name) is not None


def register_factory(name: str, arguments: Mapping[str, Any]) -> tuple[str, FactoryShape]:
    """Register what `name` makes of `arguments` as a model; the working directory's files can be
    imported, too.

    Returns:
        The name it is registered by, which can be a folder's, and its shape.

    Raises:
        ValueError: there is no such function, or it fails, or returns no nn.Module.
    """
    where, _, path = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    found: Any = _called(name, import_module, where)
    file = getattr(found, "__file__", None)
    digest = hashlib.sha256(Path(file).read_bytes() if file else b"").hexdigest()
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise ValueError(f"{name}: {where} has no function {path}")
    first = _made(name, found, arguments)

    def build(num_classes: int, image_size: int, shape: Shape | None) -> nn.Module:
        return _made(name, found, arguments)

    registered = re.sub(r"\W+", "-", name)
    model(registered, family_of(name, first), FactoryShape)(build)
    return registered, FactoryShape(source_sha256=digest, arguments=dict(arguments) or None)


def _made(name: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> nn.Module:
    from torch import nn

    made = _called(name, factory, **arguments)
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"{name}: it returns an object of type {type(made).__name__}; accepted: an nn.Module"
        )
    return made


def _called(name: str, function: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
    try:
        return function(*args, **arguments)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        text = " ".join(str(error).split())
        raise ValueError(f"{name}: {type(error).__name__}: {text}") from error
