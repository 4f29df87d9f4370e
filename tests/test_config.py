import copy
import re
from pathlib import Path

import pytest
import yaml

from nemo.cells import Cell
from nemo.config import load_params
from nemo.fields import ParamsError
from nemo.masking.objectives import OBJECTIVES, Objective, ObjectiveParams
from nemo.models.registry import MODELS
from nemo.settings import settings

pytestmark = pytest.mark.usefixtures("nothing_stays_registered")  # profiles have plugins

ROOT = Path(__file__).parents[1]
# with the paper's methods alone
DEFAULT = yaml.safe_load((ROOT / "params.yaml").read_text()) | {
    "methods": ["standard", "mwt", "nemo"], "variants": {}, "decompose": {},
    "masks": {"threshold": 0.9},
}  # fmt: skip
REMOVE = object()


def changed(key, value):
    """The default params with one dotted key set, or removed."""
    params = copy.deepcopy(DEFAULT)
    place = params
    *path, last = key if isinstance(key, tuple) else key.split(".")
    for part in path:
        place = place.setdefault(part, {})
    if value is REMOVE:
        del place[last]
    else:
        place[last] = value
    return params


def load(tmp_path, params):
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(params))
    return load_params(file)


def test_every_mistake_has_its_line(tmp_path):
    params = changed("loss.tau", 0)
    params["masks"]["threshold"] = 0
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, params)
    assert len(str(caught.value).splitlines()) == 2


def test_a_key_may_be_named_once(tmp_path):
    file, text = tmp_path / "params.yaml", yaml.safe_dump(DEFAULT)
    more = "profile: other\nbeside: [{a: 1, a: 2}]\ngap: {of: [], of: [nemo]}\n"
    file.write_text(text.replace("  tau: 0.2\n", "  tau: 0.2\n  tau: 0.5\n") + more)
    with pytest.raises(ParamsError) as caught:
        load_params(file)
    tau, *lines = str(caught.value).splitlines()
    number = file.read_text().split("  tau: 0.5")[0].count("\n") + 1
    assert tau == f"{file}: loss.tau: named twice, again in line {number}"
    keys = ["profile", "beside.0.a", "gap", "gap.of"]
    assert [line.split(": ")[1] for line in lines] == keys


def test_what_anchors_and_merges_bring_is_not_named_twice(tmp_path):
    file, params = tmp_path / "params.yaml", {**DEFAULT, "variants": "VARIANTS"}
    variants = """
      a: &a {method: nemo, loss.tau: 0.5}
      b: &b {method: nemo, masks.threshold: 0.5}
      c: *a
      d: {<<: *a, loss.tau: 0.7}
      e: {<<: *a, <<: *b}
    """
    file.write_text(yaml.safe_dump(params).replace("VARIANTS", variants))
    read = load_params(file)
    assert [read.for_method(name).loss.tau for name in "acde"] == [0.5, 0.5, 0.7, 0.5]
    assert read.for_method("e").masks.threshold == 0.5


def test_one_value_serves_both_families_and_timm_models_have_a_shape(tmp_path):
    params = load(tmp_path, changed(("architecture", "timm/resnet10t"), {"pretrained": True}))
    assert params.train.epochs.of("cnn") == 40
    assert params.finetune.epochs.of("cnn") == params.finetune.epochs.of("transformer") == 10
    assert load(tmp_path, changed("loss.tau", 0.5)).loss.tau == 0.5


@pytest.mark.parametrize(
    "profile", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_profile_is_valid_and_says_how_to_run_it(profile):
    assert load_params(profile).profile in (profile.stem, f"{profile.stem}-repro")
    assert "make repro" in profile.read_text()[:400]


@pytest.mark.parametrize(
    "profile", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_profile_has_what_dvc_yaml_takes_from_it(profile):
    params = yaml.safe_load(profile.read_text())
    for path in set(re.findall(r"\$\{(?!item)([a-z.]+)\}", (ROOT / "dvc.yaml").read_text())):
        place = params
        for key in path.split("."):
            place = place[key]


def test_params_is_the_quick_profile():
    assert (ROOT / "params.yaml").read_text() == (ROOT / "profiles" / "quick.yaml").read_text()


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("variants", {"a": {"method": ["nemo"]}}, "variants.a.method: unknown ['nemo']"),
        ("variants", {"a": {"method": "nemo", "mwt.beta": 1}}, "variants.a.mwt.beta: decides"),
        ("variants", {"a": {"method": "nemo", "loss.tau": 0}}, "variants.a.loss.tau: input"),
        ("variants", {"nemo": {"method": "nemo"}}, "variants.nemo: a method has that name"),
        ("gap", {"of": ["nemo", "nemo"]}, "gap.of: ['nemo', 'nemo'] names something twice"),
        ("alternatives", {"of": ["nemo"], "kinds": []}, "alternatives.kinds: [] measures nothing"),
        ("thresholds", {"of": ["nemo"], "values": []}, "thresholds.values: list should have"),
    ],
)
def test_what_a_variant_or_an_extra_may_not_be(tmp_path, key, value, line):
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, changed(key, value))
    (only,) = str(caught.value).splitlines()
    assert line in only


