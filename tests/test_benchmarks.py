from benchmarks.coverage import measure as measure_coverage
from benchmarks.coverage import write
from benchmarks.training_overhead import CASES, measure
from tests.test_models import SMALL


def test_the_overhead_benchmark_measures_both_steps():
    for name in ("resnet18", "vit_small"):
        row = measure(name, "tiny", SMALL[name], batch=4, rounds=2)
        assert row["standard_ms"] > 0
        assert row["ratio"] > 0
    assert {name for name, *_ in CASES} == {"vgg16", "resnet18", "vit_small"}


def test_the_coverage_benchmark_has_a_row_for_failures_too(tmp_path):
    rows = [measure_coverage(("lcnet", name, 0.3)) for name in ("test_resnet", "no_such_model")]
    assert rows[0]["status"] == "exact"
    assert rows[0]["parameters_left"] < 0.3
    assert "no_such_model" in rows[1]["status"]
    write(rows, tmp_path)
    assert (tmp_path / "coverage.csv").read_text().count("\n") == 3
    text = (tmp_path / "coverage.md").read_text()
    assert "Keep 0.3: 1 of 2 exact" in text
    assert "| no_such_model |" in text
