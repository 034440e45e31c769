"""Ranks on hosts of their own, joined by links as slow as one wants: network namespaces on this machine.

Every rank gets a namespace with one device, ``wire``, and the devices meet at a bridge in a namespace of its own.
Nothing of this machine's own network is touched. A rank shapes what it sends with a token bucket at its device, so
that what it receives is as fast as its peer may send.

Takes Linux, iproute2 and the right to administrate networks (root).
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.ranks import Place
from hydra_dist.errors import RunError

DEVICE = "wire"
NETWORK = "10.213.77"
PREFIX = "hydra-dist"
BURST_BYTES = 128 * 1024
"""Of the token bucket: sent at full speed after a pause. More than the largest packet that the kernel hands over."""
QUEUE_MILLISECONDS = 1000
"""How long a packet may wait for its turn before it is dropped; so long that nothing is."""


@dataclass(frozen=True)
class Hosts:
    """Namespaces that can reach each other."""

    places: tuple[Place, ...]
    address: str
    """Of the first one."""


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """``count`` namespaces, not shaped yet; gone when the block is left, however it is left.

    Raises RunError where this machine does not let one make them.
    """
    _remove_orphans()
    mine = [f"{PREFIX}-{os.getpid()}-{index}" for index in range(count)]
    switch = f"{PREFIX}-{os.getpid()}-switch"
    made: list[str] = []
    try:
        for name in (switch, *mine):
            _ip("netns", "add", name)
            made.append(name)
        _ip("-n", switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", switch, "link", "set", "dev", "switch", "up")
        for index, name in enumerate(mine):
            port = f"port{index}"
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", DEVICE, "netns", name)
            _ip("-n", switch, "link", "set", "dev", port, "master", "switch", "up")
            _ip("-n", name, "address", "add", f"{NETWORK}.{index + 1}/24", "dev", DEVICE)
            _ip("-n", name, "link", "set", "dev", DEVICE, "up")
            _ip("-n", name, "link", "set", "dev", "lo", "up")
        environment = {"GLOO_SOCKET_IFNAME": DEVICE}
        yield Hosts(tuple(Place(("ip", "netns", "exec", name), environment) for name in mine), f"{NETWORK}.1")
    finally:
        left = [name for name in made if not _deleted(name)]
        if left:
            raise RunError(f"could not be removed: {', '.join(f'ip netns delete {name}' for name in left)}")


def left_out() -> str | None:
    """Why this machine has no such links, or None. Tries it."""
    if not (shutil.which("ip") and shutil.which("tc")):
        return "iproute2 (ip and tc) is not installed"
    try:
        with hosts(1) as made:
            shape_command = [*made.places[0].prefix, *_shape(1e9)]
            done = subprocess.run(shape_command, capture_output=True, text=True, check=False)
            return f"links cannot be shaped: {done.stderr.strip()}" if done.returncode else None
    except RunError as error:
        return f"network namespaces cannot be made: {error}"


def shape(bits_per_second: float) -> None:
    """Limit what this host sends. Called by a rank, in its namespace."""
    _run(*_shape(bits_per_second))


def _shape(bits_per_second: float) -> list[str]:
    bucket = ["rate", f"{bits_per_second:.0f}bit", "burst", str(BURST_BYTES), "latency", f"{QUEUE_MILLISECONDS}ms"]
    return ["tc", "qdisc", "replace", "dev", DEVICE, "root", "tbf", *bucket]


def _ip(*arguments: str) -> str:
    return _run("ip", *arguments)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RunError(f"{' '.join(command)}: {error.strerror}") from None
    if done.returncode:
        raise RunError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _deleted(name: str) -> bool:
    try:
        _ip("netns", "delete", name)
    except RunError:
        return False
    return True


def _remove_orphans() -> None:
    """Remove what a run left that was killed before it could."""
    for line in _ip("netns", "list").splitlines():
        found = re.match(rf"({PREFIX}-(\d+)-\w+)\b", line)
        if found and not _alive(int(found[2])):
            _ip("netns", "delete", found[1])


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
