"""What torch.export makes of a model, and what it will refuse (ours)."""

from __future__ import annotations

import inspect
import io
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from nemo.signature import Signature, pick

# Ways from a tensor to Python, by which a graph may lose what depends on the inputs.
READS = {
    Tensor.__bool__, Tensor.__float__, Tensor.__index__, Tensor.__int__, Tensor.__len__,
    Tensor.item, Tensor.numpy, Tensor.tolist, Tensor.__array__,
}  # fmt: skip


class Reading(TorchFunctionMode):
    """Whether code in this context takes numbers out of tensors, or the length of one."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.found = self.found or func in READS
        return func(*args, **(kwargs or {}))


def export(
    model: nn.Module, takes: Signature, inputs: Sequence[Tensor]
) -> torch.export.ExportedProgram:
    """The graph of `model` for any batch size; it returns the tensor that counts.

    Args:
        inputs: a batch of 2, because 1 would be taken for a constant.

    Raises:
        ValueError: torch.export refuses the model, or takes the batch size for a constant.
    """
    example = takes.batch(inputs)
    args, named = ((), example) if takes.named else (example, {})
    sizes = tree_map(lambda x: {0: torch.export.Dim.AUTO}, example)
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if args and inspect.Parameter.VAR_POSITIONAL in kinds[: len(args)]:  # forward(self, *inputs)
        first = kinds.index(inspect.Parameter.VAR_POSITIONAL)
        sizes = (*sizes[:first], sizes[first:])
    chosen = model.register_forward_hook(lambda m, a, returned: pick(returned, takes.output))
    said = io.StringIO()  # whole graphs, where it fails
    try:
        with torch.no_grad(), redirect_stderr(said):
            exported = torch.export.export(model, args, named, dynamic_shapes=sizes, strict=False)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(
            f"the model cannot be traced: {reason}{_place(error)}; accepted: what is computed "
            "from tensors by torch alone, such as torch.where in place of if"
        ) from error
    finally:
        chosen.remove()
    sys.stderr.write(said.getvalue())
    returned = exported.graph.output_node().args[0][0].meta["val"]
    if isinstance(returned.shape[0], int):
        raise ValueError(
            "the model cannot be traced: it takes the batch size for a constant, as len(x) does; "
            "accepted: x.shape[0]"
        )
    return exported


def _place(error: BaseException) -> str:
    """The last line outside of torch and of this package."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(own)
    ]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
