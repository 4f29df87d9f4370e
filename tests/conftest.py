"""Two cores for two workers, and no network: a test brings or makes what it needs."""

import gc
import os
import socket
import sys

import pytest
import torch

# Two workers share two cores; with more threads than cores, OpenMP waits more than it works.
torch.set_num_threads(1)

# Processes that tests start find a closed port where a way out would be.
for name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ[name] = os.environ[name.upper()] = "http://127.0.0.1:9"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module", autouse=True)
def what_is_loaded_is_not_searched_for_garbage():
    """`decompose` collects garbage; looking at all of torch's objects took a sixth of its time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def what_a_test_sets_does_not_slow_the_next_ones():
    """A benchmark takes all cores. With two threads, some tests took a hundred times as long."""
    yield
    torch.set_num_threads(1)


LOOPBACK = ("127.0.0.1", "localhost", "::1")


def only_loopback(connect):
    """`socket.connect` that fails the test where it would leave this machine."""

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            pytest.fail(f"a test must not need the network, this one wants {address}")
        return connect(self, address)

    return guarded


for method in ("connect", "connect_ex"):
    setattr(socket.socket, method, only_loopback(getattr(socket.socket, method)))


@pytest.fixture(scope="module")
def nothing_stays_registered():
    """What a plugin registers is gone with the module that uses this: other tests of this process
    know the names of the package only."""
    from nemo.alternatives import ALTERNATIVES
    from nemo.cut.rules.base import RULES
    from nemo.masking.objectives import OBJECTIVES
    from nemo.masking.selectors import SELECTORS
    from nemo.metrics import METRICS
    from nemo.models import MODELS
    from nemo.module.ops import OPS

    registries = (ALTERNATIVES, METRICS, MODELS, OBJECTIVES, OPS, RULES, SELECTORS)
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)
    for name in [name for name in sys.modules if name.startswith("nemo_plugin_")]:
        del sys.modules[name]
