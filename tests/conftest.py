"""Two cores for two workers, and no network: a test brings or makes what it needs."""

import os
import socket

import pytest
import torch

# Two workers share two cores; with more threads than cores, OpenMP waits more than it works.
torch.set_num_threads(1)

# Processes that tests start find a closed port where a way out would be.
for name in ("http_proxy", "https_proxy", "all_proxy"):
    os.environ[name] = os.environ[name.upper()] = "http://127.0.0.1:9"
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"
os.environ["HF_HUB_OFFLINE"] = "1"

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
