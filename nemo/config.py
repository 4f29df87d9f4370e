"""params.yaml, typed: every knob of an experiment, checked before any work (ours).

Importing this module costs pydantic only; stages that need no network do not pay for torch. What
can be named in params (methods, models, selectors, alternatives) is in registries, to which the
files under `plugins` add.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    Field,
    ValidationError,
    create_model,
    field_serializer,
    field_validator,
    model_validator,
)

from nemo.fields import Device, MethodName, Name, ParamsError, Strict, Whole
from nemo.masking.objectives import OBJECTIVES, Objective
from nemo.masking.selectors import SELECTORS
from nemo.mistakes import describe
from nemo.models.registry import check_model_name
from nemo.params_file import read_params
from nemo.plugins import import_plugins
from nemo.sections import (
    AlternativesParams,
    Architectures,
    BudgetsParams,
    DataSource,
    DecomposeParams,
    FinetuneParams,
    GranularityParams,
    MaskParams,
    Of,
    ThresholdsParams,
    TrainParams,
    architectures,
    check_subset_text,
    mask_params,
    method_sections,
)

EXTRAS = ("alternatives", "budgets", "gap", "granularity", "thresholds")
STANDARD = "standard"
OVERRIDABLE = ("architecture", "decompose", "finetune", "masks", "train")  # and the base's section


class Params(Strict):
    """The whole of params.yaml; each method's section joins it (`loss`, `mwt`)."""

    profile: Name
    device: Device = "auto"
    plugins: list[str] = Field(default_factory=list)
    datasets: Annotated[list[Name], Field(min_length=1)]
    models: Annotated[list[str], Field(min_length=1)]
    methods: Annotated[list[MethodName], Field(min_length=1)]
    variants: dict[MethodName, dict[str, Any]] = Field(default_factory=dict)
    subsets: Annotated[dict[str, str], Field(min_length=1)]  # {name: classes}
    seeds: Annotated[list[Whole], Field(min_length=1)]
    beside: list[Name] = Field(default_factory=list)
    data: dict[Name, DataSource]
    architecture: Architectures
    train: TrainParams
    masks: MaskParams
    decompose: DecomposeParams = DecomposeParams()
    finetune: FinetuneParams
    alternatives: AlternativesParams = AlternativesParams()
    budgets: BudgetsParams = BudgetsParams()
    gap: Of = Of()
    thresholds: ThresholdsParams = ThresholdsParams()
    granularity: GranularityParams = GranularityParams()

    def base_of(self, method: str) -> Objective:
        """The registered method that `method` is, or is a variant of.

        Raises:
            ParamsError: it is neither.
        """
        if method in self.variants:
            method = self.variants[method].get("method", "")
        if method not in OBJECTIVES:
            accepted = ", ".join([*OBJECTIVES, *self.variants])
            raise ParamsError(f"methods: unknown {method!r}; accepted: {accepted}")
        return OBJECTIVES[method]

    def for_method(self, method: str) -> Params:
        """These params with what a variant changes of them.

        Raises:
            ParamsError: no such method, or a key or value that the variant may not have.
        """
        base = self.base_of(method)
        if method not in self.variants:
            return self
        raw, changes = self.model_dump(exclude_unset=True), self.variants[method]
        selector = changes.get("masks.selector")
        if isinstance(selector, str) and selector in SELECTORS:  # without what it has no key for
            known = mask_params(selector).model_fields
            raw["masks"] = {k: v for k, v in raw["masks"].items() if k in known}
        for key, value in changes.items():
            if key != "method":
                _override(raw, key, value, f"variants.{method}", base)
        return _validated(raw, f"variants.{method}.")

    def start_of(self, method: str) -> TrainParams | None:
        """How the standard model was trained that a method starts from; None from random weights.

        Raises:
            ParamsError: see `for_method`.
        """
        return self.train if self.for_method(method).train.start else None

    def check_shape(self, model: str) -> None:
        """Raise ParamsError unless `architecture` has the model."""
        self.architecture.check(model)

    def section(self, name: str | None) -> Any:
        """A method's own section, by its key; None where it has none."""
        return None if name is None else getattr(self, name)

    @field_validator("models")
    @classmethod
    def _known_models(cls, names: list[str]) -> list[str]:
        for name in names:
            check_model_name(name)
        return names

    @field_validator("subsets", mode="before")
    @classmethod
    def _named_by_itself(cls, subsets: Any) -> Any:
        if isinstance(subsets, dict):
            return subsets
        if not isinstance(subsets, list) or not all(isinstance(one, str) for one in subsets):
            accepted = "names in quotes, such as ['0+1', all], or {name: classes}"
            raise ValueError(f"{subsets!r}; accepted: {accepted}")
        if len(set(subsets)) < len(subsets):
            raise ValueError(f"{subsets} names something twice")
        if not subsets:
            raise ValueError("list should have at least 1 item")
        return {subset: subset for subset in subsets}

    @field_validator("subsets")
    @classmethod
    def _subset_syntax(cls, subsets: dict[str, str]) -> dict[str, str]:
        for name, text in subsets.items():
            check_subset_name(name)
            check_subset_text(text)
        return subsets

    @field_serializer("subsets")
    def _as_written(self, subsets: dict[str, str]) -> list[str] | dict[str, str]:
        plain = all(name == text for name, text in subsets.items())
        return list(subsets) if plain else subsets

    def text_of(self, subset: str) -> str:
        """The classes of a subset as text: of a name in `subsets`, or of itself."""
        return self.subsets.get(subset, subset)

    @model_validator(mode="after")
    def _no_contradictions(self) -> Self:
        for key in ("datasets", "models", "methods", "seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: {values} names something twice")
        names = [f"{m}-{n}-{s}" for m in self.methods for n in self.seeds for s in self.subsets]
        if len(set(names)) < len(names):
            raise ValueError(
                "methods: a name such as nemo-1 is that of nemo with seed 1; rename it"
            )
        for name in self.datasets:
            if name == "times":
                raise ValueError("datasets: 'times' is a folder beside the results; choose another")
            if name not in self.data:
                raise ValueError(
                    f"datasets: {name!r} is not in data; accepted: {', '.join(self.data)}"
                )
        for name in self.models:
            self.check_shape(name)
        self._check_methods()
        return self

    def _check_methods(self) -> None:
        for name, variant in self.variants.items():
            if name in OBJECTIVES:
                raise ValueError(f"variants.{name}: a method has that name; choose another")
            if str(variant.get("method")) not in OBJECTIVES:
                raise ValueError(
                    f"variants.{name}.method: unknown {variant.get('method')!r}; "
                    f"accepted: {', '.join(OBJECTIVES)}"
                )
        if STANDARD not in self.methods:
            raise ValueError(f"methods: {STANDARD!r} is always part; all else is compared with it")
        for method in dict.fromkeys([*self.methods, *self.variants]):
            section = self.base_of(method).section
            if section is not None and getattr(self, section) is None:
                raise ValueError(f"{section}: required by the method {method!r}, and missing")
        modular = [m for m in self.methods if self.base_of(m).modular]
        for extra in EXTRAS:
            getattr(self, extra).check(extra, modular, list(self.subsets))


