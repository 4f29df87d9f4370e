"""A small detector with masks for images, or for single queries; see docs/detection.md."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nemo
from examples.detection import detection_loss, match, precisions, query_labels
from examples.detection_data import CLASSES, Split, Target, stored
from examples.detr_head import Head
from examples.pages import write_tables
from nemo.files import read_json, write_csv, write_json
from nemo.locks import locked
from nemo.module.decomposed import DecomposedModule

WHITE, NONE = CLASSES.index("WBC"), len(CLASSES)
BATCH, TAU, THRESHOLD = 16, 0.2, 0.9
REPORTS = Path(__file__).parents[1] / "reports"
HEADERS = {"ap50": "AP50", "ap": "AP", "nrr": "NRR", "module_parameters": "parameters"}
HEADERS |= {"module_of": "of", "module_error": "difference", "module_ap50": "fine-tuned"}
HEADERS |= {"module_ap50_cut": "as cut"}
FORMS = {"masks": "", "alpha": "g", "coupling": ".2f", "cohesion": ".2f", "nrr": ".2f"}
FORMS |= {"module_parameters": ",", "module_of": ",", "module_error": ".0e"}
Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """Masks of `kind`: none, image or query; alpha weighs their loss."""

    kind: str
    alpha: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.alpha:g}" if self.alpha else "standard"


METHODS = (
    Method("none"),
    *(Method(kind, alpha) for kind in ("image", "query") for alpha in (0.3, 1.0)),
)


def every_query(layer: str, x: Tensor) -> Tensor:
    """A `pool` of modularize: the generators see each query by itself."""
    return x


def modular_of(head: nn.Module, kind: str, features: Tensor) -> nemo.Modular:
    if kind == "query":
        return nemo.modularize(head, features, pool=every_query)
    return nemo.modularize(head, features)  # the mean of the queries


def labelled(kind: str, masks: Masks, labels: Tensor) -> tuple[Masks, Tensor]:
    """One mask and its class per row, for the contrastive loss and for class masks.

    Args:
        kind: `query`: masks {layer: (B, Q, N_l)} of the queries that have an object. `image`: masks
            (B, N_l); an image stands in as many rows as it has classes.
        labels: (B, Q), NONE for queries without an object.
    """
    if kind == "query":
        chosen = labels != NONE
        return {layer: mask[chosen] for layer, mask in masks.items()}, labels[chosen]
    images, classes = F.one_hot(labels, NONE + 1).any(1)[:, :NONE].nonzero().unbind(1)
    return {layer: mask[images] for layer, mask in masks.items()}, classes


def balanced(masks: Masks, classes: Tensor) -> tuple[Masks, Tensor]:
    """At most BATCH rows of each class, drawn at random: 85 % of all cells are red."""
    order = torch.randperm(len(classes))
    rows = torch.cat([order[classes[order] == label][:BATCH] for label in range(NONE)])
    return {layer: mask[rows] for layer, mask in masks.items()}, classes[rows]


def train(
    model: nn.Module, split: Split, epochs: int, rate: float, seed: int, method: Method
) -> None:
    """AdamW with one cycle; a modular model gives masks besides its output."""
    optimizer = torch.optim.AdamW(model.train().parameters(), rate)
    steps = epochs * -(-len(split.targets) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    for epoch in range(epochs):
        for features, targets in split.batches(BATCH, 1000 * seed + epoch + 1):
            outputs, masks = model(features) if method.alpha else (model(features), {})
            matches = [match(*pair) for pair in zip(outputs, targets, strict=True)]
            loss = detection_loss(outputs, targets, matches)
            if method.alpha:
                rows, classes = labelled(
                    method.kind, masks, query_labels(outputs, targets, matches)
                )
                loss = loss + method.alpha * nemo.contrastive_loss(*balanced(rows, classes), TAU)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.no_grad()
def bits(modular: nemo.Modular, kind: str, split: Split) -> Iterator[tuple[Masks, Tensor]]:
    """Which neurons are on, and the class, a row for each that `labelled` gives."""
    modular.eval()
    for features, targets in split.batches(BATCH):
        outputs, masks = modular(features)
        matches = [match(*pair) for pair in zip(outputs, targets, strict=True)]
        rows, classes = labelled(kind, masks, query_labels(outputs, targets, matches))
        yield {layer: mask > 0 for layer, mask in rows.items()}, classes


def class_masks(rows: Masks, classes: Tensor) -> nemo.ClassMasks:
    """What is on in THRESHOLD of a class's rows: {layer: bool (C, N_l)} of bool (rows, N_l)."""
    frequency = {
        layer: torch.stack([mask[classes == label].float().mean(0) for label in range(NONE)])
        for layer, mask in rows.items()
    }
    return nemo.ClassMasks(nemo.threshold_masks(frequency, THRESHOLD), {})


