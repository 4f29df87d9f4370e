from benchmarks import module_speed
from benchmarks.training_overhead import CASES, measure
from tests.test_models import SMALL


def test_the_overhead_benchmark_measures_both_steps():
    for name in ("resnet18", "vit_small"):
        row = measure(name, "tiny", SMALL[name], batch=4, rounds=2)
        assert row["standard_ms"] > 0
        assert row["ratio"] > 0
    assert {name for name, *_ in CASES} == {"vgg16", "resnet18", "vit_small"}


def test_the_speed_benchmark_measures_modules_as_cut_and_folded():
    rows = module_speed.measure("resnet18", {1: 2, 4: 2}, SMALL["resnet18"])
    assert [(row["batch"], row["module"]) for row in rows] == [
        (batch, form) for batch in (1, 4) for form in ("as cut", "folded")
    ]
    assert all(row["flops_ratio"] > 1 and row["share"] > 0 for row in rows)
