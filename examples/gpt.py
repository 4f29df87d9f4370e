"""A byte-level GPT with one mask per sequence, and its modules of one programming language; see
docs/sequences.md."""

import hashlib
import math
import os
import platform
import statistics
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nemo
from examples.gpt_net import GPT, HEADS
from examples.pages import write_tables
from examples.texts import LENGTH, Texts, batches, draw, read
from nemo.locks import locked

PROMPT, BATCH = 64, 16  # the bytes of a sequence that its masks are made from; sequences a step
Model = TypeVar("Model", bound=nn.Module)
Task = Callable[[Tensor, Tensor, Tensor], Tensor]  # of outputs, inputs and languages


LR, TUNING_LR, TAU = 3e-3, 1.5e-3, 0.2


@dataclass(frozen=True)
class Size:
    width: int
    depth: int
    steps: int
    alpha: float

    def __post_init__(self) -> None:
        if self.width % HEADS:
            raise click.BadParameter(
                f"--width: {self.width}; accepted: multiples of {HEADS}, its heads"
            )
        if not 0 <= self.alpha < math.inf:
            raise click.BadParameter(f"--alpha: {self.alpha}; accepted: a number, 0 or above")

    def folder(self, work: Path, *splits: Texts) -> Path:
        """Where what is trained is kept; another for other sizes or texts."""
        digest = hashlib.sha256()
        for name, text in (item for split in splits for item in split.items()):
            digest.update(f"{name} {len(text)}\n".encode() + text.numpy().tobytes())
        size = f"{self.width}x{self.depth}-{self.steps}-{self.alpha:g}"
        return work / f"{size}-{digest.hexdigest()[:8]}"


