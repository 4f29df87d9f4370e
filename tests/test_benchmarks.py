from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

import nemo
from benchmarks import coverage, defaults, kills, many_classes, module_speed, same_bytes, times
from benchmarks.clones import changed, small_params
from benchmarks.coverage import FIELDS, write
from benchmarks.coverage import measure as measure_coverage
from benchmarks.measuring import alone
from benchmarks.merge import WAYS, row_of, table_of
from benchmarks.training_overhead import CASES, MeanCutPass, measure
from nemo.cells import Cell
from nemo.config import check_params, load_params
from nemo.data import Prepared, Split, load, prepare
from nemo.masking.objectives import CutPassParams
from nemo.models import build_model
from nemo.training.cut_pass import ScheduledCutPass
from tests.module.test_union import HOW, cut
from tests.test_models import SMALL


def test_the_overhead_benchmark_measures_three_steps():
    for name in ("resnet18", "vit_small"):
        row = measure(name, "tiny", SMALL[name], batch=4, rounds=2)
        assert row["standard_ms"] > 0
        assert row["ratio"] > 0
        assert row["cut_ms"] > 0
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


@pytest.mark.parametrize(
    ("classes", "sizes", "mean"), [(10, [2, 3, 5], 5), (2, [2, 3, 5], 2), (200, [10, 50], 87)]
)
def test_the_cut_pass_of_the_costs_is_the_mean_one(classes, sizes, mean):
    """Of 200 classes, 10, 50 and all have 260 / 3 on the mean."""
    model = nemo.modularize(build_model("vit_small", classes, 16, SMALL["vit_small"]))
    params = CutPassParams.model_validate({"sizes": sizes, "last": 0.3, "after": 3, "every": 2})
    cut_pass = MeanCutPass(params, model, classes)
    seen: list[int] = []
    cut_pass.union = lambda subset: (
        seen.append(len(subset)) or ScheduledCutPass.union(cut_pass, subset)
    )
    for _ in range(2):
        loss = cut_pass(torch.randn(classes, 3, 16, 16), torch.arange(classes))
        assert loss > 0
    assert seen == [mean, mean]


@pytest.mark.parametrize("method", ["standard", "mwt", "nemo", "nemo-cut"])
def test_a_training_step_of_the_costs_is_one_that_can_be_repeated(method, tmp_path, monkeypatch):
    drawn: list[int] = []
    monkeypatch.setattr(
        times.MeanCutPass, "draw", lambda self: drawn.append(1) or torch.tensor([3, 5])
    )
    params = load_params(Path(__file__).parents[1] / "params.yaml")
    prepare("digits", params.data["digits"], tmp_path / "digits")
    cell = Cell("digits", "vit_small", method, 0)
    step = times.training_step(params, cell, load(tmp_path / "digits"))
    step()
    step()
    assert len(drawn) == (2 if method == "nemo-cut" else 0)


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


def test_a_part_of_the_coverage_benchmark_leaves_the_other_rows(tmp_path):
    old = {"model": ["a", "a", "b", "b", "c"], "keep": [0.3, 0.7, 0.3, 0.7, 0.3], "seconds": 1.0}
    pd.DataFrame(old, columns=FIELDS).to_csv(tmp_path / "coverage.csv", index=False)
    new = {"model": ["d", "b", "b"], "keep": [0.3, 0.3, 0.7], "seconds": 2.0}
    new = pd.DataFrame(new, columns=FIELDS)
    rows = coverage.kept(new, tmp_path / "coverage.csv", ["c", "b", "a"])
    named = zip(rows["model"], rows["keep"], rows["seconds"], strict=True)
    assert list(named) == [
        ("c", 0.3, 1), ("b", 0.3, 2), ("b", 0.7, 2), ("a", 0.3, 1), ("a", 0.7, 1), ("d", 0.3, 2)
    ]  # fmt: skip
    assert coverage.kept(new, tmp_path / "none.csv", []).equals(new)


def test_the_coverage_benchmark_has_rows_of_hugging_face(tmp_path):
    pytest.importorskip("transformers")
    row = measure_coverage(("hugging face", "hf/bert", 0.3))
    assert [row[key] for key in ("trained", "status", "loaded")] == ["yes", "exact", "yes"]
    assert row["error"] < 1e-11
    assert row["parameters_left"] < 0.35
    write(pd.DataFrame([row], columns=FIELDS), tmp_path)
    assert f"transformers {version('transformers')}" in (tmp_path / "coverage.md").read_text()


def test_the_coverage_benchmark_says_at_once_that_transformers_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(coverage, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["coverage", "--models", "resnet18,hf/bert"])
    with pytest.raises(SystemExit):
        coverage.main()
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].endswith("hf/bert: need transformers: pip install -e '.[zoo]'")
    assert not said.out


def test_the_speed_benchmark_measures_modules_as_cut_folded_and_exported():
    rows = module_speed.measure("resnet18", {1: 2, 4: 2}, SMALL["resnet18"])
    assert [(row["batch"], row["module"]) for row in rows] == [
        (batch, form) for batch in (1, 4) for form in ("as cut", "folded", "ONNX Runtime")
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


@pytest.mark.parametrize(
    ("what", "seconds", "mebibytes"),
    [("class masks", 3, 1024), ("coupling matrix", 3, 256), (many_classes.LOSS, 0.8, 256)],
)
def test_a_thousand_classes_cost_what_is_stated(what, seconds, mebibytes):
    (case,) = (case for case in many_classes.CASES if case[0] == what)
    row = alone(many_classes.measure, *case[:3], case[3][-1])
    assert row["MiB"] <= mebibytes
    assert row["cpu seconds"] <= 4 * seconds  # of all threads, which a busy machine slows down


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


def test_the_defaults_benchmark_sets_nemo_beside_the_standard_of_the_same_images():
    rows = [
        ("standard", "", 0.9), ("nemo", "", 0.87), ("nemo", "loss.tau=0.1", 0.84),
        ("standard", "train.epochs=2", 0.5), ("nemo", "loss.tau=0.1 train.epochs=2", 0.6),
    ]  # fmt: skip
    shared = {
        "dataset": "svhn",
        "model": "vgg16",
        "chance": 0.19,
        "nrr": 0.25,
        "machine": "m",
        "failure": "",
    }
    frame = pd.DataFrame(
        [{**shared, "method": m, "set": s, "accuracy": a} for m, s, a in rows],
        columns=defaults.COLUMNS,
    )
    table = defaults.table_of(frame)
    assert table["standard"].tolist() == [90, 90, 50]
    assert table["difference"].tolist() == [-3, -6, 10]


def test_the_defaults_benchmark_computes_a_row_once(tmp_path, monkeypatch):
    few = ["--models", "resnet18", "--datasets", "digits", "--epochs", "1", "--set"]
    out = ["--out", str(tmp_path / "d"), "--work", str(tmp_path / "work")]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        defaults.main([*few, "data.limit=64", "loss.tau=0.5", *out])
    assert not ended.value.code
    rows = pd.read_csv(tmp_path / "d.csv")
    assert rows["set"].tolist() == [
        "data.limit=64 train.epochs=1", "data.limit=64 loss.tau=0.5 train.epochs=1"
    ]  # fmt: skip
    assert rows["accuracy"].between(0, 1).all()
    assert rows["failure"].isna().all()
    assert rows["nrr"].isna().tolist() == [True, False]
    asked = []
    monkeypatch.setattr(defaults, "row_of", lambda task: asked.append(task.key) or {})
    with pytest.raises(SystemExit):
        defaults.main([*few, "data.limit=64", "loss.tau=0.5", *out])
    assert asked == []
