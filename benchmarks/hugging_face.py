"""Small shapes of Hugging Face's transformers at random weights, which no download is needed for.

Weights are larger than the library starts with: with its own, blocks say next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH = 50, 10
SCALE = 0.2  # standard deviation of the weights
Draw = Callable[[int, int], dict[str, Tensor]]  # a batch, from its size and a seed


def vit(classes: int) -> nn.Module:
    import transformers as hf

    config = hf.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        image_size=32, patch_size=8, num_labels=classes, initializer_range=SCALE,
    )  # fmt: skip
    model: nn.Module = hf.ViTForImageClassification(config)
    return model


def bert(classes: int, attention: str = "sdpa") -> nn.Module:
    import transformers as hf

    config = hf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=16, num_labels=classes,
        attn_implementation=attention, initializer_range=SCALE,
    )  # fmt: skip
    model: nn.Module = hf.BertForSequenceClassification(config)
    return model


def gpt2(classes: int, kind: str = "GPT2ForSequenceClassification") -> nn.Module:
    import transformers as hf

    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=16, num_labels=classes,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, initializer_range=SCALE,
    )  # fmt: skip
    model: nn.Module = getattr(hf, kind)(config)
    return model


def detr(classes: int) -> nn.Module:
    """Of `classes` logits a query, the last is for no object."""
    import transformers as hf

    backbone = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage4"],
    )  # fmt: skip
    config = hf.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False,
        d_model=32, num_queries=6, num_labels=classes - 1, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, init_std=SCALE,
    )  # fmt: skip
    model: nn.Module = hf.DetrForObjectDetection(config)
    return model


def images(size: int) -> Draw:
    def draw(batch: int, seed: int) -> dict[str, Tensor]:
        random = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=random)}

    return draw


def texts(batch: int, seed: int) -> dict[str, Tensor]:
    """Of 2 to 10 tokens, padded."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, LENGTH), generator=random)
    lengths = torch.randint(2, LENGTH + 1, (batch, 1), generator=random)
    mask = (torch.arange(LENGTH) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


MODELS: dict[str, tuple[Callable[[int], nn.Module], Draw]] = {
    "vit": (vit, images(32)),
    "bert": (bert, texts),
    "gpt2": (gpt2, texts),
    "detr": (detr, images(64)),
}
