"""Every test runs offline and from the same random state."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import torch

from ldm.util import trust
from tests.golden import agreement

_LOCAL = ("localhost", "127.0.0.1", "::1", "", None)
_MANY_THREADS = 4  # small tensors get slower, not faster, beyond a few threads


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


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(min(torch.get_num_threads(), _MANY_THREADS))


@pytest.fixture(autouse=True)
def _same_random_state() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter) -> None:
    """How closely the numbers agree with the references, by test module: what the README's table quotes."""
    if agreement:
        terminalreporter.section("largest difference from the reference")
        for module, found in sorted(agreement.items()):
            terminalreporter.write_line(f"{found:.1e}  {module}")
