"""Addresses and ports: resolves the host, checks before Java starts that ports are free, finds free ones."""

from __future__ import annotations

import errno
import random
import socket
from pathlib import Path

from server.failures import Failure, UsageFailure

FIRST_WORKER_PORT, LAST_WORKER_PORT = 9000, 60000
LOWEST_CHOSEN_PORT = 20000
GIVEN_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")  # To outgoing connections.


def resolve_host(host: str) -> str:
    """Return the IPv4 address of a host name; TorchServe's gRPC listener takes nothing else.

    Raises:
        UsageFailure: The name has no IPv4 address.
    """
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise UsageFailure(f"--host {host} is no IPv4 address and no name that has one ({error.strerror})") from error


def reachable(address: str) -> str:
    """Return the address by which a client on this machine reaches a listener on `address`."""
    return "127.0.0.1" if address == "0.0.0.0" else address  # noqa: S104  (compared, not bound)


def claim_port(address: str, port: int, option: str) -> int:
    """Return a port that can be listened on, a free one for 0; for arguments and errors see `listen`."""
    with listen(address, port, option) as probe:
        return int(probe.getsockname()[1])


def listen(address: str, port: int, option: str) -> socket.socket:
    """Return a socket that listens on a port.

    Args:
        address: IPv4 address to listen on.
        port: The port, or 0 for a free one.
        option: The option that sets the port, for messages.

    Raises:
        Failure: The port is taken or may not be used.
    """
    listener = socket.socket()
    try:
        # As Java does: a port is free although its last connections are in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port or _choose(address)))
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise Failure(
                f"port {port} on {address} is in use by another program: stop that, or choose another with {option}"
            ) from error
        if error.errno == errno.EACCES:
            raise Failure(f"port {port} may not be used by this user: choose one above 1023 with {option}") from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise UsageFailure(f"{address} is not an address of this machine: choose another with --host") from error
        raise Failure(f"port {port} on {address} cannot be used ({error.strerror}): see {option}") from error
    return listener


def _choose(address: str) -> int:
    """Return a free port outside the range of outgoing connections; 0 if there is none."""
    try:
        first_given = int(GIVEN_PORTS.read_text().split()[0])
    except OSError:  # Not Linux.
        return 0
    candidates = range(LOWEST_CHOSEN_PORT, first_given)
    return next((port for port in random.sample(candidates, min(50, len(candidates))) if _is_free(port, address)), 0)


def free_worker_ports(count: int) -> int:
    """Return the first of `count` consecutive ports that are free on 127.0.0.1.

    TorchServe names the sockets of its workers after them, and listens on them on systems without unix sockets.
    """
    for first in range(FIRST_WORKER_PORT, LAST_WORKER_PORT, count):
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise Failure(f"no {count} neighbouring ports are free on 127.0.0.1 for the workers")


def _is_free(port: int, address: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True
