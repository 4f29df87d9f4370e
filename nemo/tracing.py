"""What torch.export makes of a model, and what it will refuse (ours)."""

from __future__ import annotations

import inspect
import io
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from nemo.signature import Signature, call, pick

aten = torch.ops.aten
ANY = 2**31  # above each batch size
NUMBERS = (aten.item.default, aten._local_scalar_dense.default)
EYES = (aten.eye.default, aten.eye.m)
WORDS = {  # in torch's words: in the user's
    "data-dependent": "it decides by the values of a tensor, as `if x.mean() > 0` does",
    ".numpy()": "it computes with numpy",
}
BATCH = (
    "the model cannot be traced: it takes the batch size for a number, as len(x), int(x.shape[0]), "
    "x.split(4) and a loop over samples do; accepted: x.shape[0] itself, in view and expand, and "
    "x.flatten(1)"
)


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
        said_so = str(error).strip().splitlines()[0][:200]
        reason = next((own for theirs, own in WORDS.items() if theirs in said_so), said_so)
        raise ValueError(
            f"the model cannot be traced: {reason}{_place(error)}; accepted: what is computed "
            "from tensors by torch alone, such as torch.where in place of if"
        ) from error
    finally:
        chosen.remove()
    sys.stderr.write(said.getvalue())
    _check(exported)
    returned = exported.graph.output_node().args[0][0].meta["val"]
    bounds = [bound.upper for bound in exported.range_constraints.values()]
    if isinstance(returned.shape[0], int) or any(upper < ANY for upper in bounds):
        raise ValueError(BATCH)  # or a size up to which the graph holds, as of x.split(4)
    return exported


def _check(exported: torch.export.ExportedProgram) -> None:
    """Raise ValueError for what a graph can say, and is no function of each sample alone."""
    nodes, moving = exported.graph.nodes, set(exported.graph_signature.user_inputs)
    for node in nodes:
        inputs = {n.name for n in node.all_input_nodes}
        if node.target in NUMBERS:
            raise ValueError(
                "the model cannot be traced: it takes a number out of a tensor, as x.max().item() "
                f"does{_line(node)}; accepted: the tensor itself, as x.max() is"
            )
        if node.target in EYES and inputs:  # facts are those of one sample, and this is then 1
            raise ValueError(
                f"the model cannot be traced: torch.eye of the batch size{_line(node)}; accepted: "
                "what is computed for each sample alone"
            )
        if moving & inputs:
            moving.add(node.name)
        is_norm = node.target is aten.batch_norm.default  # of a weight: weight standardisation
        if is_norm and node.all_input_nodes[0].name in moving and node.args[5]:
            raise ValueError(
                f"F.batch_norm(training=True){_line(node)}: by the statistics of the batch, so "
                "that what is said of a sample depends on the others in it; accepted: "
                "training=self.training, and running statistics"
            )


def check_traceable(model: nn.Module, takes: Signature) -> None:
    """Refuse before a training what cannot be cut after it.

    Args:
        model: in float64 and eval mode.

    Raises:
        ValueError: see `export`; or the graph computes something else for another batch.
    """
    graph = export(model, takes, takes.draw(2, 0)).module()
    inputs = takes.draw(3, 1)
    with torch.no_grad():
        expected = takes.run(model, [x.clone() for x in inputs])  # it may write into its input
        try:
            actual = call(graph, takes.batch(inputs))
        except (RuntimeError, AssertionError) as error:  # a guard on the batch size
            raise ValueError(BATCH) from error
    actual = pick(actual, takes.output)
    if not torch.allclose(actual, expected, rtol=1e-6, atol=1e-9, equal_nan=True):
        raise ValueError(
            "the model cannot be traced: its graph is right for one batch only; accepted: a "
            "forward pass without random numbers, and without values that it keeps for later"
        )


def _line(node: fx.Node) -> str:
    """Where the model made a node."""
    found = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f" ({Path(found[-1][0]).name}:{found[-1][1]})" if found else ""


def _place(error: BaseException) -> str:
    """The last line outside of torch and of this package."""
    own = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(own)
    ]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
