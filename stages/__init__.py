"""What DVC runs: one short file per stage, each calling one command of `nemo`.

They are run as `python -m stages.NAME`, so that a temporary copy of the project (`dvc exp run
--temp` or `--queue`) imports its own `nemo` and not the one that is installed.
"""
