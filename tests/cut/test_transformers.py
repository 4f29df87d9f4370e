"""Architectures of Hugging Face's transformers, at random weights: the modules are right."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import nemo
from benchmarks import hugging_face
from tests.cut.helpers import randomise
from tests.cut.test_any_input import by_hand, run

pytest.importorskip("transformers")
CLASSES = 5
MODELS: dict[str, tuple[Callable[[int], nn.Module], hugging_face.Draw]] = {
    **hugging_face.MODELS,
    "bert, eager": (partial(hugging_face.bert, attention="eager"), hugging_face.texts),
    "gpt2, language model": (
        partial(hugging_face.gpt2, kind="GPT2LMHeadModel"),
        hugging_face.texts,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_module_computes_what_its_masked_parent_does(name: str, tmp_path: Path) -> None:
    make, inputs_of = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make(CLASSES))
    modular = nemo.modularize(model, inputs_of(3, 0), output="logits")
    random = torch.Generator().manual_seed(2)
    widths = {site.layer: site.neurons for site in modular.sites if site.norm is None}
    masks = {n: torch.rand(w, generator=random) < 0.6 for n, w in widths.items()}
    nemo.save(nemo.decompose(modular, masks, [3, 0]), tmp_path)
    module = nemo.load(tmp_path)
    assert module.report["parameters"] < 0.9 * module.report["parent_parameters"]
    for batch in (1, 5):
        expected = by_hand(model, masks, inputs_of(batch, 3)).logits[..., [3, 0]]
        actual = run(module, inputs_of(batch, 3))
        assert actual.shape == expected.shape
        whole = by_hand(model, {}, inputs_of(batch, 3)).logits[..., [3, 0]]
        assert (whole - expected).abs().max() > 0.05 * expected.abs().max()  # masks matter
        assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
