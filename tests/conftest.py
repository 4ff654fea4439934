"""Every test runs offline and from the same random state."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per pytest-xdist worker; read when torch is imported

import pytest
import torch

from ldm.util import trust
from tests.golden import agreement

_LOCAL = ("localhost", "127.0.0.1", "::1", "", None)


class NetworkBlocked(RuntimeError):
    """A test tried to reach the network. Not an OSError: libraries retry those or fall back in silence."""


def _guard(original, host_of):
    def call(*args, **kwargs):
        if (host := host_of(args)) not in _LOCAL:
            raise NetworkBlocked(f"tests run offline, but something asked for {host!r}")
        return original(*args, **kwargs)

    return call


def _address_host(args: tuple) -> str | None:
    address = args[1]
    return address[0] if isinstance(address, tuple) else None  # a Unix socket's address is a path


@pytest.fixture(scope="session", autouse=True)
def _offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _guard(socket.socket.connect, _address_host))
        patch.setattr(socket.socket, "connect_ex", _guard(socket.socket.connect_ex, _address_host))
        patch.setattr(socket, "getaddrinfo", _guard(socket.getaddrinfo, lambda args: args[0]))
        yield


@pytest.fixture(scope="session", autouse=True)
def _trusted() -> None:
    trust("tests")  # whose own classes configs of the tests name


@pytest.fixture(autouse=True)
def _same_random_state() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:
    """Merge the differences that a pytest-xdist worker found into those of this process."""
    for module, found in getattr(node, "workeroutput", {}).get("agreement", {}).items():
        agreement[module] = max(found, agreement.get(module, 0.0))


def pytest_sessionfinish(session) -> None:
    """Send the differences found by a pytest-xdist worker to the main process."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["agreement"] = dict(agreement)


def pytest_terminal_summary(terminalreporter) -> None:
    """Print the largest difference from the reference for each test module."""
    if agreement:
        terminalreporter.section("largest difference from the reference")
        for module, found in sorted(agreement.items()):
            terminalreporter.write_line(f"{found:.1e}  {module}")
