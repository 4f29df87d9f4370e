"""Fresh clones of the project's last commit with params of one's own, for what breaks or repeats
whole pipelines."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
COMMIT = subprocess.run(
    ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.strip()


def small_params() -> dict[str, object]:
    """The quick profile, shrunken to a minute or two: every kind of stage, one small model."""
    params = yaml.safe_load((ROOT / "profiles/quick.yaml").read_text())
    params |= {"profile": "small", "models": ["resnet18"], "subsets": ["0+1"]}
    params |= {"methods": ["standard", "nemo"], "gap": {"of": ["nemo"]}}
    params["alternatives"] = {"of": ["nemo"], "kinds": ["random", "standard-tuned"]}
    params["architecture"] = {"resnet18": {"width": 0.125}}
    params["train"]["epochs"], params["finetune"]["epochs"] = 4, 2
    return params


def changed(params: Path, changes: Iterable[str]) -> str:
    """The text of a params file after changes such as `loss.tau=0.5`, as `dvc exp run -S` has them.

    Raises:
        KeyError: a section that the file has not.
    """
    raw = yaml.safe_load(params.read_text())
    for change in changes:
        name, _, value = change.partition("=")
        *path, last = name.split(".")
        section = raw
        for key in path:
            section = section[key]
        section[last] = yaml.safe_load(value)
    return yaml.safe_dump(raw)


def clone(folder: Path, params: Path | None, changes: Iterable[str] = ()) -> Path:
    """The last commit in `folder`, with nothing made yet; without `params`, with the small ones."""
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "checkout", "-q", COMMIT], cwd=folder, check=True)
    text = yaml.safe_dump(small_params()) if params is None else changed(params, changes)
    (folder / "params.yaml").write_text(text)
    (folder / "dvc.lock").unlink()
    return folder


def environment() -> dict[str, str]:
    """The stages must run the clone's code, with the Python that runs this."""
    others = ("PYTHONPATH", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_ROOT")
    kept = {k: v for k, v in os.environ.items() if k not in others}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def repro(folder: Path, *, log: Path, again: str | None = None) -> subprocess.Popen[str]:
    """`dvc repro`, as the leader of a process group of its own; its output is added to `log`.

    Args:
        again: run this stage alone, whether or not something changed.
    """
    command = ["dvc", "repro", *(["--force", "--single-item", again] if again else [])]
    with log.open("a") as out:
        return subprocess.Popen(
            command, cwd=folder, env=environment(), stdout=out, stderr=out,
            start_new_session=True, text=True,
        )  # fmt: skip


def finish(dvc: subprocess.Popen[str], log: Path) -> None:
    """Wait until dvc ends, which it must do without an error."""
    if dvc.wait():
        raise SystemExit(f"dvc repro failed:\n{log.read_text()[-3000:]}")


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but those that DVC, MLflow and Python keep to themselves.

    What MLflow stores has times in it.
    """
    ours = (
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not {".git", ".dvc", "__pycache__"} & set(path.parts)
        and path.parent.name != ".checkpoints"  # a lock that nobody holds; the next stage sweeps it
    )
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in ours
        if not path.name.startswith("mlflow.db")
    }
