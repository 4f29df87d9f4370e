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


def read(path: Path) -> tuple[Texts, Texts]:
    """The training and the test texts: the files train/LANGUAGE/NAME and test/LANGUAGE/NAME of a
    folder or a .tar, those of a language one after another."""
    if path.is_dir():
        found = [(p.relative_to(path), p.read_bytes()) for p in path.glob("*/*/*") if p.is_file()]
    else:
        try:
            with tarfile.open(path) as tar:
                opened = ((Path(m.name), tar.extractfile(m)) for m in tar)
                found = [(name, file.read()) for name, file in opened if file is not None]
        except tarfile.TarError:
            raise click.ClickException(
                f"{path} is no .tar, or a part of one; accepted: a folder, or a .tar of one"
            ) from None
    texts: dict[str, dict[str, bytes]] = {"train": {}, "test": {}}
    for name, content in sorted(found):
        if len(name.parts) == 3 and name.parts[0] in texts:
            split, language, _ = name.parts
            texts[split][language] = texts[split].get(language, b"") + content + b"\n"
    train, test = texts.values()
    short = [name for name, text in (*train.items(), *test.items()) if len(text) < LENGTH]
    if short or len(train) < 2 or list(train) != list(test):
        raise click.ClickException(
            f"{path}: train/ has {', '.join(train) or 'nothing'}, test/ "
            f"{', '.join(test) or 'nothing'}; accepted: the same two languages or more in both, as "
            f"SPLIT/LANGUAGE/FILE, of {LENGTH} bytes or more each"
        )
    return _tensors(train), _tensors(test)


def _tensors(texts: Mapping[str, bytes]) -> Texts:
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
