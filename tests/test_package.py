"""The package itself: its public names, and what importing them costs."""

import subprocess
import sys

import nemo


def test_decompose_stays_a_function_whatever_is_imported():
    for _ in range(2):
        assert callable(nemo.decompose)
        assert not isinstance(nemo.decompose, type(sys))
        assert callable(nemo.load)  # imports modules of the package called decompose


def test_every_public_name_is_there():
    assert all(callable(getattr(nemo, name)) for name in nemo.__all__)


def test_reading_params_and_results_needs_no_torch_and_training_no_pandas():
    code = (
        "import sys; sys.modules['pandas'] = sys.modules['mlflow'] = sys.modules['dvc'] = None; "
        "import nemo, nemo.cli, nemo.tracking, nemo.config, nemo.layout; "
        "assert 'torch' not in sys.modules; import nemo.training.cell, nemo.training.finetune"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