def check_subset_name(name: str) -> None:
    """Raise ParamsError unless folders and DVC's stages, in a shell's quotes, can have the name."""
    odd = re.search(r'^[\s.-]|\s$|[\x00-\x1f\x7f/\\"$`@|]', name)
    if not name or odd or len(name.encode()) > 150:
        why = f", for its {odd[0]!r}" if odd else ""
        raise ParamsError(
            f"{name!r} is no name of a subset{why}; accepted: all, 0-4, 3+5, cat+dog; other "
            "classes get a name, as in {ten: random:10@3}"
        )


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check a params file.

    Raises:
        ParamsError: the file is missing, is not YAML, or holds a key or value that is not accepted;
            the message has one line per mistake.
    """
    return check_params(read_params(path), path)


def check_params(raw: dict[str, Any], origin: str | Path = "params") -> Params:
    """The params in a nest of dicts; `origin` begins each line of an error. Imports its plugins.

    Raises:
        ParamsError: a key or value is missing or not accepted; one line per mistake.
    """
    plugins = raw.get("plugins")
    lines: list[str] = []
    try:
        if isinstance(plugins, list):
            import_plugins(map(str, plugins))
        params = _validated(raw)
        if params.train.start:  # else the standard model would start from itself
            lines.append(f"train.start: {params.train.start!r}; accepted: in `variants` alone")
        for name in params.variants:
            try:
                params.for_method(name)
            except ParamsError as error:
                lines += str(error).splitlines()
        if not lines:
            lines += _other_selectors(params)
    except ParamsError as error:
        lines += str(error).splitlines()
    if lines:
        raise ParamsError("\n".join(f"{origin}: {line}" for line in lines))
    return params


def _other_selectors(params: Params) -> Iterator[str]:
    """A line for each method whose class masks have no thresholds, where a table is of them."""
    for table in ("granularity", "thresholds"):
        for method in getattr(params, table).of:
            chosen = params.for_method(method).masks.selector
            if chosen != "frequency":
                why = f"{method!r} has masks.selector {chosen}, which knows no thresholds"
                yield f"{table}.of: {why}; accepted: methods with frequency"


def _validated(raw: dict[str, Any], prefix: str = "") -> Params:
    """Params of a class that knows the registered models, and the sections of the methods."""
    masks = raw.get("masks")
    chosen = masks.get("selector", "frequency") if isinstance(masks, dict) else "frequency"
    fields: dict[str, Any] = {"architecture": (architectures(), ...), **method_sections(Params)}
    try:
        fields["masks"] = (mask_params(str(chosen)), ...)
    except ValueError as error:
        raise ParamsError(f"{prefix}masks.selector: {error}") from None
    kind = create_model("Params", __base__=Params, **fields)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        lines = dict.fromkeys(describe(e, raw, kind) for e in error.errors(include_url=False))
        raise ParamsError("\n".join(f"{prefix}{line}" for line in lines)) from None


def _override(raw: dict[str, Any], key: str, value: Any, where: str, base: Objective) -> None:
    """Set a dotted key of `raw`, which a variant of `base` may change."""
    section, *path = key.split(".")
    accepted = sorted([*OVERRIDABLE, *([base.section] if base.section else [])])
    if section not in accepted or not path:
        raise ParamsError(
            f"{where}.{key}: decides nothing here; accepted: method, and dotted keys of "
            f"{', '.join(accepted)}"
        )
    place = raw.setdefault(section, {})
    *path, last = path
    for part in path:
        place = place.setdefault(part, {})
        if not isinstance(place, dict):
            raise ParamsError(f"{where}.{key}: {part} has no keys")
    place[last] = value
