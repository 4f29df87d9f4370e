"""Class masks and their metrics with sets and loops. Rows are lists of 0 and 1."""

from __future__ import annotations

import itertools


def frequency(bits: list[list[int]], labels: list[int]) -> list[list[float]]:
    rows = []
    for c in range(max(labels) + 1):
        own = [row for row, label in zip(bits, labels, strict=True) if label == c]
        rows.append([sum(column) / len(own) for column in zip(*own, strict=True)])
    return rows


def threshold(row: list[float], limit: float) -> list[bool]:
    """Lower the limit by 0.05 until something survives; then the most frequent 5 %."""
    current = limit
    while True:
        mask = [value >= current for value in row]
        if any(mask):
            return mask
        if current <= 0.05:
            break
        current = max(round(current - 0.05, 10), 0.05)
    kept = max(1, round(0.05 * len(row)))
    ranked = sorted(range(len(row)), key=lambda u: (-row[u], u))[:kept]
    return [u in ranked for u in range(len(row))]


def jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b) if a | b else 0.0


def _set(row: list[int]) -> set[int]:
    return {u for u, on in enumerate(row) if on}


def coupling(class_masks: list[list[int]]) -> float:
    pairs = list(itertools.combinations([_set(row) for row in class_masks], 2))
    return sum(jaccard(a, b) for a, b in pairs) / len(pairs)


def cohesion(bits: list[list[int]], labels: list[int], class_masks: list[list[int]]) -> float:
    means = []
    for c, class_mask in enumerate(class_masks):
        own = [
            _set(row) & _set(class_mask)
            for row, label in zip(bits, labels, strict=True)
            if label == c
        ]
        pairs = list(itertools.combinations(own, 2))
        if pairs:
            means.append(sum(jaccard(a, b) for a, b in pairs) / len(pairs))
    return sum(means) / len(means)


def retention_rate(class_masks: list[list[int]]) -> float:
    return sum(sum(row) / len(row) for row in class_masks) / len(class_masks)
