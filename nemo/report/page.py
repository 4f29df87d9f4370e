"""index.html: everything on one page that needs nothing but itself."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

from nemo.report import words
from nemo.report.collect import Results
from nemo.report.diagnosis import diagnose
from nemo.report.published import NOTHING, beside
from nemo.report.style import Picture
from nemo.report.table import Part, Table


def page(
    results: Results,
    others: list[Results],
    tables: words.Frames,
    sections: list[tuple[Table, list[Part]]],
    maps: list[Picture],
    folder: Path,
) -> str:
    """The page, with the figures in `folder` inlined."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("nemo.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    listed = list(results.listed())
    unlisted = [cell for cell in results.cells if cell not in listed]
    content: dict[str, Any] = {
        "profile": results.params.profile,
        "headlines": words.headlines(results, tables),
        "captions": [words.caption(r, name) for r in (results, *others) for name in r.datasets],
        "missing": results.missing,
        "left_out": results.left_out,
        "sections": [
            (
                table,
                [
                    (part.title, part.grid, part.picture, _inline(folder / part.picture.file))
                    for part in parts
                ],
            )
            for table, parts in sections
        ],
        "beside": [pair for name in results.datasets for pair in beside(results, name)],
        "nothing": NOTHING,
        "flags": diagnose(results, listed),
        "others": diagnose(results, unlisted),
        "maps": [(picture, _inline(folder / picture.file)) for picture in maps],
        "rerun": words.rerun(results),
        "settings": words.settings(results.params),
    }
    return environment.get_template("page.html").render(content)


def _inline(path: Path) -> str:
    """As lossless WebP, which is a third of the PNG."""
    from PIL import Image

    packed = BytesIO()
    Image.open(path).convert("RGB").save(packed, "webp", lossless=True)
    return "data:image/webp;base64," + base64.b64encode(packed.getvalue()).decode("ascii")
