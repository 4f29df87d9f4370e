"""Kill the pipeline at random moments, start it again with `dvc repro`, and compare the end.

    python -m benchmarks.kills                         # 30 kills of a small pipeline, on a clone
    python -m benchmarks.kills --write                 # and writes reports/kills.md
    python -m benchmarks.kills --params params.yaml    # of the default pipeline

A fresh clone of the last commit runs once undisturbed. Then more clones run and are killed with
SIGKILL: the stage's process, the whole process group, or dvc alone, so that the stage lives on as
an orphan. The victims go round the stages; the moment is uniform within the time that the stage
took undisturbed. `dvc repro` at once follows each kill. Each clone must end with the dvc.lock and
the files of the undisturbed one, and no epoch that was finished may be trained again.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil

from benchmarks.clones import ROOT, clone, contents, finish, repro

STAGES = (
    "plan", "prepare", "train", "masks", "decompose", "finetune", "extra", "evaluate", "report",
)  # fmt: skip
KINDS = ("stage process", "process group", "dvc alone")
POLL = 0.003  # seconds between looks at the checkpoints; an epoch takes a hundred times as long


class Epochs:
    """Counts the epochs that are trained below `folder`, by the checkpoints that appear."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / ".checkpoints"
        self.seen: set[tuple[str, int, int]] = set()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Epochs:
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.thread.join()

    def _watch(self) -> None:
        while not self.stopped.wait(POLL):
            for file in self.folder.glob("*/last.pt"):
                try:
                    state = file.stat()
                except FileNotFoundError:
                    continue
                self.seen.add((file.parent.name, state.st_ino, state.st_mtime_ns))


@dataclass
class Pass:
    """One clone from nothing to the end."""

    lock: str
    files: dict[str, str]
    epochs: int
    stages: int  # that dvc started
    waited: int  # processes that found an orphan at work
    kills: list[str]  # the stages that were killed
    seconds: dict[str, list[float]]


def stage_of(process: psutil.Process) -> str | None:
    """The stage that a process runs, or None."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return None
    named = [w.removeprefix("stages.") for w in words if w.startswith("stages.")]
    return named[0] if named and not words[0].endswith("sh") else None


def stages_below(dvc: subprocess.Popen[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Each stage's process, once, until dvc ends."""
    seen = set()
    while dvc.poll() is None:
        try:
            children = psutil.Process(dvc.pid).children(recursive=True)
        except psutil.Error:
            continue
        for child in children:
            stage = stage_of(child)
            if stage is not None and child.pid not in seen:
                seen.add(child.pid)
                yield stage, child
        time.sleep(0.02)


def undisturbed(folder: Path, params: Path | None) -> Pass:
    """A run without a kill, with the seconds of each stage."""
    log = folder.with_suffix(".log")
    seconds: dict[str, list[float]] = defaultdict(list)
    with Epochs(clone(folder, params)) as epochs:
        dvc = repro(folder, log=log)
        for stage, process in stages_below(dvc):
            begin = time.monotonic()
            psutil.wait_procs([process])
            seconds[stage].append(time.monotonic() - begin)
        finish(dvc, log)
    return ended(folder, log, epochs, [], seconds)


def killed(
    folder: Path,
    params: Path | None,
    kind: str,
    victims: list[str],
    usual: Pass,
    draw: random.Random,
) -> Pass:
    """A run in which a process of each of the `victims` is killed, in the order they come.

    A stage that ended each time before its moment came runs again for it, once all is done; not a
    training, which would add epochs.
    """
    log, kills, again = folder.with_suffix(".log"), [], None
    with Epochs(clone(folder, params)) as epochs:
        while victims:
            stage = strike(kind, repro(folder, log=log, again=again), victims, usual, draw)
            if stage is None:
                victims = [victim for victim in victims if victim != "train"]
                again = victims[0] if victims else None
            else:
                again = None
                victims.remove(stage)
                kills.append(stage)
        finish(repro(folder, log=log), log)
    return ended(folder, log, epochs, kills, {})


