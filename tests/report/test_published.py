"""Published figures stand beside ours only where both measure the same thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo.report.collect import collect
from nemo.report.published import NOTHING, Beside, beside, published_rows
from tests.report.fake import make_params, make_results


def pairs(root: Path, title: str, **changes: Any) -> list[Beside]:
    params = make_params(**changes)
    make_results(root, params, title)
    return beside(collect(params, root), "tiny")


def test_mwt_on_resnet18_and_cifar10_has_its_three_mask_metrics(tmp_path: Path) -> None:
    found = pairs(tmp_path, "CIFAR-10 (JPEG)")
    assert [(p.what, p.ours, p.published) for p in found] == [
        ("resnet18 mwt: module kernel retention rate", "21.00 %", "37.36 to 24.74 %"),
        ("resnet18 mwt: cohesion", "0.9000", "0.8572 to 0.9437"),
        ("resnet18 mwt: coupling", "0.3000", "0.3594 to 0.2412"),
    ]
    assert "width 0.25, 3 epochs, threshold 0.9" in found[0].scale
    assert "threshold 0.1 to 0.9" in found[0].published_scale


def test_other_data_and_models_have_nothing(tmp_path: Path) -> None:
    for number, title in enumerate(("CIFAR-100", "Tiny", "SVHN")):
        assert pairs(tmp_path / str(number), title) == []
    assert pairs(tmp_path / "vit", "CIFAR-10", models=["vit_small"]) == []
    assert pairs(tmp_path / "nemo", "CIFAR-10", methods=["standard", "nemo"]) == []
    assert "No published figure" in NOTHING


def test_per_batch_statistics_are_in_the_file_and_never_beside_ours(tmp_path: Path) -> None:
    per_batch = [row for row in published_rows() if row["metric"].startswith("per-batch")]
    assert per_batch
    shown = {pair.what for pair in pairs(tmp_path, "CIFAR-10")}
    assert not any("per-batch" in what for what in shown)
