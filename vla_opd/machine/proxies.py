"""Proxies, through which nothing on this machine is asked, whatever variables name them: http_proxy, ALL_PROXY with a scheme of its own, ..."""

import os
from collections.abc import Mapping

EXCEPTIONS = (
    "no_proxy",
    "NO_PROXY",
)  # the variables that name the hosts which no proxy is asked for, in the order in which they count
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
BEFORE = "OPD_PROXY_EXCEPTIONS"  # keeps what they said, for the processes that have more to ask than this machine


def bypass() -> None:
    """Ask nothing through a proxy in this process. Processes that it starts get their proxies back with `restored`."""
    said = next((os.environ[name] for name in EXCEPTIONS if name in os.environ), "")
    os.environ.setdefault(BEFORE, said)
    os.environ.update(dict.fromkeys(EXCEPTIONS, "*"))


def restored(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment with the exceptions as they were before `bypass`, and this machine among them."""
    said = next((environment[name] for name in (BEFORE, *EXCEPTIONS) if name in environment), "")
    hosts = [host.strip() for host in said.split(",") if host.strip()]
    hosts += [host for host in THIS_MACHINE if host not in hosts]
    return {**environment, **dict.fromkeys(EXCEPTIONS, ",".join(hosts))}
