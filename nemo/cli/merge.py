"""The command that makes one module of two."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nemo.cli.modules import data_option

if TYPE_CHECKING:
    from nemo.data import Prepared


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
@data_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="A new folder.")
def merge(a: Path, b: Path, source: str, out: Path) -> None:
    """Merge the modules in folders A and B, which have no class in common, into one.

    Their logits are calibrated on the data's validation images, and both measured on its test
    images.
    """
    from nemo.data import Batches
    from nemo.files import new_folder
    from nemo.module.files import load, save
    from nemo.module.info import preparation
    from nemo.module.union import check_mergeable, class_names
    from nemo.module.union import merge as merge_modules
    from nemo.pipeline.modularize import check_new
    from nemo.predict import accuracy, predict

    check_new(out)
    first, second = load(a).float(), load(b).float()  # images are float32
    names = check_mergeable(first, second)
    if "preprocessing" not in first.info:
        raise ValueError(f"{a}: the module does not say how images are prepared for it")
    mean, std, _ = preparation(first, first.info)
    preparation(second, second.info)
    if len(mean) != 3:
        raise ValueError(f"{a}: a module of grey images; accepted: of colour ones, or nemo.merge")
    data = _images_of(names, source, first.input_size[1])
    validation, test = (Batches(data.splits[split], mean, std, 256) for split in ("val", "test"))
    module = merge_modules(first, second, validation)
    with new_folder(out) as folder:
        save(module, folder)
    for path, part in zip((a, b), module.info["merged"], strict=True):
        click.echo(f"{path}: logits x {part['scale']:.3f} {part['bias']:+.3f}")
    measured = predict(module, test)
    count = len(class_names(first))
    for what, classes in ((a, range(count)), (b, range(count, len(names))), (out, None)):
        click.echo(f"test accuracy of {what}: {accuracy(*measured, classes=classes):.1%}")
    click.echo(f"wrote {out}")


def _images_of(names: list[str], source: str, size: int) -> Prepared:
    """The images of these classes, labelled in this order."""
    from nemo.data import DataError, load, prepare
    from nemo.pipeline.modularize import data_source
    from nemo.sections import DataSource

    def positions(classes: Sequence[str]) -> list[int]:
        missing = [name for name in names if name not in classes]
        if missing:
            raise DataError(f"{source}: no class {missing[0]!r}, which a module has")
        return [classes.index(name) for name in names]

    name, where = data_source(source)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        prepare(name, DataSource(source=where, size=size), folder, check=positions)
        data = load(folder)
    return data.restrict(positions(data.classes))


COMMANDS = (merge,)
