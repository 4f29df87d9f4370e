"""The tables, checked against literal recomputation, and the page around them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from nemo.cells import Cell
from nemo.cli.main import cli
from nemo.config import Params
from nemo.forms import count, points
from nemo.report import maps
from nemo.report.build import render_tables, write_report
from nemo.report.collect import Results, collect
from nemo.report.diagnosis import diagnose
from nemo.report.style import marks, tones
from nemo.report.tables import frames
from nemo.report.words import headlines
from nemo.results import MissingResultError, result_file
from tests.report.fake import accuracy, edit, make_params, make_results

PARAMS = make_params()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    make_results(root, PARAMS)
    write_report(PARAMS, root, root / "reports" / "fake")
    return root


@pytest.fixture(scope="module")
def out(root: Path) -> Path:
    return root / "reports" / "fake"


def path_of(root: Path, model: str, method: str, seed: int = 0) -> Path:
    return result_file(root, "fake", Cell("tiny", model, method, seed))


def markdown_rows(text: str) -> dict[tuple[str, ...], list[str]]:
    """Rows of a Markdown file's tables by their first two columns."""
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines()]
    return {tuple(row[:2]): row for row in rows if len(row) > 2}


def test_t1_has_a_row_per_cell(out: Path) -> None:
    frame = pd.read_csv(out / "T1-models.csv").set_index(["dataset", "model", "method", "seed"])
    assert len(frame) == 2 * 3 * 2
    for key, row in frame.iterrows():
        assert isinstance(key, tuple)
        cell = Cell(*key)
        standard = accuracy(Cell(cell.dataset, cell.model, "standard", cell.seed))
        assert row["accuracy"] == accuracy(cell)
        assert row["device"] == "CPU"
        if cell.method == "standard":
            assert pd.isna(row["loss_points"])
            assert pd.isna(row["nrr"])
            assert pd.isna(row["neurons"])
        else:
            assert row["loss_points"] == pytest.approx(100 * (standard - accuracy(cell)))
            assert row["nrr"] == pytest.approx(0.2 + 0.02 * cell.seed)
            assert row["neurons"] == 40 * row["layers"]
        assert row["epochs"] == 3


def test_t2_has_a_row_per_module_and_for_the_standard_model(root: Path, out: Path) -> None:
    frame = pd.read_csv(out / "T2-modules.csv", dtype={"subset": str})
    assert len(frame) == 2 * 2 * 3 * 2
    for row in frame.to_dict("records"):
        cell = Cell("tiny", row["model"], row["method"], row["seed"])
        content = json.loads(result_file(root, "fake", cell).read_text())
        standard = json.loads(path_of(root, row["model"], "standard", row["seed"]).read_text())
        before = standard["subsets"][row["subset"]]
        assert row["accuracy_standard"] == pytest.approx(before)
        if row["method"] == "standard":
            assert row["accuracy"] == before
            continue
        (entry,) = [m for m in content["modules"] if m["subset"] == row["subset"]]
        assert row["classes"] == len(entry["classes"])
        assert row["accuracy_modular"] == pytest.approx(content["subsets"][row["subset"]])
        assert row["accuracy_ratio"] == pytest.approx(entry["accuracy"] / before, rel=1e-5)
        assert row["parameters_ratio"] == pytest.approx(entry["parameters"] / 704_000)
        for name in set(entry) - {"classes", "subset", "vacuous", "history"}:
            assert row[name] == pytest.approx(entry[name]), name


def test_markdown_shows_mean_and_sd_over_seeds(out: Path) -> None:
    rows = markdown_rows((out / "T1-models.md").read_text())
    two = [100 * accuracy(Cell("tiny", "resnet18", "nemo", seed)) for seed in (0, 1)]
    assert rows["resnet18", "nemo"][2] == f"{fmean(two):.1f} ± {stdev(two):.1f}"
    assert rows["resnet18", "standard"][3] == ""
    assert rows["resnet18", "nemo"][-2] == "704 k"
    modules = (out / "T2-modules.md").read_text()
    assert "70.4 k (10 %)" in modules


def test_every_table_says_its_scale(out: Path) -> None:
    for name in ("T1-models.md", "T2-modules.md", "index.html"):
        text = (out / name).read_text().replace("&amp;", "&")
        for part in (
            "Tiny & real: 1,234 train, 100 val, 200 test images of 16 x 16 px, 4 classes",
            "resnet18 (width 0.25; 704 k parameters), vit_small (dim 64, depth 4, heads 4, patch 4",
            "parameters): 3 epochs, modules fine-tuned for 2",
            "Seeds 0, 1; profile fake. Trained on: an abacus.",
        ):
            assert part in text, (name, part)


