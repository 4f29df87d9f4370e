"""A training that starts from the weights of the standard model: `train.start` of a variant."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo.cells import Cell, Layout
from nemo.config import check_params, load_params
from nemo.data.prepared import Prepared, Split
from nemo.fields import ParamsError, Strict
from nemo.masking.generators import modularize
from nemo.masking.objectives import OBJECTIVES, Objective
from nemo.models import build_model
from nemo.pipeline import train as stage
from nemo.recipe import recipe
from nemo.trained import WEIGHTS
from nemo.training.cell import AtChanceError, check_learned, idle, train_cell

QUICK = load_params("profiles/quick.yaml").model_dump(exclude_unset=True)
STILL = {"train.epochs": 1, "train.lr": 1e-30, "train.weight_decay": 0.0}  # moves no weight


def params(**changes):
    variants = {"warm": {"method": "nemo", "train.start": "standard", **STILL}}
    raw = {**QUICK, "methods": ["standard", "nemo", "warm"], "variants": variants}
    raw["architecture"] = {
        "resnet18": {"width": 0.0625},
        "deit_small": {"dim": 16, "depth": 2, "heads": 2, "patch": 8, "teacher": {"width": 0.0625}},
    }
    train = {**QUICK["train"], "epochs": 2, "at_chance": "keep", **changes}
    return check_params({**raw, "train": train, "models": list(raw["architecture"])})


def noise():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8, generator=generator)
    split = Split(images, torch.arange(12) % 3)
    half = (0.5, 0.5, 0.5)
    splits = {"train": split, "val": split, "test": split}
    return Prepared("digits", "noise", ("a", "b", "c"), (16, 16), half, half, False, 0, "", splits)


@pytest.mark.parametrize("model", ["resnet18", "deit_small"])
def test_it_starts_from_the_weights_of_the_standard_cell_with_new_generators(
    model, tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))  # where checkpoints go
    for method in ("standard", "warm"):
        train_cell(params(), Cell("digits", model, method, 3), noise(), tmp_path / method)
    standard = load_file(tmp_path / "standard" / WEIGHTS)
    warm = load_file(tmp_path / "warm" / WEIGHTS)
    torch.manual_seed(3)
    new = modularize(build_model(model, 3, 16, params().architecture.of(model)))
    kept = {name.removeprefix("model."): value for name, value in warm.items()}
    for name, _ in new.model.named_parameters():
        assert torch.equal(kept[name], standard[name]), name
    generators = {n: p for n, p in new.named_parameters() if not n.startswith("model.")}
    assert generators
    for name, value in generators.items():
        assert torch.equal(warm[name], value), name


def test_it_is_made_again_where_the_standard_training_changes():
    warm = Cell("digits", "resnet18", "warm", 0)
    assert recipe(params(), warm, "train") != recipe(params(epochs=3), warm, "train")
    settings = recipe(params(), warm, "train")["settings"]
    assert (settings["train.epochs"], settings["start.epochs"]) == (1, 2)
    plain = recipe(params(), Cell("digits", "resnet18", "nemo", 0), "train")["settings"]
    assert not [key for key in plain if "start" in key]


def test_the_standard_model_cannot_start_from_itself():
    with pytest.raises(ParamsError, match=r"^params: train.start: 'standard'; accepted: in `var"):
        params(start="standard")


def test_a_standard_model_that_learned_nothing_is_no_start(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    still = params(at_chance="fail", lr=1e-30, weight_decay=0.0)
    with pytest.raises(AtChanceError, match=r"^digits/resnet18/standard-3: validation accuracy"):
        train_cell(still, Cell("digits", "resnet18", "warm", 3), noise(), tmp_path / "warm")
    assert not (tmp_path / "warm").exists()


def test_what_to_try_names_keys_that_there_are():
    plugin = Objective("mine", "mine", "mine", Strict, make=lambda *_: None, pull="mine.weight")
    tries = {
        OBJECTIVES["standard"]: "try more train.epochs or another train.lr",
        OBJECTIVES["nemo"]: "another train.lr, a smaller loss.alpha or a longer loss.warmup",
        plugin: "try more train.epochs, another train.lr or a smaller mine.weight",
    }
    for method, advice in tries.items():
        with pytest.raises(AtChanceError) as error:
            check_learned({"val_accuracy": 0.0}, noise(), method, "cell")
        assert str(error.value).endswith(advice)
    never = {"val_accuracy": 0.0, "penalty_share": 0.0}
    with pytest.raises(AtChanceError, match=r"try more train\.epochs or another train\.lr$"):
        check_learned(never, noise(), OBJECTIVES["nemo"], "cell")


def test_parts_of_the_loss_that_never_acted_are_named(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    loss = {**QUICK["loss"], "warmup": 4, "cut": {"weight": 1.0}}
    own = check_params({**params().model_dump(exclude_unset=True), "loss": loss})
    monkeypatch.setattr(stage, "images", lambda *_: noise())
    stage.run(own, Cell("digits", "resnet18", "nemo", 3), Layout(tmp_path))
    said = capsys.readouterr().err.splitlines()
    name = "nemo: digits/resnet18/nemo-3: "
    assert [line[: len(name) + 17] for line in said if line.startswith(name)] == [
        f"{name}the loss on masks", f"{name}the cut pass neve",
    ]  # fmt: skip
    begun = {"penalty_share": 0.0, "cut_loss": 0.0}
    assert idle([begun, {"penalty_share": 1.0, "cut_loss": 1}]) == []
    assert idle([begun, {"penalty_share": 0.5, "cut_loss": 1}]) == [
        "the loss on masks rose to 50 % of its weight in 2 epochs; try more of them, or a shorter "
        "warm-up"
    ]
    assert idle([{"task": 1.0}]) == []


@pytest.mark.parametrize(
    ("right", "losses", "epoch", "learned"),
    [
        (4, {"task": 0.0}, 2, False),
        (5, {"task": 1.0}, 2, True),
        (5, {"task": 1.099}, 2, False),
        (5, {"task": 1.099}, 1, True),  # the mean of an epoch that began with random weights
        (7, {"task": 1.099}, 2, False),
        (8, {"task": 1.099}, 2, True),
        (5, {"task": 0.5, "label_loss": 1.099}, 2, False),  # a distillation
    ],
)
def test_better_than_chance_by_luck_alone_is_nothing_learned(right, losses, epoch, learned):
    """Three classes of 4 images each: a guess loses ln 3 = 1.0986 nats, and 4 right ones of 12 are
    chance, give or take 1.63, so that 7 are luck."""
    last = {"val_accuracy": right / 12, "epoch": epoch, **losses}
    if learned:
        check_learned(last, noise(), OBJECTIVES["nemo"], "cell")
        return
    with pytest.raises(AtChanceError, match=r"no better (but by luck )?than always saying"):
        check_learned(last, noise(), OBJECTIVES["nemo"], "cell")


def test_a_cut_pass_runs_at_least_once_an_epoch(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loss = {**QUICK["loss"], "cut": {"weight": 1.0, "every": 2}}
    own = check_params({**params().model_dump(exclude_unset=True), "loss": loss})
    with pytest.raises(
        ParamsError, match=r"^loss.cut.every: 2; accepted: at most the 1 steps of an"
    ):
        train_cell(own, Cell("digits", "resnet18", "nemo", 3), noise(), tmp_path / "nemo")
    assert not (tmp_path / "nemo").exists()
