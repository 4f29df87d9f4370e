"""Do two fresh clones give the same bytes?

    python -m benchmarks.same_bytes                         # a small pipeline, twice
    python -m benchmarks.same_bytes --write                 # and writes reports/same_bytes.md
    python -m benchmarks.same_bytes --params params.yaml    # the default pipeline, twice
    python -m benchmarks.same_bytes --params profiles/cifar10-cpu.yaml -S 'models=[vgg16]' --write

Both run `dvc repro` on this machine with the same number of threads, one after the other.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.clones import clone, contents, finish, repro
from nemo.config import load_params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=Path, help="Params file; by default a small one.")
    parser.add_argument("-S", dest="changes", action="append", default=[], help="A param: a.b=c.")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in ("one", "other"):
            folder = clone(Path(temporary) / name, arguments.params, arguments.changes)
            log = folder.with_suffix(".log")
            finish(repro(folder, log=log), log)
            runs.append(contents(folder))
    profile = load_params(arguments.params).profile if arguments.params else "small"
    shown = [change for change in arguments.changes if ".source=" not in change]  # a place here
    pipeline = f"{arguments.params or 'the small one of benchmarks/clones.py'}"
    page = report(
        runs[0], runs[1], f"{pipeline} with {', '.join(shown)}" if shown else pipeline, profile
    )
    print(page)
    if arguments.write:
        end = f"-{profile}" if arguments.params else ""
        Path(f"reports/same_bytes{end}.md").write_text(page)
    if runs[0] != runs[1]:
        raise SystemExit("two clones differ")


def report(one: dict[str, str], other: dict[str, str], pipeline: str, profile: str) -> str:
    """What is the same, by group of files, and every file that is not."""
    groups = {
        "dvc.lock": "dvc.lock",
        "plan": "plan/",
        "prepared data": "data/",
        "trained cells, masks, modules": "runs/",
        "results": f"results/{profile}/",
        "report": f"reports/{profile}/",
    }
    names = sorted(one.keys() | other.keys())
    differ = [name for name in names if one.get(name) != other.get(name)]
    lines = [
        f"Two fresh clones, `dvc repro` in each. The pipeline is {pipeline}; "
        f"torch {torch.__version__.split('+')[0]}, CPU, threads: {torch.get_num_threads()}.\n",
        "| what | files | the same bytes |\n| --- | ---: | ---: |",
    ]
    for title, prefix in groups.items():
        count = [name.startswith(prefix) for name in names].count(True)
        same = count - [name.startswith(prefix) for name in differ].count(True)
        lines.append(f"| {title} | {count} | {same} |")
    lines += [f"\nDifferent: {name}" for name in differ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