def test_one_seed_shows_no_sd(tmp_path: Path) -> None:
    params = make_params(seeds=[0], models=["vit_small"])
    make_results(tmp_path, params)
    write_report(params, tmp_path, tmp_path / "report")
    assert "±" not in (tmp_path / "report" / "T1-models.md").read_text()


def test_metrics_json_is_small_and_numeric(out: Path) -> None:
    metrics = json.loads((out / "metrics.json").read_text())
    nemo = metrics["tiny"]["resnet18"]["nemo"]
    assert set(nemo) == {"accuracy", "nrr", "coupling", "module_accuracy", "module_size"}
    assert nemo["accuracy"] == pytest.approx(0.942)
    assert nemo["module_accuracy"] == pytest.approx((0.965 + 0.945) / 2)
    assert nemo["module_size"] == pytest.approx((0.1 + 0.2) / 2)
    assert metrics["tiny"]["resnet18"]["standard"] == {"accuracy": 0.952}


def test_history_is_tidy(out: Path) -> None:
    frame = pd.read_csv(out / "history.csv")
    assert len(frame) == 12 * 3
    assert list(frame.columns)[:3] == ["cell", "epoch", "loss"]
    assert "tiny/vit_small/nemo-1" in set(frame["cell"])


def test_the_page_needs_nothing_from_outside(out: Path) -> None:
    page = (out / "index.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert not re.search(r"https?://|@import|url\(|<script|<link", page)
    figures = len(list(out.glob("figures/*.png")))
    assert page.count("data:image/webp;base64,") == figures == 3 + 1 + 2 * 2


def test_names_are_escaped(tmp_path: Path) -> None:
    params = make_params(seeds=[0], models=["vit_small"])
    make_results(tmp_path, params, title="<script>alert(1)</script>")
    write_report(params, tmp_path, tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_figures_hold_forty_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    variants = {f"nemo-{n}": {"method": "nemo", "loss.alpha": n} for n in range(1, 41)}
    one: dict[str, Any] = {"models": ["resnet18"], "seeds": [0], "variants": variants}
    params = make_params(**one, methods=["standard", *variants])
    make_results(tmp_path, params)
    monkeypatch.setattr(maps, "TALLEST", 24.0)
    write_report(params, tmp_path, tmp_path / "out")
    sizes = {}
    for picture in (tmp_path / "out/figures").glob("*.png"):
        with Image.open(picture) as image:
            sizes[picture.name] = [side / 150 for side in image.size]  # inches
    assert max(sizes["coupling-tiny-resnet18.png"]) < 24.1
    assert max(sizes["kept-tiny-resnet18.png"]) < 24 + 40 * 0.25 + 3
    assert sizes["T1-models-tiny.png"][1] > 41 * 0.3  # a line for each method
    assert max(max(size) for size in sizes.values()) < 16_383 / 150  # where WebP ends
    assert not [str(w.message) for w in recwarn if "layout" in str(w.message)]


def test_methods_of_one_colour_have_different_markers() -> None:
    colours = tones(f"variant-{n}" for n in range(40))
    forms = marks(colours)
    assert len({(colours[name], forms[name]) for name in colours}) == 40


def test_a_data_set_with_unlisted_variants_alone(tmp_path: Path) -> None:
    images = {"source": "digits", "size": 16}
    one: dict[str, Any] = {"models": ["resnet18"], "seeds": [0], "datasets": ["tiny", "tiles"]}
    one["data"] = {"tiny": images, "tiles": images}
    one["variants"] = {"strong": {"method": "nemo", "loss.alpha": 9.0}}
    make_results(tmp_path, make_params(**one, methods=["standard", "strong"]))
    standard = [
        result_file(tmp_path, "fake", Cell(name, "resnet18", "standard", 0))
        for name in ("tiny", "tiles")
    ]
    standard[1].unlink()
    params = make_params(**one, methods=["standard", "nemo"])
    write_report(params, tmp_path, tmp_path / "out")
    assert set(pd.read_csv(tmp_path / "out" / "T1-models.csv")["dataset"]) == {"tiny"}
    standard[0].unlink()
    with pytest.raises(MissingResultError, match="none of the cells of params has results"):
        write_report(params, tmp_path, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_same_results_give_the_same_bytes(root: Path, out: Path, tmp_path: Path) -> None:
    write_report(PARAMS, root, tmp_path / "again")
    assert _files(tmp_path / "again") == _files(out)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_that_is_no_report_is_not_replaced(root: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="no report"):
        write_report(PARAMS, root, tmp_path)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("arguments", [[], ["--show"], ["--check"]])
def test_a_package_that_is_not_installed_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    shutil.copy(Path(__file__).parents[2] / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("pandas", "tabulate"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("nemo.report.")]:
        monkeypatch.delitem(sys.modules, name)  # as where nobody has imported it
    result = CliRunner().invoke(cli, ["report", *arguments])
    line = "nemo: pandas, tabulate not found: pip install 'nemo-modular[report]'\n"
    assert (result.exit_code, result.output) == (1, line)


def test_the_tables_print(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    render_tables(out)
    printed = capsys.readouterr().out
    assert (out / "T1-models.md").read_text() in printed
    assert "| resnet18  | nemo" in printed
    with pytest.raises(MissingResultError, match=r"T1-models\.md is missing"):
        render_tables(tmp_path)


def test_the_tables_print_framed_on_a_terminal(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    render_tables(out)
    printed = capsys.readouterr().out
    assert "70.4 k (10 %)" in printed
    assert "|:--" not in printed


def one_cell(tmp_path: Path) -> Params:
    params = make_params(models=["vit_small"], seeds=[0])
    make_results(tmp_path, params)
    return params


def said(results: Results) -> str:
    return "\n".join(headlines(results, frames(results)))


def test_the_headline_follows_the_numbers(tmp_path: Path) -> None:
    params = one_cell(tmp_path)
    good = said(collect(params, tmp_path))
    assert "vit_small 95.0 → 94.0 % with 20 % of the neurons" in good
    assert "standard → NeMo" in good
    assert "no model loses more than 1.0 points" in good
    assert "hold 15 % of the standard model's parameters" in good
    edit(path_of(tmp_path, "vit_small", "nemo"), "metrics", accuracy=0.9)
    bad = said(collect(params, tmp_path))
    assert "one model loses 5.0 points, more than the 3 that are acceptable" in bad


@pytest.mark.parametrize(
    ("method", "group", "row", "change", "evidence"),
    [
        ("nemo", "metrics", None, {"accuracy": 0.9}, "loses 5.0 points"),
        ("nemo", "metrics", None, {"coupling": 0.81}, "coupling 0.810"),
        ("mwt", "metrics", None, {"cohesion": 0.42}, "cohesion 0.420"),
        ("mwt", "metrics", None, {"dead_layers": 4}, "4 of 12 masked layers"),
        ("nemo", "history", -1, {"penalty_share": 0.0}, "the loss on masks never counted"),
        ("nemo", "history", -1, {"cut_loss": 0.0}, "the cut pass never ran"),
        ("nemo", "modules", 1, {"accuracy": 0.7}, "from 50.0 to 70.0 %, 25.0 points below"),
        ("mwt", "modules", 0, {"certificate": 1e-3}, "certificate 1.0e-03"),
        ("mwt", "modules", 0, {"vacuous": True}, "hardly vary"),
        ("mwt", "modules", 0, {"blocked": 2}, "2 operations"),
    ],
)
def test_each_failure_signature_is_flagged_with_its_evidence(
    tmp_path: Path, method: str, group: str, row: int | None, change: dict[str, Any], evidence: str
) -> None:
    params = one_cell(tmp_path)
    assert diagnose(collect(params, tmp_path)) == []
    edit(path_of(tmp_path, "vit_small", method), group, row, **change)
    (flag,) = diagnose(collect(params, tmp_path))
    assert evidence in flag.what
    assert flag.advice


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (845, "845"), (999.6, "1.00 k"), (12_345, "12.3 k"), (123_456, "123 k"),
     (999_700, "1.00 M"), (11_170_000, "11.2 M"), (1.2e9, "1.20 G")],
)  # fmt: skip
def test_counts_have_three_digits(value: float, text: str) -> None:
    assert count(value) == text


def test_points_are_never_minus_zero() -> None:
    assert [points(v) for v in (-0.04, 0.0, 0.06, -1.25)] == ["0.0", "0.0", "+0.1", "-1.2"]


def test_a_report_imports_no_torch(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nemo.report.build import write_report; "
        "from tests.report.fake import make_params; "
        f"write_report(make_params(), Path({str(root)!r}), Path({str(tmp_path / 'r')!r})); "
        "sys.exit('torch' in sys.modules)"
    )
    here = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=here, check=False).returncode == 0