@pytest.mark.parametrize("table", ["granularity", "thresholds"])
def test_a_table_of_thresholds_needs_class_masks_that_have_some(tmp_path, table):
    mine = {"method": "nemo", "masks.selector": "taylor", "masks.keep": 0.3}
    params = changed("variants", {"mine": mine}) | {"methods": ["standard", "nemo", "mine"]}
    assert load(tmp_path, params | {table: {"of": ["nemo"]}})
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, params | {table: {"of": ["nemo", "mine"]}})
    (line,) = str(caught.value).splitlines()
    assert f"{table}.of: 'mine' has masks.selector taylor, which knows no thresholds" in line


def test_stage_names_that_would_be_one_are_refused(tmp_path):
    params = changed("variants", {"nemo-1": {"method": "nemo"}})
    params |= {"methods": ["standard", "nemo", "nemo-1"], "seeds": [0, 1]}
    with pytest.raises(ParamsError, match="nemo-1 is that of nemo with seed 1"):
        load(tmp_path, params | {"subsets": ["0-4", "4"]})


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("data", "the section 'data' of the method 'mine' is a word of params.yaml already"),
        ("subsets", "the section 'subsets' of the method 'mine' is a word of params.yaml already"),
        ("base_of", "the section 'base_of' of the method 'mine' is a word of params.yaml already"),
        ("loss", "the section 'loss' of the method 'mine' is another method's; choose another"),
        ("a.b", "the section 'a.b' of the method 'mine' is no word; choose another name"),
    ],
)
def test_a_plugins_section_may_not_be_one_that_is_there(tmp_path, monkeypatch, section, line):
    mine = Objective("mine", "mine", section, ObjectiveParams, lambda params, family: None)
    monkeypatch.setitem(OBJECTIVES, "mine", mine)
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, DEFAULT)
    (only,) = str(caught.value).splitlines()
    assert f"plugins: {line}" in only


def test_a_plugins_model_may_not_be_called_as_what_the_section_has(tmp_path, monkeypatch):
    monkeypatch.setitem(MODELS, "of", MODELS["resnet18"])
    with pytest.raises(ParamsError, match=r"the model 'of' is a word of params\.yaml alr"):
        load(tmp_path, DEFAULT)


def test_a_variant_may_have_another_selector(tmp_path):
    chosen = {"method": "nemo", "masks.selector": "taylor", "masks.keep": 0.3}
    params = load(tmp_path, changed("variants", {"t": chosen})).for_method("t")
    assert (params.masks.selector, params.masks.keep) == ("taylor", 0.3)
    same = {"method": "nemo", "masks.selector": "frequency"}
    params = load(tmp_path, changed("variants", {"t": same})).for_method("t")
    assert params.masks.threshold == 0.9
    like = changed("variants", {"t": {"method": "nemo", "masks.selector": "activation"}})
    params = load(tmp_path, like | {"masks": {"selector": "taylor", "keep": 0.3}}).for_method("t")
    assert (params.masks.selector, params.masks.keep) == ("activation", 0.3)


def test_a_data_set_may_be_named_like_a_key(tmp_path):
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, changed("data", {"source": {"source": "digits", "nope": 1}}))
    assert "data.source.nope: unknown key; accepted: classes, crop," in str(caught.value)


def test_where_a_training_runs_decides_nothing_also_where_it_is_the_start(tmp_path):
    warm = {"method": "nemo", "train.start": "standard"}
    params = changed("variants", {"warm": warm})
    here = load(tmp_path, params)
    params["train"] |= {"processes": 2, "at_chance": "keep"}
    there, cell = load(tmp_path, params), Cell("digits", "resnet18", "warm", 0)
    assert settings(here, cell, "cnn") == settings(there, cell, "cnn")
    assert "start.epochs" in settings(here, cell, "cnn")
