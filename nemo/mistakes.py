"""A mistake that pydantic found in params.yaml, in one line (ours)."""

from __future__ import annotations

from typing import Any, get_origin

from pydantic import BaseModel

from nemo.models.shapes import TimmShape


def describe(error: Any, raw: Any, kind: type[BaseModel]) -> str:
    """One pydantic error as `key: what is wrong; what is accepted`."""
    keys = _written_keys(error["loc"], raw)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = f"unknown key; accepted: {', '.join(_fields_at(keys[:-1], kind))}"
    elif error["type"] == "missing":
        message = "required, and missing"
    elif error["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, got {error['input']!r}"
    return f"{'.'.join(keys)}: {message}" if keys else message


def _written_keys(loc: tuple[str | int, ...], raw: Any) -> list[str]:
    """The part of an error's place that the file has: one value for all families has no `.cnn`."""
    keys: list[str] = []
    for part in loc:
        if not isinstance(raw, dict | list) or (isinstance(raw, list) and isinstance(part, str)):
            break
        keys.append(str(part))
        raw = raw.get(part) if isinstance(raw, dict) else raw[int(part)]
    return keys


def _fields_at(keys: list[str], kind: Any) -> list[str]:
    """The keys that params.yaml accepts under `keys`."""
    model, named = kind, False
    for key in keys:
        field = None if named else model.model_fields.get(key)
        if field is not None:
            model, named = _model_in(field.annotation), get_origin(field.annotation) is dict
        elif named:  # a name of the user's own
            named = False
        else:
            model = TimmShape
    return sorted(model.model_fields)


def _model_in(annotation: Any) -> Any:
    """The pydantic model in an annotation such as `PerFamily[int] | None`."""
    options = [annotation, *getattr(annotation, "__args__", ())]
    return next(a for a in options if isinstance(a, type) and issubclass(a, BaseModel))
