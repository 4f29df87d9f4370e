"""Two modules as one: the same logits, scaled and shifted, and mistakes told by name."""

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

import nemo
from nemo.cli.main import cli
from nemo.data import load, prepare
from nemo.models import build_model
from nemo.models.shapes import CnnShape
from nemo.module.union import Calibration, apply, calibrate, check_mergeable
from nemo.sections import DataSource
from tests.cut.helpers import random_masks, randomise

HOW = [
    {"mean": [0.3, 0.4, 0.5], "std": [0.2, 0.3, 0.4], "size": [16, 16]},
    {"mean": [0.5, 0.5, 0.1], "std": [0.5, 0.1, 0.2], "size": [16, 16]},
]


def cut(classes, seed, how=None, size=16):
    torch.manual_seed(seed)
    model = randomise(build_model("resnet18", 10, size, CnnShape(width=0.0625)), seed)
    module = nemo.decompose(model, random_masks(model, 0.5, seed), classes)
    module.info = {"class_names": [str(c) for c in classes], "cell": f"digits/{seed}"}
    if how is not None:
        module.info["preprocessing"] = how
    return module


@pytest.fixture(scope="module")
def pair():
    return cut([0, 1, 2], 0, HOW[0]), cut([7, 5], 1, HOW[1])


@pytest.fixture(scope="module")
def batch():
    pixels = torch.rand(40, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return pixels, torch.arange(40) % 5


def normalised(pixels, how):
    mean, std = (torch.tensor(how[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


def test_the_logits_are_those_of_both_modules_scaled_and_shifted(pair, batch, tmp_path):
    pixels, labels = batch
    images = normalised(pixels, HOW[0])
    merged = nemo.merge(*pair, [(images, labels)])
    parts = [Calibration(part["scale"], part["bias"]) for part in merged.info["merged"]]
    assert parts != [Calibration(), Calibration()]
    with torch.no_grad():
        raw = [m(normalised(pixels, how)) for m, how in zip(pair, HOW, strict=True)]
        expected = torch.cat([r * p.scale + p.bias for r, p in zip(raw, parts, strict=True)], 1)
        torch.testing.assert_close(merged(images), expected, rtol=1e-4, atol=1e-4)
        nemo.save(merged, tmp_path / "m")
        loaded = nemo.load(tmp_path / "m")
        assert torch.equal(loaded(images), merged(images))
    assert loaded.info["class_names"] == ["0", "1", "2", "7", "5"]
    assert loaded.info["preprocessing"] == HOW[0]
    assert loaded.report["parameters"] == sum(p.numel() for p in loaded.parameters())
    assert "finetuned" not in loaded.info


def test_grey_images_are_normalised_as_each_module_was_trained():
    how = [{"mean": [m], "std": [s], "size": [8, 8]} for m, s in ((0.2, 0.5), (0.7, 0.25))]
    parts = []
    for seed, classes in enumerate(([0, 1], [2, 3])):
        layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten()
        model = randomise(nn.Sequential(*layers, nn.Linear(6 * 4 * 4, 4)), seed)
        part = nemo.decompose(
            model, {"2": torch.arange(6) < 4}, classes, example=torch.zeros(1, 1, 8, 8)
        )
        part.info = {"class_names": [str(c) for c in classes], "preprocessing": how[seed]}
        parts.append(part)
    pixels = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    first, second = ((pixels - h["mean"][0]) / h["std"][0] for h in how)
    merged = nemo.merge(*parts, [(first, torch.arange(12) % 4)])
    scales = [(part["scale"], part["bias"]) for part in merged.info["merged"]]
    with torch.no_grad():
        expected = [
            part(x) * scale + bias
            for part, x, (scale, bias) in zip(parts, (first, second), scales, strict=True)
        ]
        torch.testing.assert_close(merged(first), torch.cat(expected, 1), rtol=1e-4, atol=1e-4)


def test_it_is_a_module_that_trains_and_merges_again_and_shares_no_weights(pair, batch):
    images = normalised(batch[0], HOW[0])
    merged = nemo.merge(*pair, [(images, batch[1])]).train()
    before = [p.clone() for m in pair for p in m.parameters()]
    optimizer = torch.optim.SGD(merged.parameters(), 0.1)
    F.cross_entropy(merged(images), batch[1]).backward()
    optimizer.step()
    assert all(
        torch.equal(p, q)
        for p, q in zip((p for m in pair for p in m.parameters()), before, strict=True)
    )
    third = cut([9, 8], 2, HOW[0])
    again = nemo.merge(merged.eval(), third, [(images, torch.arange(40) % 7)])
    assert again(images).shape == (40, 7)
    assert len({name for name, _ in again.named_children()}) == sum(
        len(list(m.children())) for m in (merged, third)
    )


def test_calibration_is_the_minimum_of_what_it_states():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (300,), generator=random)
    logits = torch.randn(300, 5, generator=random) + 2 * F.one_hot(labels, 5)
    logits = torch.cat([logits[:, :2] * 7 + 3, logits[:, 2:]], 1)  # as by another temperature
    parts = calibrate(logits, labels, 2)

    def objective(first, second):
        prior = sum((p.scale - 1) ** 2 + p.bias**2 for p in (first, second)) / 2
        loss = F.cross_entropy(apply(logits.double(), (first, second), 2), labels)
        return float(loss + prior / 300)

    least = objective(*parts)
    for side in (0, 1):
        for step in (-0.01, 0.01):
            for moved in (
                parts[side]._replace(scale=parts[side].scale + step),
                parts[side]._replace(bias=parts[side].bias + step),
            ):
                other = [*parts]
                other[side] = moved
                assert objective(*other) > least
    assert parts[1].scale / parts[0].scale == pytest.approx(7, rel=0.25)
    accuracies = [(z.argmax(1) == labels).float().mean() for z in (logits, apply(logits, parts, 2))]
    assert accuracies[1] > accuracies[0] + 0.2


def test_modules_that_do_not_fit_are_named(pair, batch):
    a, b = pair
    with pytest.raises(ValueError, match="both modules have the classes 1; accepted: disjoint"):
        check_mergeable(a, cut([1, 4], 1, HOW[0]))
    with pytest.raises(ValueError, match="only one module says how images are normalised"):
        check_mergeable(a, cut([4, 5], 1))
    whole = cut([4, 5], 1, HOW[0])
    whole.info, whole.classes = {}, None
    with pytest.raises(ValueError, match="does not name its classes"):
        check_mergeable(a, whole)
    for labels in (batch[1] + 1, batch[1] % 3, batch[1] - 1):
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.4, some below 3"):
            nemo.merge(a, b, [(batch[0], labels)])


def test_a_loader_of_something_else_is_one_line(pair, batch):
    images, labels = batch
    for loader, line in (
        ([images], "a batch is a Tensor; accepted: a pair"),
        ([(images, labels.float())], r"labels have shape \(40,\) and type torch.float32; accepted"),
        ([(images, labels.tolist())], "labels have shape .* and type list; accepted: "),
        ([(images, labels[:20])], r"the logits of 20 labels have shape \(40, 5\); accepted: "),
        (
            [(images * torch.nan, labels)],
            "the modules' logits are not finite; accepted: finite inputs",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{line}"):
            nemo.merge(*pair, loader)
    expected = nemo.merge(*pair, [batch]).info["merged"]
    assert nemo.merge(*pair, [(images, labels.int())]).info["merged"] == expected


def test_a_layer_that_is_not_what_was_cut_is_named(pair, batch):
    changed = cut([7, 5], 1, HOW[1])
    name = next(name for name, layer in changed.named_children() if isinstance(layer, nn.Conv2d))
    handle = changed.get_submodule(name).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=f"cannot merge: layer '{name}' has a forward hook"):
        nemo.merge(pair[0], changed, [batch])
    handle.remove()
    setattr(changed, name, nn.Tanh())
    with pytest.raises(ValueError, match=f"cannot merge: layer '{name}' is no longer the Conv2d"):
        nemo.merge(pair[0], changed, [batch])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("merge")
    prepare("digits", DataSource(source="digits", size=16), root / "digits")
    data = load(root / "digits")
    how = {"mean": list(data.mean), "std": list(data.std), "size": list(data.size)}
    for name, classes in {"low": [0, 1, 2, 3, 4], "high": [9, 8, 7, 6, 5], "odd": [1, 3]}.items():
        nemo.save(cut(classes, len(name), how), root / name)
    cats = cut([0, 1], 0, how)
    cats.info["class_names"] = ["cat", "dog"]
    nemo.save(cats, root / "cats")
    del cats.info["preprocessing"]
    nemo.save(cats, root / "unprepared")
    unprepared = cut([5, 6], 0)
    nemo.save(unprepared, root / "unprepared2")
    return root


def test_the_command_writes_a_module_with_its_accuracy(folders, tmp_path):
    arguments = ["merge", str(folders / "low"), str(folders / "high"), "--data", "digits"]
    result = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "all")])
    assert result.exit_code == 0, result.output
    merged = nemo.load(tmp_path / "all")
    assert merged.info["class_names"] == list("0123498765")
    test = load(folders / "digits").restrict([0, 1, 2, 3, 4, 9, 8, 7, 6, 5])
    batches = nemo.data.Batches(test.splits["test"], test.mean, test.std, 512)
    ((images, labels),) = list(batches)
    measured = (merged(images).argmax(1) == labels).double().mean().item()
    assert f"test accuracy of {tmp_path / 'all'}: {measured:.1%}" in result.output
