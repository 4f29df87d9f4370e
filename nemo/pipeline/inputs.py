"""What stages read: prepared images, and their class names once all params are known to fit."""

from __future__ import annotations

from nemo.cells import Layout
from nemo.config import Params
from nemo.data import Prepared, check_subsets, load, read_meta
from nemo.device import resolve_device


def class_names(params: Params, dataset: str, layout: Layout) -> list[str]:
    """The prepared data's class names, once they fit the subsets and the device is there.

    Raises:
        DataError: nothing is prepared, or a subset does not fit.
        ParamsError: the device is not there.
    """
    classes: list[str] = read_meta(layout.data(dataset))["classes"]
    check_classes(params, classes)
    resolve_device(params.device)
    return classes


def check_classes(params: Params, classes: list[str]) -> None:
    """Raise DataError unless all subsets that params name are of these classes."""
    check_subsets(params.subsets, classes)
    if params.granularity.of:
        check_subsets(params.granularity.subsets, classes)


def images(params: Params, dataset: str, layout: Layout) -> Prepared:
    """The prepared images; raises what `class_names` does."""
    class_names(params, dataset, layout)
    return load(layout.data(dataset), params.data[dataset].memory)
