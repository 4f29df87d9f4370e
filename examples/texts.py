"""Texts of several languages, in folders, as sequences of bytes; see docs/sequences.md."""

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

LENGTH = 256  # bytes of a sequence
Texts = Mapping[str, Tensor]  # {language: its bytes}


def read(path: Path, split: str) -> Texts:
    """The files SPLIT/LANGUAGE/NAME of a folder or a tar, those of a language one after another."""
    if path.is_dir():
        files = {str(p.relative_to(path)): p.read_bytes() for p in path.glob(f"{split}/*/*")}
    else:
        with tarfile.open(path) as tar:
            members = [m for m in tar if m.isfile()]
            files = {m.name.removeprefix("./"): tar.extractfile(m).read() for m in members}
    texts: dict[str, bytes] = {}
    for name in sorted(files):
        first, _, rest = name.partition("/")
        if first == split:
            language = rest.split("/")[0]
            texts[language] = texts.get(language, b"") + files[name] + b"\n"
    short = [name for name, text in texts.items() if len(text) < LENGTH]
    if short or len(texts) < 2:
        raise click.ClickException(
            f"{path}: {split}/ has {short or sorted(texts)}; accepted: two languages or more, "
            f"{split}/LANGUAGE/FILE, of {LENGTH} bytes or more each"
        )
    return {name: torch.frombuffer(bytearray(t), dtype=torch.uint8) for name, t in texts.items()}


def draw(texts: Texts, count: int, random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random sequences (count, 256) of random languages, and the languages' positions (count,)."""
    every, labels = list(texts.values()), random.integers(len(texts), size=count)
    starts = [random.integers(len(every[c]) - LENGTH + 1) for c in labels]
    windows = [every[c][s : s + LENGTH] for c, s in zip(labels, starts, strict=True)]
    return torch.stack(windows).long(), torch.from_numpy(labels)


def batches(texts: Texts, each: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    for label, text in enumerate(texts.values()):
        x, _ = draw({"": text}, each, np.random.default_rng(seed))
        yield x, torch.full((each,), label)
