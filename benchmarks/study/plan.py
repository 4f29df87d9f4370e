"""Which units there are. The recipe is profiles/cifar10-cpu.yaml; a unit says what differs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nemo.config import Method, Params, PerFamily
from nemo.models.registry import MODEL_FAMILIES

WITH_BASELINES = ("vgg16", "resnet18", "vit_small")
SEEDS = {"vgg16": 3, "resnet18": 2, "vit_small": 2, "simcnn": 2, "rescnn": 3, "deit_small": 2}
# One model stands for its family. The profile has the value that keeps the fewest neurons among
# those that lose at most 3 points of validation accuracy (the paper's own limit), for both methods.
ALPHAS = {"vgg16": (0.25, 0.5, 1.0, 2.0), "vit_small": (0.01, 0.03, 0.1, 0.3)}
MWT = {"vgg16": (0.5, 1.5), "vit_small": (0.5, 0.85)}  # alpha and beta as published
MWT_FACTORS = (0.25, 0.5, 1.0)
TAUS = (0.1, 0.3, 0.5)  # besides the profile's 0.2
WHERE = frozenset({"processes", "cuda_graphs"})  # keys of a recipe that decide no result
PAIRS = ("airplane+automobile", "cat+dog")


@dataclass(frozen=True)
class Unit:
    """One model and seed of the profile.

    `changes` are {dotted key: value} of the params; `subsets` are what is cut, None for the
    profile's.
    """

    name: str
    model: str
    seed: int
    methods: tuple[Method, ...] = ("standard", "mwt", "nemo")
    changes: dict[str, Any] = field(default_factory=dict)
    subsets: tuple[str, ...] | None = None
    baselines: bool = False
    granularity: bool = False

    @property
    def modular(self) -> bool:
        """Whether modules are cut."""
        return self.subsets is None or bool(self.subsets)

    def params(self, profile: Params) -> Params:
        """The profile with this unit's model, seed and changes.

        Raises:
            ValidationError: a change that the params do not accept.
        """
        raw = profile.model_dump()
        raw |= {"models": [self.model], "seeds": [self.seed]}
        for key, value in self.changes.items():
            *path, last = key.split(".")
            inner = raw
            for part in path:
                inner = inner[part]
            inner[last] = value
        return Params.model_validate(raw)

    def fits(self, facts: dict[str, Any], profile: Params) -> bool:
        """Whether a finished unit's file was made with what decides its results today."""
        now, then = self.params(profile), Params.model_validate(facts["params"])
        sections = {"mwt": ["mwt"], "nemo": ["loss"], "standard": []}
        used = ["train", "masks"] + [key for m in self.methods for key in sections[m]]
        used += ["finetune"] if self.modular else []
        if now.architecture.of(self.model) != then.architecture.of(self.model):
            return False
        if now.data != then.data:  # the same split and augmentation
            return False
        return self.subsets_of(now) == self.subsets_of(then) and all(
            _of_family(getattr(now, key), self.model, WHERE)
            == _of_family(getattr(then, key), self.model, WHERE)
            for key in used
        )

    def subsets_of(self, params: Params) -> list[str]:
        return params.subsets if self.subsets is None else list(self.subsets)


def units() -> Iterator[Unit]:
    """Every unit, the ones that most tables need first; the sweeps that decide alpha come before
    what uses it."""
    for model, alphas in ALPHAS.items():
        for alpha in alphas:
            yield _knob(f"{model}-alpha-{alpha:g}-0", model, {"loss.alpha": alpha})
    for model, (alpha, beta) in MWT.items():
        for factor in MWT_FACTORS:
            changes = {"mwt.alpha": factor * alpha, "mwt.beta": factor * beta}
            yield _knob(f"{model}-mwt-{factor:g}-0", model, changes, "mwt")
    for seed, model in itertools.product(range(3), SEEDS):
        if seed < SEEDS[model]:
            vit = model == "vit_small"
            name, compared = f"{model}-{seed}", model in WITH_BASELINES
            yield Unit(name, model, seed, baselines=compared, granularity=vit)
    for seed in range(SEEDS["vgg16"]):
        yield from _objectives(seed)
    for form in ("equation", "released"):
        for tau in TAUS:
            changes = {"loss.tau": tau, "loss.form": form}
            yield _knob(f"vgg16-{form}-tau-{tau:g}-0", "vgg16", changes)


def _of_family(section: Any, model: str, without: frozenset[str]) -> dict[str, Any]:
    """The values of a section of the params that `model` gets."""
    family = MODEL_FAMILIES[model]
    return {
        key: value.of(family) if isinstance(value, PerFamily) else value
        for key, value in section
        if key not in without
    }


def _objectives(seed: int) -> Iterator[Unit]:
    """T3: what each part of an objective does; `vgg16-SEED` has the equation form and MwT's sum."""
    parts = {
        "cohesion-only": {"mwt.beta": 0.0},
        "coupling-only": {"mwt.alpha": 0.0},
        "no-mask-loss": {"mwt.alpha": 0.0, "mwt.beta": 0.0},
    }
    released = {"loss.form": "released"}
    yield Unit(f"vgg16-released-{seed}", "vgg16", seed, ("standard", "nemo"), released, PAIRS)
    for name, changes in parts.items():
        yield Unit(f"vgg16-{name}-{seed}", "vgg16", seed, ("standard", "mwt"), changes, PAIRS)


def _knob(name: str, model: str, changes: dict[str, Any], method: Method = "nemo") -> Unit:
    """T4: one knob around the profile's value; nothing is cut."""
    return Unit(name, model, 0, ("standard", method), changes, ())
