"""What stages read: prepared images, and their class names once all params are known to fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo.cells import Layout
from nemo.config import Params
from nemo.data import Prepared, check_subsets, load, read_meta
from nemo.data.prepared import known_classes
from nemo.data.subsets import FILE
from nemo.fields import ParamsError

SUBSETS = "subsets"  # the folder for files of class names


def class_names(params: Params, dataset: str, layout: Layout) -> list[str]:
    """The prepared data's class names, once they fit the subsets and the device is there.

    Raises:
        DataError: nothing is prepared, or a subset does not fit.
        ParamsError: the device is not there.
    """
    from nemo.device import resolve_device  # torch, which `nemo plan` has no use for

    classes: list[str] = read_meta(layout.data(dataset))["classes"]
    check_classes(params, classes)
    resolve_device(params.device)
    return classes


def check_classes(params: Params, classes: list[str]) -> None:
    """Raise DataError unless all subsets that params name are of these classes."""
    check_subsets(params.subsets, classes)
    if params.granularity.of:
        named = {name: params.text_of(name) for name in params.granularity.subsets}
        check_subsets(named, classes)


def check_files(params: Params) -> None:
    """Raise ParamsError where a file of names is not in the folder that the plan depends on."""
    sources = {f"data.{name}.classes": params.data[name].classes for name in params.datasets}
    for key, text in {**{f"subsets.{n}": t for n, t in params.subsets.items()}, **sources}.items():
        parts = Path((text or "").removeprefix(FILE)).parts
        if text and text.startswith(FILE) and (parts[0] != SUBSETS or ".." in parts):
            raise ParamsError(f"{key}: {text!r}; accepted: files in {SUBSETS}/, which DVC compares")


def check_cut_pass(params: Params, method: str, classes: Sequence[str]) -> None:
    """Raise ParamsError if the method's cut passes shall draw more classes than there are."""
    key = params.base_of(method).section
    cut = getattr(params.for_method(method).section(key), "cut", None)
    # the default sizes are for any data
    sizes = cut.sizes if cut is not None and "sizes" in cut.model_fields_set else []
    if max(sizes, default=0) > len(classes):
        raise ParamsError(
            f"{key}.cut.sizes: {max(sizes)}, where there are {len(classes)} classes; "
            f"accepted: 2 to {len(classes)}"
        )


def check_before_training(params: Params, classes: list[str]) -> None:
    """All that can be known of params once the classes are; raises what the checks above do."""
    check_classes(params, classes)
    for method in params.methods:
        check_cut_pass(params, method, classes)


def check_known_classes(params: Params) -> None:
    """`check_before_training` for the sources whose classes are known before they are prepared."""
    for name in params.datasets:
        known = known_classes(name, params.data[name])
        if known is not None:
            check_before_training(params, known)


def images(params: Params, dataset: str, layout: Layout) -> Prepared:
    """The prepared images; raises what `class_names` does."""
    class_names(params, dataset, layout)
    return load(layout.data(dataset), params.data[dataset].memory)
