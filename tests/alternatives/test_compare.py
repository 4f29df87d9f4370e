import pytest
import torch
from torch import nn

from nemo.alternatives import ALTERNATIVES, alternative
from nemo.alternatives.compare import alternatives
from nemo.config import check_params
from nemo.cost import count_flops
from nemo.data import Batches
from nemo.files import rounded
from nemo.predict import accuracy, predict
from tests.small import SUBSET, raw_params

COLUMNS = {
    "alternative", "subset", "parameters", "flops", "accuracy_step0", "accuracy", "best_epoch",
    "val_accuracy", "val_accuracy_recalibrated", "val_accuracy_step0",
}  # fmt: skip
PLUGIN = """
from torch import nn
from nemo.alternatives import alternative

@alternative("linear", label="linear", budget=True)
def linear(context):
    height, width = context.data.size
    classes = len(context.classes())
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * height * width, classes))
"""


@pytest.fixture(autouse=True)
def _restore(tmp_path, monkeypatch):
    """No kind outlives its test, and checkpoints are in a folder of the test's own."""
    known = dict(ALTERNATIVES)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    yield
    ALTERNATIVES.clear()
    ALTERNATIVES.update(known)


def asking(kinds, watch=False, **changes):
    asked = {"of": ["nemo"], "kinds": kinds}
    raw = raw_params("resnet18", alternatives=asked, **changes)
    raw["finetune"]["watch_test"] = watch
    return check_params(raw)


def test_a_kind_of_the_users_own_file_is_compared(resnet, tmp_path):
    _, cell, data, layout = resnet
    (tmp_path / "mine.py").write_text(PLUGIN)
    plugins = [str(tmp_path / "mine.py")]
    params = asking(["linear", "standard-tuned"], watch=True, plugins=plugins)
    linear, tuned = alternatives(params, cell, data, layout)
    assert set(linear) == set(tuned) == COLUMNS | {"best_test_accuracy"}
    assert (linear["alternative"], tuned["alternative"]) == ("linear", "standard-tuned")
    assert linear["subset"] == SUBSET
    assert linear["parameters"] == 2 * (3 * 16 * 16 + 1)
    assert tuned["parameters"] > linear["parameters"]
    assert linear["accuracy"] <= linear["best_test_accuracy"] or linear["best_epoch"] == 0
    assert list((tmp_path / ".checkpoints").iterdir()) == []


def test_a_row_measures_the_model_before_its_fine_tuning(resnet):
    _, cell, data, layout = resnet
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 2))
    with torch.no_grad():
        test = Batches(data.restrict([3, 1]).splits["test"], data.mean, data.std, 64)
        before = accuracy(*predict(model, test))
    alternative("kept", label="kept", budget=True)(lambda context: model)
    (row,) = alternatives(asking(["kept"]), cell, data, layout)
    assert row["accuracy_step0"] == before
    assert row["accuracy"] == accuracy(*predict(model, test))
    assert row["flops"] == count_flops(model, torch.zeros(1, 3, 16, 16))


def test_a_killed_comparison_goes_on_where_it_was(resnet, monkeypatch):
    _, cell, data, layout = resnet
    calls = []

    def make(name):
        def counted(context):
            calls.append(name)
            if name == "b" and calls.count("b") == 1:
                raise KeyboardInterrupt
            return nn.Sequential(nn.Flatten(), nn.Linear(768, 2))

        return counted

    for name in "abc":
        alternative(name, label=name, budget=True)(make(name))
    params = asking(["a", "b", "c"])
    with pytest.raises(KeyboardInterrupt):
        alternatives(params, cell, data, layout)
    rows = alternatives(params, cell, data, layout)
    assert calls == ["a", "b", "b", "c"]
    undisturbed = alternatives(params, cell, data, layout)
    assert calls[4:] == ["a", "b", "c"]  # nothing is left once all rows were there
    assert rounded(rows) == rounded(undisturbed)


def test_one_larger_than_the_module_is_an_error(resnet):
    _, cell, data, layout = resnet
    big = nn.Sequential(nn.Flatten(), nn.Linear(768, 2000), nn.Linear(2000, 2))
    alternative("big", label="big", budget=True)(lambda context: big)
    with pytest.raises(ValueError, match=r"^alternatives.kinds: big has 1542002 parameters for 3"):
        alternatives(asking(["big"]), cell, data, layout)