def next_byte(logits: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Bits per byte of the bytes after the first 64."""
    nats = F.cross_entropy(logits[:, PROMPT - 1 : -1].flatten(0, 1), x[:, PROMPT:].flatten())
    return nats / math.log(2)


def train(
    model: nn.Module, texts: Texts, steps: int, lr: float, seed: int, alpha: float = 0.0,
    task: Task = next_byte,
) -> None:  # fmt: skip
    """Adam; the learning rate rises and falls, and alpha rises to its value over 3/10 of it."""
    optimizer = adam(model.train())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.2)
    random = np.random.default_rng(seed)
    for number in range(steps):
        x, labels = draw(texts, BATCH, random)
        step(model, optimizer, x, labels, alpha * min(1.0, number / (0.3 * steps)), task)
        schedule.step()
    model.eval()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, alpha: float,
    task: Task = next_byte,
) -> None:  # fmt: skip
    if isinstance(model, nemo.Modular):
        logits, masks = model(x)
        loss = task(logits, x, labels) + alpha * nemo.contrastive_loss(masks, labels, TAU)
    else:
        loss = task(model(x), x, labels)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.inference_mode()
def bits_per_byte(model: nn.Module, text: Tensor) -> float:
    """Of the last 192 bytes of each 256."""
    rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH).long()
    total = 0.0
    for x in rows.split(64):
        out = model(x)
        total += len(x) * next_byte(out[0] if isinstance(out, tuple) else out, x, x).item()
    return total / len(rows)


def modular(model: nn.Module) -> nemo.Modular:
    """Its masks look at the first bytes of a sequence only, since later ones are to be guessed."""
    return nemo.modularize(model, torch.zeros(2, LENGTH, dtype=torch.long), pool=slice(PROMPT))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def as_large(count: int, depth: int) -> GPT:
    """The GPT of this depth, up to 512 wide, whose number of parameters is nearest."""
    widths = range(8, 513, 4)
    above = bisect_left(widths, count, key=lambda width: parameters(GPT(width, depth)))
    near = [GPT(width, depth) for width in widths[max(above - 1, 0) : above + 1]]
    return min(near, key=lambda model: abs(parameters(model) - count))


def kept(model: Model, file: Path, fit: Callable[[], None]) -> Model:
    """The model trained, by `fit` or in an earlier run."""
    if not file.is_file():
        fit()
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), file.with_suffix(".partial"))
        file.with_suffix(".partial").replace(file)
    try:
        model.load_state_dict(load_file(file))
    except SafetensorError as error:
        raise click.ClickException(f"{file}: damaged ({error}); delete it") from None
    return model.eval()


def rows(train_: Texts, test: Texts, seed: int, size: Size, work: Path) -> Iterator[dict[str, Any]]:
    """A row for each language. What is trained is kept in the folder `work`."""

    def trained(name: str, model: Model, on: Texts, steps: int, lr: float) -> Model:
        fit = partial(train, model, on, steps, lr, seed, size.alpha)
        return kept(model, work / f"{name}.safetensors", fit)

    torch.manual_seed(seed)
    standard = trained("standard", GPT(size.width, size.depth), train_, size.steps, LR)
    torch.manual_seed(seed)
    whole = trained("modular", modular(GPT(size.width, size.depth)), train_, size.steps, LR)
    masks = nemo.class_masks(whole, batches(train_, 200, seed))
    tenth, share = size.steps // 10, size.steps // len(train_)
    for label, (language, text) in enumerate(test.items()):
        own = {language: train_[language]}
        chosen = masks.select([label])
        module = nemo.decompose(whole, dict(chosen))  # a dict without `classes`: all 256 bytes
        count, as_cut = parameters(module), bits_per_byte(module, text)
        trained(f"{language}-module", module, own, tenth, TUNING_LR)
        nemo.save(module, work / language)
        tuned = trained(f"{language}-standard", deepcopy(standard), own, tenth, TUNING_LR)
        torch.manual_seed(seed)
        dense = trained(f"{language}-dense", as_large(count, size.depth), own, share + tenth, LR)
        row = {
            "seed": seed, "language": language, "nrr": nemo.retention_rate(chosen),
            "coupling": nemo.coupling(masks), "error": module.certificate["error"],
            "parameters": count, "share": count / parameters(standard),
            "standard": bits_per_byte(standard, text), "modular": bits_per_byte(whole, text),
            "as cut": as_cut, "fine-tuned": bits_per_byte(module, text),
            "standard, fine-tuned": bits_per_byte(tuned, text), "dense": bits_per_byte(dense, text),
            "dense, long": float("nan"),
        }  # fmt: skip
        if label == seed % len(test):  # one of them for each seed: it takes the longest
            torch.manual_seed(seed)
            long = as_large(count, size.depth)
            trained(f"{language}-dense-long", long, own, size.steps, LR)
            row["dense, long"] = bits_per_byte(long, text)
        yield row


def step_times(texts: Texts, size: Size, times: int = 15) -> tuple[float, float]:
    """Median seconds of a training step of the standard and of the modular GPT, taking turns."""
    models = GPT(size.width, size.depth), modular(GPT(size.width, size.depth))
    runs = [(model, adam(model)) for model in models]
    took: list[list[float]] = [[] for _ in models]
    random = np.random.default_rng(0)
    for _ in range(times + 2):
        x, labels = draw(texts, BATCH, random)
        for (model, optimizer), seconds in zip(runs, took, strict=True):
            begin = time.perf_counter()
            step(model, optimizer, x, labels, size.alpha)
            seconds.append(time.perf_counter() - begin)
    plain, masked = (statistics.median(seconds[2:]) for seconds in took)
    return plain, masked


@click.group()
def main() -> None:
    """A GPT that knows several programming languages, and modules that know one."""


def options(command: Callable[..., None]) -> Callable[..., None]:
    for add in (
        click.option("--data", required=True, type=click.Path(exists=True, path_type=Path)),
        click.option(
            "--work", default="gpt-work", type=click.Path(file_okay=False, path_type=Path)
        ),
        click.option("--width", default=192, type=click.IntRange(8, 512)),
        click.option("--depth", default=6, type=click.IntRange(min=2)),
        click.option("--steps", default=500, type=click.IntRange(min=20)),
        click.option("--alpha", default=0.3),
    ):
        command = add(command)
    return command


@main.command("train")
@options
@click.option("--seed", default=0, type=click.IntRange(0, 10**6))
def train_one(data: Path, seed: int, work: Path, **size: Any) -> None:
    """Train, cut and fine-tune with one seed; DATA is a folder or .tar of SPLIT/LANGUAGE/FILE."""
    (known, test), chosen = read(data), Size(**size)
    folder = chosen.folder(work, known, test)
    with locked(folder / f".seed-{seed}.lock"):
        found = pd.DataFrame(rows(known, test, seed, chosen, folder / f"seed-{seed}"))
        file = folder / f"seed-{seed}.csv"
        found.to_csv(file.with_suffix(".partial"), index=False, lineterminator="\n")
        file.with_suffix(".partial").replace(file)
    click.echo(found.T.to_string(header=False, float_format="{:.3f}".format))


@main.command()
@options
@click.option(
    "--out", default="reports", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
def report(data: Path, work: Path, out: Path, **size: Any) -> None:
    """Measure the training step, and write the tables of the seeds in WORK."""
    (known, test), chosen = read(data), Size(**size)
    folder = chosen.folder(work, known, test)
    files = sorted(folder.glob("seed-*.csv"))
    if not files:
        raise click.ClickException(
            f"{folder} holds no seed-*.csv; accepted: data and options that `train` was given"
        )
    plain, masked = step_times(known, chosen)
    found = pd.concat(map(pd.read_csv, files))
    found.to_csv(out / "gpt.csv", index=False, lineterminator="\n")
    means = found.drop(columns=["seed", "error", "coupling"]).groupby("language").mean()
    shown = means.map(lambda value: "" if math.isnan(value) else f"{value:.3f}")
    shown["parameters"] = means["parameters"].map("{:,.0f}".format)
    right = ("left", *["right"] * len(shown.columns))
    table = shown.to_markdown(disable_numparse=True, colalign=right)
    seeds = found["seed"].unique()
    text = "\n".join([*caption(chosen, seeds), "", table, "", *goals(found, masked / plain)])
    write_tables(out / "gpt.md", text)
    click.echo(text)


def caption(size: Size, seeds: Iterable[int]) -> list[str]:
    return [
        f"Bits per byte of test files, of the bytes after the first {PROMPT} of {LENGTH}. "
        f"GPTs of {size.depth} blocks on bytes, {size.width} wide, {size.steps} steps of {BATCH} "
        f"sequences, alpha {size.alpha:g}. Means of seeds {', '.join(map(str, seeds))}, which are "
        "in [gpt.csv](gpt.csv); of *dense, long*, a seed has one language. "
        f"{platform.machine()}, {os.cpu_count()} CPU cores, threads of a "
        f"process: {torch.get_num_threads()}, torch {torch.__version__.split('+')[0]}. By the "
        "commands of [docs/sequences.md](../docs/sequences.md)."
    ]


def goals(found: pd.DataFrame, ratio: float) -> list[str]:
    """What the figures are to show, and what they do: the mean, and the worst."""
    tuned = found["fine-tuned"]
    reached = {
        "module as cut - modular GPT": found["as cut"] - found["modular"],
        "module, fine-tuned - standard GPT (at most +.050)": tuned - found["standard"],
        "the same - standard GPT, fine-tuned": tuned - found["standard, fine-tuned"],
        "the same - dense GPT (below 0)": tuned - found["dense"],
        "the same - dense GPT, long; one language a seed": tuned - found["dense, long"],
    }
    return [
        "| goal | mean | worst |", "| :-- | --: | --: |",
        f"| time of a training step, modular / standard (at most 1.15) | {ratio:.2f} | |",
        f"| parameters of a module / of the GPT (at most .50) | {found['share'].mean():.2f} | "
        f"{found['share'].max():.2f} |",
        *(f"| {name} | {of.mean():+.3f} | {of.max():+.3f} |" for name, of in reached.items()),
        "",
        f"Neuron retention rate {found['nrr'].mean():.3f}, coupling {found['coupling'].mean():.3f},"
        f" largest error of the exactness check {found['error'].max():.0e}.",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