@torch.no_grad()
def measure(model: nn.Module, split: Split, classes: Sequence[int]) -> dict[str, float]:
    """Average precisions in percent of a model whose logits are of these classes."""
    model.eval()
    found = [model(features) for features, _ in split.batches(BATCH)]
    outputs = torch.cat([one[0] if isinstance(one, tuple) else one for one in found])
    if not outputs.isfinite().all():
        raise click.ClickException("the training diverged: the outputs are not finite")
    each = torch.tensor(list(precisions(outputs, split.targets, classes).values())) * 100
    kinds = {f"ap50_{CLASSES[c]}": float(row[0]) for c, row in zip(classes, each, strict=True)}
    return {"ap50": float(each[:, 0].mean()), "ap": float(each.mean()), **kinds}


def white_cells(
    modular: nemo.Modular, masks: Any, data: dict[str, Split], seed: int, epochs: int
) -> tuple[DecomposedModule, dict[str, Any]]:
    """The module of white cells, and its figures as cut and fine-tuned."""
    module = nemo.decompose(
        modular, masks.select([WHITE]), classes=[0, 1, 2, 3, 4 + WHITE, 4 + NONE]
    )
    report = module.report
    figures = {
        "module_error": module.certificate["error"],
        "module_parameters": report["parameters"],
        "module_of": report["parent_parameters"],
        "module_ap50_cut": measure(module, data["test"], [WHITE])["ap50"],
    }
    alone = [
        Target(t.boxes[t.labels == WHITE], t.labels[t.labels == WHITE] * 0)
        for t in data["train"].targets
    ]
    train(module, Split(data["train"].features, alone), epochs, 3e-4, seed, Method("none"))
    return module.eval(), figures | {"module_ap50": measure(module, data["test"], [WHITE])["ap50"]}


