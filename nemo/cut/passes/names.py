"""Phase 2: a Linear that is called as a function is named after its weight (ours)."""

from __future__ import annotations

from collections.abc import Mapping

from nemo.cut.graph import arg, aten
from nemo.cut.trace import Traced, module_path


def name_functions(traced: Traced, names: Mapping[tuple[str, int], str]) -> None:
    """Set the path of such nodes, in place.

    Args:
        names: what to call the part of a module that starts at some row of its weight.
    """
    for node in traced.calls():
        if node.target is not aten.linear.default:
            continue
        weight, path, row = arg(node, 1), module_path(node), None
        if weight.target is aten.slice.Tensor and arg(weight, 1) == 0:  # attention's packed weight
            weight, row = arg(weight, 0), arg(weight, 2)
        owner = traced.paths.get(weight, "").rpartition(".")[0]
        if owner and (owner == path or not path or owner.startswith(f"{path}.")):
            node.meta["path"] = owner if row is None else names.get((owner, row), owner)
