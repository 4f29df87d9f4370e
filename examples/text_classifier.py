"""Which language a text is in: a small Transformer, modular, and its module of two languages; see
docs/sequences.md."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import click
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nemo
from examples.gpt import parameters, train
from examples.gpt_net import GPT
from examples.pages import write_tables
from examples.texts import LENGTH, Texts, batches, read


class Classifier(GPT):
    """(B, 256) bytes -> logits (B, languages)."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.embedded(x))
        return self.head(self.norm(x).mean(1))


def language(logits: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


@torch.inference_mode()
def accuracy(model: nn.Module, texts: Texts, classes: Sequence[int], among: bool) -> float:
    """Of the test sequences of `classes`; `among`: of all logits, only these are looked at."""
    right = count = 0
    for answer, c in enumerate(classes):
        text = list(texts.values())[c]
        x = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH).long()
        out = model.eval()(x)
        logits = out[0] if isinstance(out, tuple) else out
        logits = logits[:, list(classes)] if among else logits
        right += int((logits.argmax(1) == answer).sum())
        count += len(x)
    return right / count


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--seeds", default=3, type=click.IntRange(1), help="How many, from 0 on.")
@click.option("--steps", default=200, type=click.IntRange(min=20))
@click.option("--alpha", default=0.5, type=click.FloatRange(0, 1000))
@click.option(
    "--out", default="reports", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
def main(data: Path, seeds: int, steps: int, alpha: float, out: Path) -> None:
    """DATA is a folder or .tar of SPLIT/LANGUAGE/FILE."""
    known, test = read(data)
    everyone, found = range(len(known)), []
    for seed in range(seeds):
        torch.manual_seed(seed)
        standard = Classifier(64, 4, outputs=len(known))
        modular = nemo.modularize(
            Classifier(64, 4, outputs=len(known)), torch.zeros(2, LENGTH).long()
        )
        train(standard, known, steps, 2e-3, seed, task=language)
        train(modular, known, steps, 2e-3, seed, alpha, language)
        masks = nemo.class_masks(modular, list(batches(known, 200, seed)))
        pair = [seed % len(known), (seed + 1) % len(known)]
        chosen = masks.select(pair)
        module = nemo.decompose(modular, chosen)
        found.append({
            "seed": seed, "standard": accuracy(standard, test, everyone, False),
            "modular": accuracy(modular, test, everyone, False),
            "nrr": nemo.retention_rate(masks), "coupling": nemo.coupling(masks),
            "module": "+".join(list(known)[c] for c in pair),
            "share of parameters": parameters(module) / parameters(standard),
            "standard, these two": accuracy(standard, test, pair, True),
            "modular, these two": accuracy(modular, test, pair, True),
            "module, as cut": accuracy(module, test, pair, False),
        })  # fmt: skip
    table = pd.DataFrame(found)
    table.to_csv(out / "text_classifier.csv", index=False, lineterminator="\n")
    text = (
        f"Which of {len(known)} programming languages {LENGTH} bytes of a file are in: test "
        f"accuracies of Transformers of 4 blocks, 64 wide, after {steps} steps of 16 sequences; "
        f"alpha {alpha:g}. Nothing is trained after the cut. {platform.machine()}, "
        f"{os.cpu_count()} CPU cores, torch {torch.__version__.split('+')[0]}; "
        f"`python -m examples.text_classifier --data DATA`.\n\n"
        f"{table.round(3).to_markdown(index=False)}\n"
    )
    write_tables(out / "text_classifier.md", text)
    click.echo(text)


if __name__ == "__main__":
    main()
