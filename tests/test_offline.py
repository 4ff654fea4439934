"""The guard in conftest.py works, so that a test that needs the network fails."""

from __future__ import annotations

import socket
import urllib.request

import pytest

from tests.conftest import NetworkBlocked


def test_hub_calls_are_refused():
    with pytest.raises(NetworkBlocked, match="huggingface.co"):
        urllib.request.urlopen("https://huggingface.co/api/models")
    with socket.socket() as sock, pytest.raises(NetworkBlocked, match="192.0.2.1"):
        sock.connect(("192.0.2.1", 80))


def test_local_sockets_work():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()
