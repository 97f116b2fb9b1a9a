"""The booted hosts of a test run: one Debian 12, one Debian 13, with mda as README says.

`host` is a host on which the README's first command has been run and the checkout is
gone; `agents` are more of them, each with a transport agent. A host that cannot be built,
booted or installed on fails the tests; none is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from hosts.agents import WAYS, start_agent
from hosts.host import SUITES, InstalledHost, free_port, start

Starting = dict[str, Future[InstalledHost]]


@pytest.fixture(scope="session")
def starting(request: pytest.FixtureRequest) -> Iterator[Starting]:
    """The hosts that this run needs, getting up side by side."""
    params = [
        item.callspec.params
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    ]
    # One that has a hub needs the other host too.
    wanted = {each.get("host") for each in params}
    wanted |= {name for name in SUITES if any("hub" in each for each in params)}
    with ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(start, name) for name in SUITES if name in wanted}
        yield futures
        for future in futures.values():
            if not future.exception():
                future.result().stop()


@pytest.fixture(scope="session", params=list(SUITES))
def host(request: pytest.FixtureRequest, starting: Starting) -> InstalledHost:
    """A booted host with mda installed and no checkout."""
    return starting[request.param].result()


@pytest.fixture(scope="module")
def port(host: InstalledHost) -> int:
    """A loopback port that `mda install --listen` has opened; the next module's own tests
    of installing may close it.
    """
    port = free_port()
    host.run(f"mda install --now --listen 127.0.0.1:{port}")
    return port


@pytest.fixture(scope="session")
def agents(request: pytest.FixtureRequest) -> Iterator[Starting]:
    """The hosts of the transport agents that this run needs, getting up side by side."""
    ways = {
        item.callspec.params.get("handover")
        for item in request.session.items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    }
    wanted = {name for way, (name, _) in WAYS.items() if way in ways}
    with ThreadPoolExecutor() as pool:
        futures = {name: pool.submit(start_agent, name) for name in wanted}
        yield futures
        for future in futures.values():
            if not future.exception():
                future.result().stop()
