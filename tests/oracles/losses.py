"""The losses, pair by pair, as the papers write them."""

from __future__ import annotations

import math


def cosine(a: list[float], b: list[float]) -> float:
    product = sum(x * y for x, y in zip(a, b, strict=True))
    norms = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return product / norms if norms else 0.0


def contrastive(layers: list[list[list[float]]], labels: list[int], tau: float, form: str) -> float:
    """layers: per layer the masks of every sample. The mean over layers and samples."""
    total = 0.0
    for masks in layers:
        for i, mask in enumerate(masks):
            positive, negative = 0.0, 0.0
            for j, other in enumerate(masks):
                weight = math.exp(cosine(mask, other) / tau)
                excluded = 1.0 if form == "released" else 0.0  # e^0
                if labels[i] == labels[j]:
                    positive += weight
                    negative += excluded
                else:
                    positive += excluded
                    negative += weight
            total -= math.log(positive / (positive + negative))
    return total / len(layers) / len(labels)


def mwt(layers: list[list[list[float]]], labels: list[int]) -> tuple[float, float]:
    """(cohesion loss, coupling loss), 0 where there is no pair of its kind."""
    cohesion, coupling = [], []
    for masks in layers:
        same, different = [], []
        for i in range(len(labels)):
            for j in range(i + 1, len(labels)):
                pairs = same if labels[i] == labels[j] else different
                pairs.append(cosine(masks[i], masks[j]))
        if same:
            cohesion.append(1 - sum(same) / len(same))
        if different:
            coupling.append(sum(different) / len(different))
    return (
        sum(cohesion) / len(layers) if cohesion else 0.0,
        sum(coupling) / len(layers) if coupling else 0.0,
    )
