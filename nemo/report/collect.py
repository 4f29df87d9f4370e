"""The finished results that a report is about: every file of the profile that fits params.yaml.

What `datasets`, `models`, `methods` and `seeds` list is wanted; a file of it with other params is
refused. Other seeds and the variants that params define are shown too, where their files fit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nemo.cells import Cell, cells
from nemo.config import STANDARD, Params, load_params
from nemo.data.subsets import parse_subset
from nemo.fields import ParamsError
from nemo.metrics import Subject
from nemo.results import (
    CellResult,
    MissingResultError,
    ModuleResult,
    Row,
    read_result,
    read_times,
    result_file,
    result_files,
    times_file,
)
from nemo.settings import fits

AGAIN = "`dvc repro` makes it anew"


@dataclass(frozen=True)
class Results:
    """Finished cells in the order of params, and what is known about them.

    Attributes:
        datasets: {name: what its files say of the images}.
        missing: the cells and subsets that params list and that have no results.
        left_out: files that do not fit params, and why.
        times: {(data set, model, seed): what `benchmarks.times` measured}.
    """

    params: Params
    datasets: dict[str, Row]
    cells: list[CellResult]
    missing: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    times: dict[tuple[str, str, int], Row] = field(default_factory=dict)

    def of(self, dataset: str, model: str | None = None, every: bool = False) -> list[CellResult]:
        """Cells of a data set (and model), by the methods that params list, or `every` one."""
        return [
            result
            for result in self.cells
            if result.cell.dataset == dataset
            and model in (None, result.cell.model)
            and (every or result.cell.method in self.params.methods)
        ]

    def models(self, dataset: str) -> list[str]:
        """The models of which there are results, in the order of params."""
        return list(dict.fromkeys(r.cell.model for r in self.of(dataset, every=True)))

    def listed(self) -> Iterator[CellResult]:
        """The cells by methods that params list."""
        for dataset in self.datasets:
            yield from self.of(dataset)

    def beside(self, result: CellResult, method: str) -> CellResult | None:
        """The cell by another method with the data set, model and seed of `result`."""
        wanted = replace(result.cell, method=method)
        return next((r for r in self.cells if r.cell == wanted), None)

    def subject(
        self, result: CellResult, module: ModuleResult | None = None, alternative: str = ""
    ) -> Subject:
        """What metrics are measured of: a cell, a module of it, or an alternative to one."""
        times = {} if alternative else self._times(result, module)
        return Subject(result, self.beside(result, STANDARD), module, times, alternative)

    def _times(self, result: CellResult, module: ModuleResult | None) -> Row:
        cell = result.cell
        found = self.times.get((cell.dataset, cell.model, cell.seed))
        if found is None:
            return {}
        if module is None:
            steps = {row["method"]: row["ratio"] for row in found["training"]}
            return {"cpu_time": steps.get(cell.method)}
        times = {}
        subset = module.subset if result.modular else "all"
        for row in found["latency"]:
            if (row["method"], row["subset"]) == (cell.method, subset):
                times[f"cpu_ms_{row['batch']}"] = row["ms"]
                times[f"cpu_time_{row['batch']}"] = row["ratio"]
        return times


def collect(params: Params, root: Path) -> Results:
    """Read every result file of the profile under `root` that fits `params`.

    Raises:
        MissingResultError: there is none; or one is damaged, is of other params although they list
            it, or is of other images than the rest.
    """
    wanted = set(cells(params))
    found: dict[Cell, CellResult] = {}
    left_out: list[str] = []
    for path in result_files(root, params.profile):
        shown = path.relative_to(root).as_posix()
        result = read_result(path)
        cell = result.cell
        if path != result_file(root, params.profile, cell):
            raise MissingResultError(f"{shown}: is the file of {cell.name}; {AGAIN}")
        why = _not_listed(params, cell) or next(iter(fits(result, params)), "")
        if why and cell in wanted:
            raise MissingResultError(f"{shown}: {why}; {AGAIN}")
        if why:
            left_out.append(f"{shown}: {why}")
        else:
            found[cell] = _of_subsets(result, params, shown)
    if not any(cell.method in params.methods for cell in found):
        raise MissingResultError(
            f"results/{params.profile}: none of the cells of params has results; "
            "`dvc repro` makes them"
        )
    ordered = sorted(found.values(), key=lambda result: _place(params, result.cell))
    missing = [m for cell in cells(params) for m in _missing(cell, found.get(cell), params)]
    return Results(params, _datasets(ordered), ordered, missing, left_out, _times(ordered, root))


def others_of(params: Params, root: Path) -> list[Params]:
    """The profiles whose data sets some tables show beside those of `params`.

    Raises:
        ParamsError: one that is no file of profiles/, or has a data set of another.
    """
    files = [root / "profiles" / f"{name}.yaml" for name in params.beside]
    for name, file in zip(params.beside, files, strict=True):
        if not file.is_file():
            raise ParamsError(f"beside: {name!r}: no file {file}; accepted: names of profiles/")
    found = [load_params(file) for file in files]
    taken = set(params.datasets)
    for other in found:
        if twice := taken.intersection(other.datasets):
            names = ", ".join(sorted(twice))
            raise ParamsError(
                f"beside: {other.profile} has {names}, which is here already; accepted: profiles "
                "of other data sets"
            )
        taken.update(other.datasets)
    return found


def _not_listed(params: Params, cell: Cell) -> str:
    """Why a cell has no place in a report of these params; empty where it has."""
    if cell.dataset not in params.datasets:
        return f"datasets do not list {cell.dataset}"
    if cell.model not in params.models:
        return f"models do not list {cell.model}"
    if cell.method not in (*params.methods, *params.variants):
        return f"methods and variants do not list {cell.method}"
    return ""


def _of_subsets(result: CellResult, params: Params, shown: str) -> CellResult:
    """With the modules, and the rows of the tables, of the subsets that params list.

    Raises:
        MissingResultError: a module has other classes than the name stands for now.
    """
    subsets = list(params.subsets)
    modules = [m for s in subsets for m in result.modules if m.subset == s]
    for module in modules:
        text = params.text_of(module.subset)
        if module.metrics["classes"] != parse_subset(text, result.data["classes"]):
            raise MissingResultError(
                f"{shown}: the classes of {module.subset!r} are others now; {AGAIN}"
            )
    # granularity may be of classes that no module has
    listed = dict.fromkeys(result.extras, subsets) | {"granularity": params.granularity.subsets}
    extras = {
        name: [row for row in rows if row.get("subset", listed[name][0]) in listed[name]]
        for name, rows in result.extras.items()
    }
    return replace(result, modules=modules, extras=extras)


def _place(params: Params, cell: Cell) -> tuple[int, int, int, int]:
    methods = list(dict.fromkeys([STANDARD, *params.methods, *params.variants]))
    places = (params.datasets, cell.dataset), (params.models, cell.model), (methods, cell.method)
    first, second, third = (names.index(name) for names, name in places)
    return first, second, third, cell.seed


def _missing(cell: Cell, result: CellResult | None, params: Params) -> Iterator[str]:
    if result is None:
        yield cell.name
    elif result.modular:
        for subset in params.subsets:
            if subset not in [module.subset for module in result.modules]:
                yield f"{cell.name}, classes {subset}"


def _datasets(results: list[CellResult]) -> dict[str, Row]:
    """{data set: what the files say of it}.

    Raises:
        MissingResultError: two files say something else.
    """
    datasets: dict[str, Row] = {}
    for result in results:
        name, about = result.cell.dataset, result.data
        first = datasets.setdefault(name, about)
        if about["sha256"] != first["sha256"]:
            raise MissingResultError(
                f"results of {result.cell.name}: computed on images of sha256 "
                f"{about['sha256'][:12]}, and others of {name} on {first['sha256'][:12]}; {AGAIN}"
            )
    return datasets


def _times(results: list[CellResult], root: Path) -> dict[tuple[str, str, int], Row]:
    cells = {(r.cell.dataset, r.cell.model, r.cell.seed): r for r in results}
    files = {key: times_file(root, r.profile, r.cell) for key, r in cells.items()}
    return {key: read_times(file) for key, file in files.items() if file.is_file()}


def titles(every: Sequence[Results]) -> dict[str, str]:
    """{data set: its title}, with its name where several have the same title."""
    found = {name: each.datasets[name]["title"] for each in every for name in each.datasets}
    often = Counter(found.values())
    return {name: f"{t} ({name})" if often[t] > 1 else t for name, t in found.items()}
