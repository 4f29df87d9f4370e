"""T3 to T7, alternatives and gap: their rows follow from params and from the rows of results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from nemo.cells import Cell
from nemo.config import Params, load_params
from nemo.metrics import METRICS, Subject, logged, metric
from nemo.report.build import write_report
from nemo.report.collect import collect
from nemo.report.drift import check
from nemo.report.table import csv_text
from nemo.report.tables import T8, TABLES, frames
from nemo.report.words import headlines
from nemo.results import result_file
from tests.report.fake import edit, extras, make_params, make_results, make_times

VARIANTS = {
    "released": {"method": "nemo", "loss.form": "released"},
    "tau-0.1": {"method": "nemo", "loss.tau": 0.1},
    "released-tau-0.1": {"method": "nemo", "loss.form": "released", "loss.tau": 0.1},
    "cohesion-only": {"method": "mwt", "mwt.beta": 0},
    "twice": {"method": "mwt", "mwt.alpha": 1.0, "mwt.beta": 3.0},
    "both": {"method": "nemo", "loss.alpha": 4.0, "loss.tau": 0.5},
}
METHODS = ["standard", "mwt", "nemo"]
NAMES = ("alternatives", "budgets", "gap", "thresholds", "granularity")
EXTRA: dict[str, Any] = {name: {"of": ["nemo"]} for name in NAMES}
EXTRA["alternatives"]["kinds"] = ["pruned", "standard-tuned"]
EXTRA["granularity"]["subsets"] = ["0+1", "all"]


def variants(root: Path, **changes: Any) -> Params:
    """Results of resnet18 by three methods and six variants, which params do not list any more."""
    asked: dict[str, Any] = {"models": ["resnet18"], "variants": VARIANTS} | changes
    make_results(root, make_params(**asked | {"methods": [*METHODS, *VARIANTS]}))
    return make_params(**asked)


def rows(frame: pd.DataFrame, *names: str) -> list[tuple[Any, ...]]:
    return list(frame[list(names)].itertuples(index=False, name=None))


def test_variants_that_methods_do_not_list_are_in_t3_and_t4_only(tmp_path: Path) -> None:
    tables = frames(collect(variants(tmp_path, seeds=[0]), tmp_path))
    assert list(tables["T1-models"]["method"]) == METHODS
    assert rows(tables["T3-objectives"], "method", "changes") == [
        ("mwt", ""),
        ("cohesion-only", "mwt.beta 0.0"),
        ("nemo", ""),
        ("released", "loss.form released"),
    ]
    assert rows(tables["T4-sensitivity"], "knob", "method", "value") == [
        ("loss.tau", "nemo", "0.1"),
        ("loss.tau", "nemo", "0.2"),
        ("loss.tau", "released", "0.1"),
        ("loss.tau", "released", "0.2"),
        ("mwt.alpha and mwt.beta", "mwt", "0.5"),
        ("mwt.alpha and mwt.beta", "mwt", "1"),
    ]
    assert {"layers", "parameters", "epochs"}.isdisjoint(tables["T4-sensitivity"])
    assert tables["T3-objectives"]["module_accuracy"].tolist() == pytest.approx([0.955] * 4)


def test_a_listed_variant_is_in_t1_and_t2_too(tmp_path: Path) -> None:
    params = variants(tmp_path, seeds=[0], methods=[*METHODS, "tau-0.1"])
    tables = frames(collect(params, tmp_path))
    assert "tau-0.1" in set(tables["T1-models"]["method"])
    assert "tau-0.1" in set(tables["T2-modules"]["method"])
    assert set(tables["T7-headline"]["method"]) == {"nemo", "tau-0.1"}


def test_without_variants_there_is_no_t3_and_no_t4(tmp_path: Path) -> None:
    params = make_params(methods=["standard", "nemo"])
    make_results(tmp_path, params)
    assert list(frames(collect(params, tmp_path))) == ["T1-models", "T2-modules"]


def test_a_knob_compares_the_seeds_that_its_values_share(tmp_path: Path) -> None:
    params = variants(tmp_path)
    for method in VARIANTS:
        result_file(tmp_path, "fake", Cell("tiny", "resnet18", method, 1)).unlink()
    frame = frames(collect(params, tmp_path))["T4-sensitivity"]
    assert set(frame["seed"]) == {0}


def test_a_knob_of_the_fine_tuning_is_none_of_t4_whose_figures_are_of_the_whole_network(
    tmp_path: Path,
) -> None:
    own = {name: VARIANTS[name] for name in ["tau-0.1"]}
    own["tuned-1"] = {"method": "nemo", "finetune.epochs": 1}
    asked: dict[str, Any] = {"models": ["resnet18"], "seeds": [0], "variants": own}
    make_results(tmp_path, make_params(**asked, methods=[*METHODS, *own]))
    frame = frames(collect(make_params(**asked), tmp_path))["T4-sensitivity"]
    assert set(frame["knob"]) == {"loss.tau"}


@pytest.fixture
def everything(tmp_path: Path) -> Params:
    """Results with the rows of every table."""
    params = variants(tmp_path, seeds=[0], **EXTRA)
    cell = Cell("tiny", "resnet18", "nemo", 0)
    path = result_file(tmp_path, "fake", cell)
    content = json.loads(path.read_text()) | extras(params.subsets)
    path.write_text(json.dumps(content))
    make_times(tmp_path, params, cell)
    return params


def test_every_table_is_made_of_the_rows_at_hand(everything: Params, tmp_path: Path) -> None:
    out = tmp_path / "reports"
    assert write_report(everything, tmp_path, out) == []
    page = (out / "index.html").read_text()
    for table in TABLES:
        assert f'id="{table.name}"' in page
        assert (out / "figures" / f"{table.name}-tiny.png").stat().st_size > 5000
        assert "## Tiny & real" in (out / f"{table.name}.md").read_text()
    assert check(out, out) == []


def test_figures_of_the_other_measurements(everything: Params, tmp_path: Path) -> None:
    tables = frames(collect(everything, tmp_path))
    t2 = tables["T2-modules"].set_index(["subset", "method", "alternative"])
    pruned = t2.loc[("0+1", "nemo", "pruned")]
    assert (pruned["accuracy"], pruned["best_test_accuracy"]) == (0.9, 0.92)
    assert pruned["parameters_ratio"] == pytest.approx(0.1)
    assert pd.isna(pruned["accuracy_modular"])
    assert t2.loc[("0+1", "nemo", ""), "cpu_ms_128"] == 256
    assert rows(tables["T5-granularity"], "subset", "threshold", "granularity")[:2] == [
        ("0+1", "0.5", "neurons"),
        ("0+1", "0.5", "heads"),
    ]
    assert rows(tables["T6-costs"], "what", "subset", "ms")[2:4] == [
        ("training step, nemo", "", 50.0),
        ("decompose", "0+1", 500.0),
    ]
    assert rows(tables["gap"], "subset", "binary_bn", "mean_low")[0] == ("0+1", 0.7, 0.7)
    at = tables["T4-sensitivity"]
    at = at[at["knob"] == "masks.threshold"]
    assert rows(at, "method", "value", "nrr") == [("nemo", "0.1", 0.3), ("nemo", "0.5", 0.3)]


def test_alternatives_are_behind_where_the_module_is_ahead(
    everything: Params, tmp_path: Path
) -> None:
    frame = frames(collect(everything, tmp_path))["alternatives"].set_index("alternative")
    assert list(frame.index) == ["pruned", "standard-tuned", "standard"]
    pruned, whole = frame.loc["pruned"], frame.loc["standard"]
    ahead = [100 * (0.965 - 0.9), 100 * (0.945 - 0.9)]
    assert pruned["ahead_points"] == pytest.approx(sum(ahead) / 2)
    assert (pruned["worst_points"], pruned["best_points"]) == pytest.approx((ahead[1], ahead[0]))
    assert (pruned["subsets_ahead"], pruned["subsets"]) == (2, 2)
    assert whole["ahead_points"] == pytest.approx(-0.5)
    assert whole["flops_ratio"] == pytest.approx((1 / 0.2 + 1 / 0.3) / 2)


def test_a_module_is_ahead_of_each_rival_and_in_its_own_rows_of_the_best(
    everything: Params, tmp_path: Path
) -> None:
    frame = frames(collect(everything, tmp_path))["T8-budgets"]
    assert len(frame) == 2 * 2 * 4 * 3 * len(frame["model"].unique()) * frame["seed"].nunique()
    assert set(frame["device"]) == {"GPU"}
    own = frame[
        (frame["subset"] == "all") & (frame["equal"] == "flops") & (frame["epochs"] == "0.1")
    ]
    ahead = own.groupby("competitor")["ahead_points"].first()
    # the whole standard model is larger than the module: no rival of its size
    assert dict(ahead) == pytest.approx(
        {"module": 5.0, "pruned": 10.0, "taylor": 5.0, "standard-tuned": -5.0}
    )
    assert next(iter(own["accuracy"])) == pytest.approx(0.9 + 0.001 - 0.02)


def test_budgets_are_shown_as_means_of_subsets_and_none_where_one_is_missing(
    everything: Params, tmp_path: Path
) -> None:
    path = result_file(tmp_path, "fake", Cell("tiny", "resnet18", "nemo", 0))
    content = json.loads(path.read_text())
    taken = {"accuracy": None, "val_accuracy": None, "parameters": None, "flops": None}
    for row in content["budgets"]:
        if (row["competitor"], row["subset"]) == ("taylor", "0+1"):
            row.update(taken, lr=None, note="no smaller one")
            del row["make_seconds"], row["tune_seconds"]
        if (row["competitor"], row["epochs"]) == ("module", 1):
            row["tune_seconds"] = 3.0 if row["subset"] == "all" else 2.0
    path.write_text(json.dumps(content))
    write_report(everything, tmp_path, tmp_path / "report")
    lines = (tmp_path / "report/T8-budgets.md").read_text().splitlines()
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    table = {tuple(cells[:5]): dict(zip(shown[0], cells, strict=True)) for cells in shown[2:]}
    module = table["resnet18", "nemo", "parameters", "module", "1"]
    assert module["Accuracy %"].startswith("90.0")
    assert module["Module ahead, points"].startswith("+10.0")  # of pruned: taylor lacks one
    assert module["Fine-tuning, s"] == "2.5"
    assert table["resnet18", "nemo", "parameters", "taylor", "1"]["Accuracy %"] == ""
    assert table["resnet18", "nemo", "parameters", "pruned", "1"]["Accuracy %"] == "80.0"
    assert (tmp_path / "report/figures/T8-budgets-tiny.png").is_file()


def test_the_headline_compares_modules_of_the_same_subset(tmp_path: Path) -> None:
    params = make_params(models=["resnet18"], seeds=[0])
    make_results(tmp_path, params)
    path = result_file(tmp_path, "fake", Cell("tiny", "resnet18", "nemo", 0))
    edit(path, "modules", 0, accuracy=0.985)
    (row,) = frames(collect(params, tmp_path))["T7-headline"].to_dict("records")
    assert row["gain_points"] == pytest.approx(100 * 0.02 / 2)
    assert row["size_reduction"] == pytest.approx(1 - (0.1 / 0.13 + 0.2 / 0.23) / 2, rel=1e-4)
    assert (row["loss_points"], row["against_loss_points"]) == pytest.approx((1.0, 2.0))
    results = collect(params, tmp_path)
    lines = "\n".join(headlines(results, frames(results)))
    assert "NeMo's modules against MwT's" in lines
    assert "resnet18 +1.0 points and 18 % fewer" in lines
    assert "on resnet18, and on 1 of 2 pairs of model and subset: resnet18 0+1." in lines


@pytest.fixture
def own_metric() -> Iterator[str]:
    """A metric as a plugin registers it."""

    @metric("sparsity", scope="cell", header="Sparsity")
    def sparsity(of: Subject) -> float | None:
        return None if of.cell.masks is None else 1 - of.cell.metrics["nrr"]

    yield "sparsity"
    del METRICS["cell", "sparsity"]


def test_a_metric_of_the_users_own_is_shown_compared_and_logged(
    own_metric: str, tmp_path: Path
) -> None:
    params = make_params(models=["resnet18"], seeds=[0])
    make_results(tmp_path, params)
    results = collect(params, tmp_path)
    assert frames(results)["T1-models"][own_metric].tolist()[1:] == [0.8, 0.8]
    assert logged(results.subject(results.cells[1]))[own_metric] == pytest.approx(0.8)
    for folder in ("one", "other"):
        write_report(params, tmp_path, tmp_path / folder)
    assert "Sparsity" in (tmp_path / "one" / "T1-models.md").read_text()
    table = tmp_path / "other" / "T1-models.csv"
    table.write_text(table.read_text().replace(",0.8\n", ",0.7\n"))
    assert f"{own_metric} was 0.7, is 0.8, allowed ±0" in check(tmp_path / "one", table.parent)[0]
    with pytest.raises(ValueError, match="'sparsity' of a cell exists already"):
        metric("sparsity", scope="cell")(lambda of: None)


def test_the_committed_cifar10_tables_are_those_of_the_committed_results() -> None:
    params = load_params("profiles/cifar10-cpu.yaml")
    results = collect(params, Path())
    without = [f"cifar10/{model}/nemo-cut-0" for model in ("simcnn", "rescnn", "deit_small")]
    assert (results.missing, results.left_out) == (without, [])
    tables = frames(results)
    assert {table.name for table in TABLES} == {*tables, T8.name}
    for name, frame in tables.items():
        lines = Path(f"reports/cifar10-cpu/{name}.csv").read_text().splitlines(keepends=True)
        own = [line for line in lines if not line.startswith("svhn,")]  # which stands beside it
        assert csv_text(frame) == "".join(own), name
        assert (len(own) < len(lines)) == (name in ("T1-models", "T2-modules", "T7-headline")), name
    assert Path("reports/cifar10-cpu/index.html").stat().st_size < 3e6


def test_published_accuracies_stand_beside_the_same_knob() -> None:
    results = collect(load_params("profiles/cifar10-cpu.yaml"), Path())
    shown = frames(results)["T4-sensitivity"].dropna(subset=["published_accuracy"]).round(6)
    assert set(shown["model"]) == {"vgg16"}
    expected = {("loss.alpha", "1", 0.9002), ("loss.tau", "0.1", 0.8614)}
    expected |= {("loss.tau", "0.2", 0.8949), ("loss.tau", "0.3", 0.8963)}
    assert set(rows(shown, "knob", "value", "published_accuracy")) == expected | {
        ("loss.tau", "0.5", 0.9003)
    }
