"""The result is an ordinary module: it trains, copies, compiles and exports."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nemo
from nemo.cut import DecomposedModule, decompose
from tests.cut.helpers import random_masks
from tests.cut.test_models import small

NAMES = ["vgg16", "resnet18", "deit_small"]
IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def make(name: str) -> DecomposedModule:
    model = small(name)
    return decompose(model, random_masks(model, 0.5), [1, 2, 5])


@pytest.mark.parametrize("name", NAMES)
def test_fine_tuning_lowers_the_loss(name: str) -> None:
    torch.manual_seed(0)
    module = make(name).train()
    targets = torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(module(IMAGES), targets)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in module.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < sum(losses[:3])


def test_batch_norm_statistics_follow_the_images_in_training_only() -> None:
    module = make("resnet18")
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.running_mean.clone() for m in norms]
    module(IMAGES)
    assert all(torch.equal(old, m.running_mean) for old, m in zip(before, norms, strict=True))
    module.train()(IMAGES)
    assert not any(torch.equal(old, m.running_mean) for old, m in zip(before, norms, strict=True))
    assert all(int(m.num_batches_tracked) == 1 for m in norms)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.1])
def test_batch_norm_moves_as_in_the_parent(momentum: float | None, tmp_path: Path) -> None:
    norm = nn.BatchNorm2d(4, momentum=momentum)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(4, 2))
    for images in torch.randn(5, 4, 3, 32, 32):
        model(images)  # what its average begins with
    module = decompose(model.eval(), {"0": torch.tensor([True, True, False, True])}, example=IMAGES)
    nemo.save(module, tmp_path)
    for network in (module, nemo.load(tmp_path)):
        parent = copy.deepcopy(model).train()
        (cut,) = [m for m in network.train().modules() if isinstance(m, nn.BatchNorm2d)]
        for images in IMAGES.chunk(2):
            parent(images), network(images)
        torch.testing.assert_close(cut.running_mean, parent[1].running_mean[[0, 1, 3]])
        torch.testing.assert_close(cut.running_var, parent[1].running_var[[0, 1, 3]])


def test_dropout_of_the_parent_is_kept_for_training() -> None:
    model = small("vgg16")
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    module = decompose(model, random_masks(model, 0.5))
    assert [m.p for m in module.modules() if isinstance(m, nn.Dropout)] == rates
    assert torch.equal(module(IMAGES), module(IMAGES))
    module.train()
    assert not torch.equal(module(IMAGES), module(IMAGES))


class Shifted(nn.Module):
    """Maps are put together by assignments, one of them over the batch, one of another type."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(n, 8, 3, padding=1) for n in (3, 8))
        self.offset = nn.Parameter(torch.randn(8, 1, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        shifted, offset = torch.zeros_like(x), torch.empty_like(x)
        shifted[:, :3, :, 1:] = x[:, :3, :, :-1]
        shifted[:, 3:7] = x[:, 3:7]
        shifted[:, 7] = x[:, 7] > 0.1
        return self.head((shifted + offset.copy_(self.offset)).tanh().mean((2, 3)))


def test_what_is_assigned_has_the_gradients_of_the_parent(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Shifted()
    module = decompose(model, {"second": torch.ones(8, dtype=torch.bool)})
    found = []
    for network in (model.double(), module.double().train()):
        images = IMAGES.double().requires_grad_()
        network(images).square().sum().backward()
        found.append((images.grad, *sorted(p.grad.sum().item() for p in network.parameters())))
    torch.testing.assert_close(found[1], found[0])
    nemo.save(module.eval(), tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(nemo.load(tmp_path / "m")(images), module(images))


@pytest.mark.parametrize("name", NAMES)
def test_copies_are_independent_and_load_the_same_state(name: str) -> None:
    module = make(name)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    assert not torch.equal(twin(IMAGES), module(IMAGES))
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin(IMAGES), module(IMAGES))
    assert twin.report == module.report


@pytest.mark.parametrize("name", NAMES)
def test_export_with_a_dynamic_batch(name: str) -> None:
    module = make(name)
    dynamic = ({0: torch.export.Dim.AUTO},)
    exported = torch.export.export(module, (IMAGES[:2],), dynamic_shapes=dynamic, strict=False)
    for batch in (1, 6):
        torch.testing.assert_close(exported.module()(IMAGES[:batch]), module(IMAGES[:batch]))


@pytest.mark.parametrize("name", NAMES)
def test_compile_without_graph_breaks(name: str) -> None:
    module = make(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(IMAGES), module(IMAGES))


@pytest.mark.parametrize("name", NAMES)
def test_a_module_can_be_decomposed_again(name: str) -> None:
    module = make(name)
    again = decompose(module, random_masks(module, 0.7))
    assert again.report["parameters"] < module.report["parameters"]
    assert again.certificate["error"] < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_other_types_run(name: str) -> None:
    module = make(name)
    double = copy.deepcopy(module).double()(IMAGES.double())
    torch.testing.assert_close(double.float(), module(IMAGES), rtol=1e-3, atol=1e-4)
    assert copy.deepcopy(module).bfloat16()(IMAGES.bfloat16()).dtype == torch.bfloat16
    assert module.to("meta")(IMAGES.to("meta")).shape == (6, 3)


def test_a_half_precision_parent_gives_a_half_precision_module() -> None:
    model = small("resnet18").bfloat16()
    module = decompose(model, {})
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
