"""A sweep of tau in DVC's queue, by two workers: nothing clashes, and each runs its own code.

    python -m benchmarks.sweep

In a fresh clone with a tiny training, `dvc exp run --queue` takes four values of tau and two
workers compute them, each in a copy of its own, from nothing: so both train the standard cell, and
wait for one another where they would share a checkpoint. It fails unless all four succeed with
results that differ, with the project's code rather than an installed one, with no epoch twice in
the MLflow store that they share, and with no checkpoint left. Epochs may be missing there, since so
short a training does not wait for a store that is still being made; `nemo publish` adds them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.clones import ROOT, clone, environment

TAUS = (0.1, 0.2, 0.3, 0.5)
# Appended to the clone's nemo, and not committed: each process says which nemo it runs.
TRACE = """
import os as _os
with open(_os.environ["NEMO_TRACE"], "a") as _file:
    _file.write(f"{__file__}\\n")
"""


class Project:
    """Runs DVC in a clone as someone would for whom another checkout of nemo is installed."""

    def __init__(self, folder: Path) -> None:
        self.root = clone(folder / "project", None)
        with (self.root / "nemo/__init__.py").open("a") as file:
            file.write(TRACE)
        self.trace = folder / "trace"
        traced = {"PYTHONPATH": str(ROOT), "NEMO_TRACE": str(self.trace), "OMP_NUM_THREADS": "1"}
        self.environment = environment() | traced

    def dvc(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "dvc", *arguments]
        done = subprocess.run(
            command, cwd=self.root, env=self.environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"dvc {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def sweep(self, limit: float) -> None:
        """Queue the values of tau, and let two workers compute them."""
        self.dvc("exp", "run", "--queue", "-S", f"loss.tau={','.join(map(str, TAUS))}")
        until = time.monotonic() + limit
        self.dvc("queue", "start", "-j", "2")
        while re.search("Queued|Running", status := self.dvc("queue", "status")):
            if time.monotonic() > until:
                self.dvc("queue", "stop", "--kill")
                sys.exit(f"not done after {limit:.0f} s:\n{status}")
            time.sleep(3)
        print(status)
        for name in re.findall(r"(\S+)\s+\S+\s+\S*\s*Failed", status):
            print(self.dvc("queue", "logs", name))

    def results(self) -> dict[float, dict[str, Any]]:
        """tau to the metrics of its experiment."""
        found = {}
        for baseline in json.loads(self.dvc("exp", "show", "--json")):
            for experiment in baseline["experiments"] or ():
                data = experiment["revs"][0]["data"]
                tau = data["params"]["params.yaml"]["data"]["loss"]["tau"]
                found[tau] = next(iter(data["metrics"].values()))["data"]
        return found


def check(project: Project) -> list[str]:
    """What is wrong; nothing, if all is well."""
    wrong = []
    results = project.results()
    for tau, metrics in results.items():
        print(f"tau {tau}: {json.dumps(metrics)}")
    if sorted(results) != sorted(TAUS):
        wrong.append(f"experiments that succeeded: {sorted(results)}, queued: {sorted(TAUS)}")
    if len({json.dumps(metrics) for metrics in results.values()}) < len(TAUS):
        wrong.append("two values of tau have the same results")
    copies = project.root / ".dvc/tmp/exps"
    ran = {Path(line) for line in project.trace.read_text().splitlines()}
    print(f"{len(ran)} copies of nemo ran")
    if foreign := sorted(str(file) for file in ran if copies not in file.parents):
        wrong.append(f"code from elsewhere ran: {foreign}")
    if len(ran) < 2:
        wrong.append("only one copy of the project was at work")
    curves = curves_of(project.root)
    print(f"epochs in MLflow by tau: {curves}")
    if any(len(set(epochs)) < len(epochs) for epochs in curves.values()):
        wrong.append("an epoch is in MLflow twice")
    if left := [path.name for path in (project.root / ".checkpoints").iterdir() if path.is_dir()]:
        wrong.append(f"checkpoints are left: {left}")
    return wrong


def curves_of(root: Path) -> dict[str, list[int]]:
    """tau to the epochs that its training logged to the project's store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{root}/mlflow.db")
    experiment = client.get_experiment_by_name("nemo")
    if experiment is None:  # every training was over before MLflow had made its database
        return {}
    runs = client.search_runs(
        [experiment.experiment_id], "tags.role = 'cell' and tags.method = 'nemo'"
    )
    return {
        run.data.params["loss.tau"]: sorted(
            metric.step for metric in client.get_metric_history(run.info.run_id, "loss")
        )
        for run in runs
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--limit", type=float, default=1800, help="seconds that the queue may take")
    limit = parser.parse_args().limit
    with tempfile.TemporaryDirectory() as folder:
        project = Project(Path(folder))
        start = time.monotonic()
        project.sweep(limit)
        wrong = check(project)
        print(f"{time.monotonic() - start:.0f} s")
    sys.exit("\n".join(wrong) or 0)


if __name__ == "__main__":
    main()
