"""A rule from a file outside the package: its op is cut, and modules with it are saved."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nemo
from nemo.cut.rules import Pointwise, base, rule
from nemo.module.ops import OPS
from tests.cut.helpers import randomise
from tests.cut.test_rules import MASK, Network, Of, check


@pytest.fixture(autouse=True)
def _leave_no_trace() -> Iterator[None]:
    rules, ops = dict(base.RULES), dict(OPS)
    yield
    for table, before in ((base.RULES, rules), (OPS, ops)):
        table.clear()
        table.update(before)


def shrunk(x: Tensor) -> Tensor:
    import tests.cut.plugin  # noqa: F401

    return torch.ops.nemo_test.shrink(x)


def test_a_rule_makes_the_module_smaller(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise(Network(Of(torch.special.i0e)))
    unknown = nemo.decompose(model, {"conv": MASK}, example=torch.zeros(2, 3, 32, 32))
    assert unknown.report["blocked"] == ["aten.special_i0e.default"]
    with pytest.raises(ValueError, match="not in the op table"):
        nemo.save(unknown, tmp_path)
    rule(torch.ops.aten.special_i0e.default)(Pointwise)
    module = check(Of(torch.special.i0e), {"conv": MASK}, tmp_path)
    assert module.report["blocked"] == []
    assert module.report["parameters"] < unknown.report["parameters"]


def test_a_module_with_a_plugins_op_loads_where_the_plugin_is_imported(tmp_path: Path) -> None:
    module = check(Of(shrunk), {"conv": MASK}, tmp_path)
    assert module.conv.weight.shape[0] == int(MASK.sum())
    load = f"import nemo; nemo.load({str(tmp_path / 'module')!r})"
    subprocess.run([sys.executable, "-c", f"import tests.cut.plugin; {load}"], check=True)
    failed = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True)
    error = failed.stderr.strip().splitlines()[-1]
    assert "ArtefactError" in error
    assert "'nemo_test.shrink.default' is not allowed; accepted: " in error


def test_what_is_no_pure_op_is_refused() -> None:
    with pytest.raises(ValueError, match="is not one op; accepted: aten"):
        rule(torch.ops.aten.relu)(Pointwise)
    with pytest.raises(ValueError, match="writes into its arguments"):
        rule(torch.ops.aten.relu_.default)(Pointwise)


def test_the_packages_own_rules_allow_nothing_that_the_loader_does_not() -> None:
    code = (
        "from nemo.module.ops import OPS; before = set(OPS); import nemo.cut; "
        "assert set(OPS) == before, set(OPS) - before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
