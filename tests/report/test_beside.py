"""Some tables show other profiles, of other data sets, beside the one they are of."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import yaml

from nemo.fields import ParamsError
from nemo.recipe import plan
from nemo.report.build import write_report
from nemo.report.collect import collect, titles
from tests.report.fake import SETTINGS, edit, make_params, make_results

OTHER = {
    "profile": "second", "datasets": ["tiles"], "models": ["resnet18"], "seeds": [0],
    "methods": ["standard", "mwt", "nemo"], "data": {"tiles": {"source": "digits"}},
}  # fmt: skip


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "profiles").mkdir()
    text = yaml.safe_dump({**SETTINGS, **OTHER})
    (tmp_path / "profiles" / "second.yaml").write_text(text)
    make_results(tmp_path, make_params())
    make_results(tmp_path, make_params(**OTHER), title="Tiles")
    return tmp_path


def test_whole_models_modules_and_headline_show_the_other_data_set(root: Path) -> None:
    alone, both = root / "alone", root / "both"
    write_report(make_params(), root, alone)
    assert write_report(make_params(beside=["second"]), root, both) == []
    for name in ("T1-models", "T2-modules", "T7-headline"):
        frame = pd.read_csv(both / f"{name}.csv", dtype=str)
        own = frame[frame["dataset"] == "tiny"].reset_index(drop=True)
        pd.testing.assert_frame_equal(own, pd.read_csv(alone / f"{name}.csv", dtype=str))
        theirs = frame[frame["dataset"] == "tiles"]
        assert set(theirs["model"]) == {"resnet18"}
        text = (both / f"{name}.md").read_text()
        assert text.index("## Tiny & real") < text.index("## Tiles\n\nTiles: ")
        assert "profile second" in text
        assert (both / "figures" / f"{name}-tiles.png").is_file()
    for name in ("history.csv", "metrics.json"):
        assert (both / name).read_bytes() == (alone / name).read_bytes()
    page = (both / "index.html").read_text()
    assert page.count("profile second") == 1


def test_a_profile_of_the_same_data_set_is_refused(root: Path) -> None:
    path = root / "profiles" / "second.yaml"
    path.write_text(path.read_text().replace("tiles", "tiny"))
    with pytest.raises(ParamsError, match="beside: second has tiny, which is here already"):
        write_report(make_params(beside=["second"]), root, root / "report")
    with pytest.raises(ParamsError, match=r"beside: 'third': no file .*third\.yaml; accepted"):
        write_report(make_params(beside=["third"]), root, root / "report")
    assert not (root / "report").exists()


def test_the_report_runs_again_when_the_other_results_change(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)

    def decides(params):  # type: ignore[no-untyped-def]
        return {path.name: made for path, made in plan(params)}["report.json"]

    before, alone = decides(make_params(beside=["second"])), decides(make_params())
    file = next((root / "results" / "second").rglob("*.json"))
    edit(file, "metrics", accuracy=0.5)
    assert decides(make_params(beside=["second"])) != before
    assert decides(make_params()) == alone


def test_data_sets_of_one_title_are_named(root: Path) -> None:
    make_results(root, make_params(**OTHER), title="Tiny & real")
    own, other = (collect(params, root) for params in (make_params(), make_params(**OTHER)))
    assert titles([own]) == {"tiny": "Tiny & real"}
    assert titles([own, other]) == {"tiny": "Tiny & real (tiny)", "tiles": "Tiny & real (tiles)"}
