"""Modules that only predict: BatchNorms folded, values overwritten, the same logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo.cut import DecomposedModule, ExactnessError, decompose
from nemo.module import folding
from nemo.module.files import load, save
from tests.cut.helpers import assert_same, random_masks, randomise
from tests.cut.test_models import SHAPES, small

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def cut(name: str) -> DecomposedModule:
    model = small(name)
    return decompose(model, random_masks(model, 0.6), [3, 0])


@pytest.mark.parametrize("name", SHAPES)
def test_folded_module_computes_the_same_and_can_be_saved(name: str, tmp_path: Path) -> None:
    module = cut(name)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    fast = module.optimize_for_inference()
    assert not any(kind.startswith(("BatchNorm", "Dropout")) for kind, _ in fast.kinds.values())
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert fast.classes == [3, 0]
    assert fast.certificate["folding_error"] < 1e-11
    with torch.inference_mode():
        expected, actual = module(IMAGES), fast(IMAGES)
    assert (actual - expected).abs().max() < 1e-4 * expected.std()
    save(fast, tmp_path)
    with torch.inference_mode():
        assert torch.equal(load(tmp_path)(IMAGES), actual)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


def test_a_norm_stays_if_its_input_is_read_elsewhere() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.head = nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.head((self.norm(y) * y).mean((2, 3)))

    model = randomise(Twice())
    module = decompose(model, {}, example=IMAGES)
    assert_same(model, module, {})
    assert "BatchNorm2d" in {kind for kind, _ in module.optimize_for_inference().kinds.values()}


@pytest.mark.parametrize("groups", [1, 2])
def test_a_norm_folds_into_a_transposed_convolution(groups: int) -> None:
    up = nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1, groups=groups)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), up, nn.BatchNorm2d(6), nn.ReLU())
    model = randomise(model.append(nn.Flatten()).append(nn.Linear(6 * 60 * 60, 3))).double()
    fast = decompose(model, {}, example=IMAGES.double()).optimize_for_inference()
    assert "BatchNorm2d" not in {kind for kind, _ in fast.kinds.values()}
    with torch.no_grad():
        torch.testing.assert_close(fast(IMAGES.double()), model(IMAGES.double()))


def test_a_wrong_fold_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    module = cut("vgg16")
    monkeypatch.setattr(folding, "fold", lambda conv, norm: conv)
    with pytest.raises(ExactnessError, match="folding changed the logits"):
        module.optimize_for_inference()


class Aliases(nn.Module):
    """Values that are read again, by themselves or through a view, where an op might overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.token = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(x) + x)
        view = y.flatten(2).transpose(1, 2)
        z = F.relu(y)
        z = F.relu(self.token) + self.conv2(z) + z
        return self.head(torch.cat([z.mean((2, 3)), view.amax(1)], 1))


def test_overwriting_leaves_alone_what_is_read_again() -> None:
    model = randomise(Aliases())
    assert_same(model, decompose(model, {}, example=IMAGES), {})


def test_a_layer_replaced_by_one_that_returns_its_argument_spares_the_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.Flatten())
    module = decompose(randomise(model), {}, example=IMAGES)
    first = next(name for name, _ in module.named_children())
    setattr(module, first, nn.Identity())
    images = torch.randn(IMAGES.shape)
    before = images.clone()
    with torch.inference_mode():
        module(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("kind", ["forward", "pre", "global"])
def test_values_kept_by_a_hook_are_not_overwritten(kind: str) -> None:
    module = cut("resnet18")
    assert module._overwriting
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor | None = None) -> None:
        value = args[0] if output is None else output
        kept.append((value, value.clone()))

    if kind == "global":
        handle = nn.modules.module.register_module_forward_hook(keep)
    else:
        for layer in module.children():
            handle = (
                layer.register_forward_hook(keep)
                if kind == "forward"
                else layer.register_forward_pre_hook(keep)
            )
    with torch.inference_mode():
        module(IMAGES)
    handle.remove()
    assert len(kept) > 10
    assert all(torch.equal(value, copied) for value, copied in kept)


@pytest.mark.parametrize("name", ["resnet18", "vgg16"])
def test_memory_formats_give_the_same_logits(name: str) -> None:
    module = cut(name)
    with torch.no_grad():
        expected = module(IMAGES)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        actual = module(IMAGES.contiguous(memory_format=torch.channels_last))
    assert (actual - expected).abs().max() < 1e-4 * expected.std()