def run(
    method: Method, data: dict[str, Split], seed: int, epochs: int, work: Path
) -> dict[str, Any]:
    """Train, cut and measure; the module is saved in the work folder."""
    torch.manual_seed(seed)
    _, _, channels, height, width = data["train"].features.shape
    model: nn.Module = Head(channels, height, width, len(CLASSES))
    if method.alpha:
        model = modular_of(model, method.kind, next(data["train"].batches(2))[0])
    train(model, data["train"], epochs, 2e-3, seed, method)
    row = {"seed": seed, "masks": method.kind, "alpha": method.alpha, "epochs": epochs}
    row |= measure(model, data["test"], range(len(CLASSES)))
    if not isinstance(model, nemo.Modular):
        return row
    seen = list(bits(model, method.kind, data["train"]))
    every = {layer: torch.cat([rows[layer] for rows, _ in seen]) for layer in seen[0][0]}
    classes = torch.cat([labels for _, labels in seen])
    masks = class_masks(every, classes)
    row["coupling"] = nemo.coupling(masks)
    row["cohesion"] = nemo.cohesion(every, classes, masks)
    row["nrr"] = nemo.retention_rate(masks)
    module, figures = white_cells(model, masks, data, seed, max(1, epochs // 6))
    nemo.save(module, work / f"{method.name}-white-cells")
    return row | figures


def tables(rows: list[dict[str, Any]]) -> str:
    """Two tables in Markdown: of the whole models, and of the modules of white cells."""
    kinds = [f"ap50_{name}" for name in CLASSES]
    whole = ["masks", "alpha", "ap50", "ap", *kinds, "coupling", "cohesion", "nrr"]
    module = ["masks", "alpha", "module_parameters", "module_of", "module_error", kinds[WHITE]]
    module += ["module_ap50_cut", "module_ap50"]
    seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
    return (
        f"Figures in a cell are those of the seeds {seeds}, after {rows[0]['epochs']} epochs; one "
        f"that is the same for all stands once.\n\n{_table(rows, whole)}\n\nThe module of white "
        "cells, where *WBC* is the whole model's AP50:\n\n"
        f"{_table([row for row in rows if row['alpha']], module)}\n"
    )


def _table(rows: list[dict[str, Any]], keys: list[str]) -> str:
    """A line per method."""
    titles = [HEADERS.get(key, key.removeprefix("ap50_")) for key in keys]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(keys) - 1)}"]
    for method in METHODS:
        mine = [row for row in rows if (row["masks"], row["alpha"]) == (method.kind, method.alpha)]
        if not mine:  # the standard head has no module
            continue
        cells = []
        for key in keys:
            figures = [format(row[key], FORMS.get(key, ".1f")) for row in mine if key in row]
            same = len(set(figures)) == 1
            cells.append(" / ".join(figures[:1] if same else figures))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def kept(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def write_report(work: Path, reports: Path) -> None:
    """detection.csv, and the tables of detection.md; its other text stays as it is."""
    seeds = sorted(int(folder.name[5:]) for folder in work.glob("seed-*"))
    files = [work / f"seed-{seed}/{method.name}.json" for method in METHODS for seed in seeds]
    lacking = next((file for file in files if not file.is_file()), None)
    if lacking or not files:
        raise click.UsageError(f"no {lacking or work / 'seed-0'}; run --seed first")
    rows = [kept(file) for file in files]
    if len(epochs := {row["epochs"] for row in rows}) > 1:
        raise click.UsageError(f"{work}: results of {epochs} epochs; accepted: one number of them")
    columns = dict.fromkeys(["seed", "masks", "alpha", *max(rows, key=len)])
    write_csv(
        reports / "detection.csv", [{key: row.get(key, "") for key in columns} for row in rows]
    )
    write_tables(reports / "detection.md", tables(rows))


@click.command()
@click.option(
    "--data", type=click.Path(exists=True, path_type=Path), help="BCCD: a folder or .tar."
)
@click.option(
    "--seed", type=click.IntRange(0, 10**6), help="Train and measure all methods with this seed."
)
@click.option(
    "--epochs",
    default=30,
    type=click.IntRange(1),
    help="Of each training; a sixth of it of the fine-tuning.",
)
@click.option("--work", default="detr-work", type=click.Path(file_okay=False, path_type=Path))
@click.option("--report", is_flag=True, help="Write detection.csv and .md of the seeds in WORK.")
@click.option(
    "--out", default=REPORTS, type=click.Path(exists=True, file_okay=False, path_type=Path)
)
def main(
    data: Path | None, seed: int | None, epochs: int, work: Path, report: bool, out: Path
) -> None:
    """Masks for images against masks for queries, on blood cells."""
    if seed is None and not report:
        raise click.UsageError("nothing to do: --seed, --report, or both")
    torch.set_flush_denormal(True)  # weights of attention far away are, and slow
    if seed is not None:
        splits, folder = stored(work, data), work / f"seed-{seed}"
        with locked(work / f".seed-{seed}.lock"):
            for method in METHODS:
                file = folder / f"{method.name}.json"
                if not file.is_file():
                    write_json(file, run(method, splits, seed, epochs, folder))
                row = kept(file)
                if row["epochs"] != epochs:
                    raise click.UsageError(
                        f"{file} is of {row['epochs']} epochs; accepted: --epochs {row['epochs']}, "
                        "or another --work"
                    )
                click.echo(f"{method.name}: {row}")
    if report:
        write_report(work, out)


if __name__ == "__main__":
    main()
