"""What DVC itself costs in a wide profile: the real dvc.yaml, with stages that compute nothing.

    python -m benchmarks.dvc_cost               # one data set, 6 models, 3 methods, 2 seeds
    python -m benchmarks.dvc_cost --seeds 1     # half of it

Prints CPU and wall seconds of the first `dvc repro`, and of one that has nothing to do. The stages'
own CPU time is measured by themselves, and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
# In place of each stage: its outputs, as DVC's environment names the stage, and its own CPU time.
STAGE = """
import json, os, sys, time
from pathlib import Path

name = os.environ["DVC_STAGE"]
for out in map(Path, json.loads(Path("outs.json").read_text())[name]):
    path = out if out.suffix else out / "file.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(name))
with open("spent", "a") as file:
    file.write(f"{time.process_time()}\\n")
"""


def wide(seeds: int) -> dict[str, object]:
    """Params of the size of a study's profile."""
    quick, cifar = (
        yaml.safe_load((ROOT / f"profiles/{name}.yaml").read_text())
        for name in ("quick", "cifar10-cpu")
    )
    same = ("datasets", "models", "subsets", "data", "architecture")
    of = {"of": ["mwt", "nemo"]}
    return {
        **quick, **{key: cifar[key] for key in same}, "profile": "wide",
        "seeds": list(range(seeds)), "gap": of, "thresholds": of, "alternatives": {"of": ["nemo"]},
    }  # fmt: skip


def make_project(root: Path, params: dict[str, object]) -> int:
    """The pipeline without its computing, in a repository of its own; returns its stages."""
    (root / ".dvc").mkdir(parents=True)
    for name in ("dvc.yaml", ".dvcignore", ".gitignore", ".dvc/config"):
        shutil.copy(ROOT / name, root / name)
    for name in ("nemo", "stages", "plugins", "subsets"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    dvc(root, "repro", "plan")  # the real one
    lines = [line.split() for line in dvc(root, "stage", "list").splitlines()]
    outs = {name: [out.rstrip(",") for out in named] for name, _, *named in lines}
    (root / "outs.json").write_text(json.dumps(outs))
    for file in (root / "stages").glob("*.py"):
        if file.stem not in ("__init__", "common", "plan"):
            file.write_text(STAGE)
    return len(outs)


def dvc(root: Path, *arguments: str) -> str:
    here = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=root, env={**os.environ, "PATH": here},
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"dvc {' '.join(arguments)}: {done.stdout}{done.stderr}")
    return done.stdout


def cost(root: Path) -> tuple[float, float]:
    """Seconds of CPU of `dvc repro`, those of the stages apart, and wall seconds."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    spent = root / "spent"
    spent.unlink(missing_ok=True)
    dvc(root, "repro", "-q")
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    stages = sum(map(float, spent.read_text().split())) if spent.exists() else 0.0
    return used - stages, wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=2)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        stages = make_project(root, wide(parser.parse_args().seeds))
        print(f"{stages} stages", flush=True)
        for what in ("all of them", "nothing to do"):
            used, wall = cost(root)
            print(f"{what}: {used:.0f} s of CPU besides the stages' own, {wall:.0f} s", flush=True)


if __name__ == "__main__":
    main()