def strike(
    kind: str, dvc: subprocess.Popen[str], victims: list[str], usual: Pass, draw: random.Random
) -> str | None:
    """Kill the first of the `victims` that runs until its moment comes; None where dvc ends."""
    for stage, process in stages_below(dvc):
        moment = draw.uniform(0, max(usual.seconds[stage]))
        if stage in victims and not psutil.wait_procs([process], timeout=moment)[0]:
            kill(kind, dvc, process)
            print(f"{kind}: {stage} after {moment:.1f} s", flush=True)
            return stage
    return None


def kill(kind: str, dvc: subprocess.Popen[str], process: psutil.Process) -> None:
    """SIGKILL, and wait until those that it hit are gone."""
    if kind == "stage process":
        process.kill()
    elif kind == "process group":
        os.killpg(dvc.pid, signal.SIGKILL)
    else:
        dvc.kill()
    dvc.wait()
    if kind != "dvc alone":
        psutil.wait_procs([process])


def ended(
    folder: Path, log: Path, epochs: Epochs, kills: list[str], seconds: dict[str, list[float]]
) -> Pass:
    text = log.read_text()
    return Pass(
        (folder / "dvc.lock").read_text(),
        contents(folder),
        len(epochs.seen),
        text.count("Running stage"),
        text.count("waiting for another process"),
        kills,
        seconds,
    )


def row(kind: str, run: Pass, usual: Pass) -> dict[str, object]:
    """What one kind of kill did."""
    more = run.epochs - usual.epochs
    same = run.lock == usual.lock and run.files == usual.files
    return {
        "killed": kind,
        **{stage: run.kills.count(stage) for stage in STAGES},
        "kills": len(run.kills),
        "finished epochs trained again": more,
        "orphans waited for": run.waited,
        "same dvc.lock and files": "yes" if same else "NO",
        "holds": same and more == 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--params", type=Path, help="Params file; by default a small one.")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    per_kind = -(-arguments.kills // len(KINDS))
    with tempfile.TemporaryDirectory() as temporary:
        usual = undisturbed(Path(temporary) / "undisturbed", arguments.params)
        print(f"undisturbed: {usual.stages} stages, {usual.epochs} epochs", flush=True)
        rows = []
        for kind in KINDS:
            # trainings are most of the time, so the kills that are left over go to them
            rounds, rest = divmod(per_kind, len(STAGES))
            victims = [*STAGES * rounds, *["train"] * rest]
            folder = Path(temporary) / kind.replace(" ", "-")
            run = killed(folder, arguments.params, kind, victims, usual, draw)
            rows.append(row(kind, run, usual))
            print(rows[-1], flush=True)
            for name in sorted(run.files.keys() | usual.files.keys()):
                if run.files.get(name) != usual.files.get(name):
                    print(f"different: {name}")
    page = report(pd.DataFrame(rows), usual, arguments)
    print(page)
    if arguments.write:
        (ROOT / "reports/kills.md").write_text(page)
    if not all(r["holds"] for r in rows):
        raise SystemExit("a kill was not made good")


def report(rows: pd.DataFrame, usual: Pass, arguments: argparse.Namespace) -> str:
    pipeline = arguments.params or "the small one of benchmarks/clones.py"
    return (
        f"{rows['kills'].sum()} kills with SIGKILL at random moments (seed {arguments.seed}), each "
        f"followed by `dvc repro`. The pipeline is {pipeline}: undisturbed, {usual.stages} stages "
        f"and {usual.epochs} epochs of training.\n\n"
        f"{rows.drop(columns='holds').to_markdown(index=False)}\n\n"
        "A killed training loses the epoch that was running, and no finished one. "
        "An orphan, of dvc killed alone, ends by itself; the stage that waits for it takes over "
        "its training, and does any other work once more.\n"
    )


if __name__ == "__main__":
    main()
