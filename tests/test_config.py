import copy
from pathlib import Path

import pytest
import yaml

from nemo.config import ParamsError, load_params

ROOT = Path(__file__).parents[1]
DEFAULT = yaml.safe_load((ROOT / "params.yaml").read_text())
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


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("nope", 1, "nope: unknown key; accepted: architecture, data,"),
        ("loss.taau", 1, "loss.taau: unknown key; accepted: alpha, form, tau"),
        (
            "loss.alpha",
            {"cnn": 1, "transformer": 1, "rnn": 1},
            "loss.alpha.rnn: unknown key; accepted: cnn, transformer",
        ),
        ("data.digits.colour", 1, "data.digits.colour: unknown key; accepted: crop, flip,"),
        ("loss", REMOVE, "loss: required, and missing"),
        ("loss.tau", 0, "loss.tau: input should be greater than 0, got 0"),
        ("loss.tau", float("nan"), "loss.tau: input should be a finite number, got nan"),
        ("loss.alpha", -1, "loss.alpha: input should be greater than or equal to 0, got -1"),
        ("loss.form", "paper", "loss.form: input should be 'equation' or 'released', got 'paper'"),
        ("masks.threshold", 1.5, "masks.threshold: input should be less than or equal to 1"),
        ("train.epochs", 2.5, "train.epochs: input should be a valid integer, got 2.5"),
        ("train.optimizer", "lion", "train.optimizer: input should be 'sgd' or 'adamw'"),
        ("train.batch_size", 1, "train.batch_size: input should be greater than or equal to 2"),
        ("train.processes", 0, "train.processes: input should be greater than or equal to 1"),
        ("train.processes", 3, "train.processes: 3 processes do not share batch_size 64 evenly"),
        ("finetune.processes", 5, "finetune.processes: 5 processes do not share batch_size 64"),
        ("finetune.head", "old", "finetune.head: input should be 'inherit' or 'new', got 'old'"),
        ("models", ["vgg17"], "models: unknown model 'vgg17'; accepted: simcnn, vgg16,"),
        ("models", ["timm/nope"], "models: timm has no model 'nope'"),
        ("models", [], "models: list should have at least 1 item"),
        ("architecture.vgg17", {}, "architecture: unknown model 'vgg17'; accepted: simcnn,"),
        ("architecture.vit_small.heads", 3, "architecture.vit_small: heads must divide dim"),
        ("architecture.resnet18.width", 0, "architecture.resnet18.width: input should be greater"),
        ("methods", ["standard"], "methods: 'nemo' is always part; accepted besides: mwt"),
        ("methods", ["standard", "nemo", "mine"], "methods.2: input should be 'standard', 'mwt'"),
        ("datasets", ["svhn"], "datasets: 'svhn' is not in data; accepted: digits"),
        ("data.digits.source", "mnist", "data.digits.source: unknown source 'mnist'; accepted:"),
        ("data.digits.validation", 0.9, "data.digits.validation: input should be less than"),
        ("subsets", ["cat dog"], "subsets: 'cat dog' is no subset; accepted: all, 0-4, 3+5,"),
        ("subsets", ["0+1", "0+1"], "subsets: ['0+1', '0+1'] names something twice"),
        ("seeds", [0, 0], "seeds: [0, 0] names something twice"),
        ("seeds", [-1], "seeds.0: input should be greater than or equal to 0, got -1"),
        ("device", "tpu", "device: string should match pattern"),
        ("profile", "../x", "profile: string should match pattern"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key_and_what_is_accepted(
    tmp_path, key, value, message
):
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, changed(key, value))
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{tmp_path}/params.yaml: {message}")


def test_every_mistake_has_its_line(tmp_path):
    params = changed("loss.tau", 0)
    params["masks"]["threshold"] = 0
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, params)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not YAML"), ("- 1", "expected a mapping of keys, got list"), ("", "got NoneType")],
)
def test_a_file_that_is_no_mapping(tmp_path, text, message):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ParamsError, match=message):
        load_params(tmp_path / "params.yaml")


def test_a_missing_file(tmp_path):
    with pytest.raises(ParamsError, match="No such file"):
        load_params(tmp_path / "nope.yaml")


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


def test_params_is_the_quick_profile():
    assert (ROOT / "params.yaml").read_text() == (ROOT / "profiles" / "quick.yaml").read_text()
