from benchmarks.training_overhead import CASES, measure
from tests.test_models import SMALL


def test_the_overhead_benchmark_measures_both_steps():
    for name in ("resnet18", "vit_small"):
        row = measure(name, "tiny", SMALL[name], batch=4, rounds=2)
        assert row["standard_ms"] > 0
        assert row["ratio"] > 0
    assert {name for name, *_ in CASES} == {"vgg16", "resnet18", "vit_small"}
