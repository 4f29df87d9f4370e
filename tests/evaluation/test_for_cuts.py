"""Statistics for cuts that were damaged, or are of something else, are no statistics."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo.evaluation.modular import load_for_cuts
from nemo.files import write_json
from tests.test_calibration import masked


def written(folder: Path, **changes: object) -> Path:
    norms = {"an": 6, "bn": 5}
    kept = {f"{n}.running_mean": torch.rand(3, count) for n, count in norms.items()}
    kept |= {f"{n}.running_var": torch.rand(3, count) for n, count in norms.items()}
    kept["drawn"] = torch.ones(3, 4).bool()
    for key, value in changes.items():
        kept[key.replace("__", ".")] = value
    save_file({key: value for key, value in kept.items() if value is not None},
              folder / "batch_norm.safetensors")  # fmt: skip
    write_json(folder / "metrics.json", {"masks": {"batch_norm": True}})
    return folder


def test_statistics_that_are_whole_are_taken(tmp_path):
    found = load_for_cuts(masked()[0], written(tmp_path), 4)
    assert found.drawn.shape == (3, 4)
    assert set(found.select([1])) == {
        f"{norm}.running_{kind}" for norm in ("an", "bn") for kind in ("mean", "var")
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"drawn": None},
        {"drawn": torch.ones(3, 4)},
        {"drawn": torch.ones(3, 7).bool()},
        {"drawn": torch.ones(2, 4).bool()},
        {"drawn": torch.zeros(3, 4).bool()},
        {"bn__running_var": None},
        {"bn__running_var": torch.ones(5)},
        {"bn__running_var": torch.ones(3, 6)},
        {"bn__running_var": torch.ones(3, 5).double()},
        {"bn__running_var": torch.ones(3, 5).int()},
        {"bn__running_var": torch.full((3, 5), float("nan"))},
        {"cn__running_mean": torch.ones(3, 5)},
    ],
    ids=lambda changes: "-".join(
        f"{k}-{None if v is None else (*v.shape, str(v.dtype))}" for k, v in changes.items()
    ),
)
def test_what_is_no_statistics_of_the_network_is_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=r"batch_norm\.safetensors: missing or damaged; run"):
        load_for_cuts(masked()[0], written(tmp_path, **changes), 4)
