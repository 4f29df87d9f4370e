"""Architectures of Hugging Face's transformers, at random weights: the modules are right."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nemo
from tests.cut.helpers import randomise
from tests.cut.test_any_input import by_hand, run

hf = pytest.importorskip("transformers")
VOCABULARY, LENGTH = 50, 10


def vit() -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        image_size=32, patch_size=8, num_labels=5,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


def bert(attention: str = "sdpa") -> nn.Module:
    config = hf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=16, num_labels=5,
        attn_implementation=attention,
    )  # fmt: skip
    return hf.BertForSequenceClassification(config)


def gpt2(kind: str = "GPT2ForSequenceClassification") -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=16, num_labels=5,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = getattr(hf, kind)(config)
    for name, parameter in model.named_parameters():
        if ".h." in name and parameter.ndim > 1:  # or the blocks say next to nothing
            parameter.data *= 10
    return model


def detr() -> nn.Module:
    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = hf.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False,
        d_model=32, num_queries=6, num_labels=5, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48,
    )  # fmt: skip
    return hf.DetrForObjectDetection(config)


def images(size: int) -> Callable[[int, int], dict[str, Tensor]]:
    def make(batch: int, seed: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=random)}

    return make


def texts(batch: int, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, LENGTH), generator=random)
    lengths = torch.randint(2, LENGTH + 1, (batch, 1), generator=random)
    mask = (torch.arange(LENGTH) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], dict[str, Any]]]] = {
    "vit": (vit, images(32)),
    "bert": (bert, texts),
    "bert, eager": (lambda: bert("eager"), texts),
    "gpt2": (gpt2, texts),
    "gpt2, language model": (lambda: gpt2("GPT2LMHeadModel"), texts),
    "detr": (detr, images(64)),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_module_computes_what_its_masked_parent_does(name: str, tmp_path: Path) -> None:
    make, inputs_of = MODELS[name]
    torch.manual_seed(0)
    model = randomise(make())
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
