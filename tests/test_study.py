import json
from pathlib import Path

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner

from benchmarks.study import __main__ as main
from benchmarks.study import granularity, run
from benchmarks.study.figures import DRAW
from benchmarks.study.page import verdicts
from benchmarks.study.plan import Unit, units
from benchmarks.study.tables import Table, read_units, setting, summarised, tables
from benchmarks.study.times import measure_times
from nemo.config import Params, load_params
from nemo.data import load, prepare

SHAPES = {"resnet18": {"width": 0.25}, "vit_small": {"dim": 24, "depth": 3, "heads": 2, "patch": 4}}


def test_every_unit_has_params_that_the_profile_accepts():
    profile = load_params("profiles/cifar10-cpu.yaml")
    found = list(units())
    assert len({unit.name for unit in found}) == len(found)
    for unit in found:
        assert unit.params(profile).models == [unit.model]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A profile on digits that trains in seconds, and its data."""
    raw = yaml.safe_load(Path("params.yaml").read_text())
    raw["models"], raw["architecture"] = list(SHAPES), SHAPES
    raw["train"]["epochs"] = raw["finetune"]["epochs"] = 1
    raw["finetune"]["t_max"] = 1
    raw["subsets"] = ["0+1"]
    profile = Params.model_validate(raw)
    prepare("digits", profile.data["digits"], tmp_path / "digits")
    monkeypatch.setattr(run, "THRESHOLDS", (0.1, 0.9))
    for name in ("WORK", "CELLS"):
        monkeypatch.setattr(run, name, tmp_path / name)
    return profile, load(tmp_path / "digits")


@pytest.mark.parametrize("model", SHAPES)
def test_a_unit_ends_in_a_file_with_everything_the_tables_need(small, model, monkeypatch):
    transformer = model == "vit_small"
    monkeypatch.setattr(granularity, "SUBSETS", ("0+1",))
    unit = Unit(f"{model}-0", model, 0, baselines=True, granularity=transformer)
    facts = json.loads(run.run_unit(unit, *small).read_text())
    modules = facts["evaluation"]["modules"]
    assert {(m["method"], m["subset"]) for m in modules} == {("mwt", "0+1"), ("nemo", "0+1")}
    nemo = next(m for m in modules if m["method"] == "nemo")
    same_size = {"random", "pruned", "dense", "nemo, mean"}
    assert {row["baseline"] for row in facts["baselines"]} == same_size | {"standard, tuned"}
    for row in facts["baselines"]:
        if row["baseline"] in same_size:
            assert 0.5 * nemo["parameters"] < row["parameters"] <= nemo["parameters"]
        assert row["accuracy"] <= row["best_test_accuracy"] or row["best_epoch"] == 0
    assert len(facts["thresholds"]) == 2 * 2
    for row in facts["thresholds"]:  # the profile's threshold gives the class masks' own figures
        if row["threshold"] == facts["params"]["masks"]["threshold"]:
            masks = facts["masks"][row["method"]]
            for key in ("nrr", "cohesion", "coupling"):
                assert row[key] == pytest.approx(masks[key], rel=1e-4)
    if transformer:
        sizes = {(r["threshold"], r["granularity"]): r["parameters"] for r in facts["granularity"]}
        assert len(sizes) == 4
        for threshold in (0.5, 0.9):
            assert sizes[threshold, "heads"] <= sizes[threshold, "neurons"]
    for row in facts["gap"]:
        ways = {"binary", "binary + bn", "mean", "mean + bn"}
        ways |= {f"{way}, low threshold" for way in ways}
        assert set(row) == {"method", "subset", "soft"} | ways
    assert all("test_accuracy" in row for row in facts["history"]["standard"])
    assert len(facts["trained"]["nemo"]["epoch_seconds"]) == 1
    cells, times = run.CELLS, run.CELLS.with_name("times")
    measure_times(unit, *small, times / f"{unit.name}.json")
    timed = json.loads((times / f"{unit.name}.json").read_text())
    assert {row["method"] for row in timed["training"]} == {"standard", "mwt", "nemo"}
    assert len(timed["latency"]) == 2 * (1 + 2)
    assert all(row["ms"] > 0 for row in timed["latency"] + timed["training"])
    made = {table.name: table for table in tables(read_units(cells), read_units(times))}
    kinds = set(summarised(made["T2-modules"])["kind"])
    assert kinds == same_size | {"mwt", "nemo", "standard", "standard, tuned"}
    assert "digits" in setting(read_units(cells), read_units(times))
    monkeypatch.setattr(main, "CELLS", cells)
    monkeypatch.setattr(main, "TIMES", times)
    monkeypatch.setattr(main, "units", lambda: [unit])
    monkeypatch.setattr(main, "load_params", lambda path: small[0])
    done = CliRunner().invoke(main.cli, ["tables"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    expected = set(DRAW) - {"T3-objectives"}
    expected -= set() if transformer else {"T4-sensitivity", "T5-granularity"}
    assert set(made) == expected
    page = (cells.parent / "index.html").read_text()
    for name in expected:
        assert f'id="{name}"' in page
        assert (cells.parent / f"{name}.md").exists()
        assert (cells.parent / "figures" / f"{name}.png").stat().st_size > 5000
    assert "http" not in page.replace("http://www.w3.org", "")


def test_over_seeds_there_is_a_mean_and_a_spread():
    columns = {"model": ["a", "a", "b"], "seed": [0, 1, 0], "device": ["CPU", "GPU", "CPU"]}
    frame = pd.DataFrame({**columns, "loss": [1.0, 3.0, None]})
    shown = summarised(Table("T", "", "", ("model",), frame))
    expected = {"model": ["a", "b"], "seeds": [2, 1], "device": ["CPU, GPU", "CPU"]}
    assert shown.to_dict("list") == {**expected, "loss": ["2.0 +- 1.4", ""]}


def test_claims_are_judged_model_by_model():
    columns = {"model": ["a", "a", "b"], "seed": [0, 1, 0], "gain": [1.0, 3.0, -0.5]}
    headline = pd.DataFrame({**columns, "size reduction %": [-20.0, -20.0, 30.0]})
    table = Table("T7-headline", "", "", ("model",), headline)
    lines = verdicts([table])[1:]
    assert lines == [
        "Here, on b: 0.5 points less and 30 % fewer.",
        "Here, on a: 2.0 points more and 20 % more.",
        "Both claims hold together on no model.",
    ]
    headline["size reduction %"] *= -1
    assert verdicts([table])[-1] == "Both claims hold together on a."


def test_published_accuracies_stand_beside_the_same_knob():
    facts = read_units(Path("reports/cifar10-cpu/cells"))
    frame = next(t.frame for t in tables(facts, {}) if t.name == "T4-sensitivity")
    shown = frame.dropna(subset=["published %"])
    assert set(shown["model"]) == {"vgg16"}
    found = set(zip(shown["knob"], shown["value"], shown["published %"], strict=True))
    expected = {("loss.alpha", 1.0, 90.02), ("loss.tau", 0.1, 86.14), ("loss.tau", 0.2, 89.49)}
    assert expected | {("loss.tau", 0.3, 89.63), ("loss.tau", 0.5, 90.03)} == found


def test_a_second_unit_with_the_same_training_takes_it_over(small, monkeypatch):
    run.run_unit(Unit("first", "resnet18", 0, ("standard", "nemo"), subsets=()), *small)
    trained = []
    original = run.train_cell
    monkeypatch.setattr(
        run,
        "train_cell",
        lambda p, cell, *a, **k: (trained.append(cell.method), original(p, cell, *a, **k)),
    )
    changed = Unit("alpha", "resnet18", 0, ("standard", "nemo"), {"loss.alpha": 0.5}, ())
    run.run_unit(changed, *small)
    assert trained == ["nemo"]


def test_several_processes_share_the_work(tmp_path, monkeypatch):
    raw = yaml.safe_load(Path("profiles/cifar10-cpu.yaml").read_text())
    raw["data"] = {"cifar10": {"source": "digits", "size": 16, "validation": 0.1, "seed": 0}}
    raw["train"]["epochs"] = 1
    raw["subsets"] = ["0+1"]
    monkeypatch.chdir(tmp_path)
    main.PROFILE.parent.mkdir()
    main.PROFILE.write_text(yaml.safe_dump(raw))
    names = ["vgg16-equation-tau-0.3-0", "vgg16-equation-tau-0.5-0"]
    # cat+dog is no class of digits: this unit fails, and the others do not
    units = [*names, "vgg16-released-0"]
    done = CliRunner().invoke(main.cli, ["run", *units, "--jobs", "2"], catch_exceptions=False)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith("Error: vgg16-released-0: ")
    trained = [path.name for path in (run.WORK / "trained").glob("*/train/*.safetensors")]
    assert len(trained) == 4  # the standard model is shared by all three
    one, other = (read_units(run.CELLS)[name] for name in names)
    assert one["trained"]["standard"] == other["trained"]["standard"]
    assert one["history"]["nemo"] != other["history"]["nemo"]
    begun = next(run.WORK.glob(f"{names[0]}-*")) / "device.json"
    begun.write_text('{"device": "cuda"}')
    done = CliRunner().invoke(main.cli, ["run", names[0]], catch_exceptions=False)
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: device: cpu, and study/")
    done = CliRunner().invoke(main.cli, ["run", names[0], "--device", "cuda:7"])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: device: cuda:7 is not available here")
