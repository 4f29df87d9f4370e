from dataclasses import replace

import pandas as pd
import torch
import yaml

from benchmarks import kills, module_speed, same_bytes
from benchmarks.clones import changed, small_params
from benchmarks.coverage import FIELDS, write
from benchmarks.coverage import measure as measure_coverage
from benchmarks.merge import WAYS, row_of, table_of
from benchmarks.training_overhead import CASES, measure
from nemo.config import check_params
from nemo.data import Prepared, Split
from tests.module.test_union import HOW, cut
from tests.test_models import SMALL


def test_the_overhead_benchmark_measures_both_steps():
    for name in ("resnet18", "vit_small"):
        row = measure(name, "tiny", SMALL[name], batch=4, rounds=2)
        assert row["standard_ms"] > 0
        assert row["ratio"] > 0
    assert {name for name, *_ in CASES} == {"vgg16", "resnet18", "vit_small"}


def test_the_merge_benchmark_measures_before_and_after_calibration():
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (20, 3, 16, 16), generator=random, dtype=torch.uint8)
    split = Split(images, torch.arange(20) % 4)
    splits = {"train": split, "val": split, "test": split}
    names, mean, std = tuple("0175"), tuple(HOW[0]["mean"]), tuple(HOW[0]["std"])
    data = Prepared("d", "d", names, (16, 16), mean, std, False, 0, "", splits)
    parts = [cut([0, 1], 0, HOW[0]), cut([7, 5], 1, HOW[0])]
    rows = [row_of(way, 0, parts, data) for way in WAYS]
    assert rows[0]["parameters"] == sum(p.numel() for m in parts for p in m.parameters())
    assert rows[0]["cross_entropy"] < rows[0]["cross_entropy_raw"]
    alone = row_of("union", 0, [cut([0, 1, 7, 5], 0, HOW[0])], data)
    assert (alone["accuracy"], alone["cross_entropy"]) == (
        alone["accuracy_raw"], alone["cross_entropy_raw"])  # fmt: skip
    assert len(table_of(pd.DataFrame(rows)).splitlines()) == 2 + len(WAYS) == 5


def test_the_coverage_benchmark_has_a_row_for_failures_too(tmp_path):
    rows = [measure_coverage(("lcnet", name, 0.3)) for name in ("test_resnet", "no_such_model")]
    assert [rows[0][key] for key in ("trained", "status", "loaded")] == ["yes", "exact", "yes"]
    assert rows[0]["error"] < 1e-11
    assert rows[0]["parameters_left"] < 0.3
    assert "no_such_model" in rows[1]["status"]
    write(pd.DataFrame(rows, columns=FIELDS), tmp_path)
    assert (tmp_path / "coverage.csv").read_text().count("\n") == 3
    text = (tmp_path / "coverage.md").read_text()
    assert "Keep 0.3: 1 of 2 exact" in text
    assert "1 of them trained for a step, saved and loaded" in text
    assert "| no_such_model |" in text


def test_the_speed_benchmark_measures_modules_as_cut_and_folded():
    rows = module_speed.measure("resnet18", {1: 2, 4: 2}, SMALL["resnet18"])
    assert [(row["batch"], row["module"]) for row in rows] == [
        (batch, form) for batch in (1, 4) for form in ("as cut", "folded")
    ]
    assert all(row["flops_ratio"] > 1 and row["share"] > 0 for row in rows)


def test_the_kills_benchmark_wants_the_same_lock_and_files_and_no_epoch_twice():
    usual = kills.Pass("lock", {"runs/a": "1"}, 8, 12, 0, [], {})
    run = replace(usual, kills=["train", "report"], stages=14, waited=1)
    row = kills.row("dvc alone", run, usual)
    assert (row["train"], row["masks"], row["kills"], row["holds"]) == (1, 0, 2, True)
    files = {path.stem for path in (kills.ROOT / "stages").glob("*.py")}
    assert set(kills.STAGES) == files - {"__init__", "common", "plugin"}
    for change in ({"lock": "other"}, {"files": {}}, {"epochs": 9}):
        assert not kills.row("dvc alone", replace(run, **change), usual)["holds"]
    small = check_params(small_params(), "small")
    assert small.profile == "small"
    assert {"nemo"} == {*small.alternatives.of, *small.gap.of}, "stages beside the seven, too"


def test_params_of_a_clone_are_changed_as_dvc_would(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("models: [vgg16]\nloss: {alpha: {cnn: 1.0}, tau: 0.2}\n")
    text = changed(file, ["models=[a, b]", "loss.alpha.cnn=0.5"])
    expected = {"models": ["a", "b"], "loss": {"alpha": {"cnn": 0.5}, "tau": 0.2}}
    assert yaml.safe_load(text) == expected


def test_the_same_bytes_benchmark_names_what_differs():
    one = {"dvc.lock": "1", "runs/a": "2", "runs/b": "3", "results/small/a": "4"}
    page = same_bytes.report(one, {**one, "runs/b": "4"}, "this", "small")
    assert "| trained cells, masks, modules | 2 | 1 |" in page
    assert "| results | 1 | 1 |" in page
    assert "Different: runs/b" in page
