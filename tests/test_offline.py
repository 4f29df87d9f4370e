"""No test leaves this machine: conftest.py refuses, in the tests and in what they start."""

import socket
import subprocess
import sys

import pytest

FAR = "192.0.2.1"  # set aside for documentation, so that nothing is ever there


@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_a_test_that_connects_elsewhere_fails(method):
    with socket.socket() as far, pytest.raises(pytest.fail.Exception, match="the network"):
        getattr(far, method)((FAR, 80))


def test_loopback_is_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_a_process_that_a_test_starts_meets_a_closed_port():
    script = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=20)"
    for scheme in ("http", "https"):
        arguments = [sys.executable, "-c", script, f"{scheme}://{FAR}/"]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert "Connection refused" in done.stderr
