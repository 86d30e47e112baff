"""Proxy settings: this process bypasses every proxy, however it is configured.

Clearing `http_proxy` would not be enough: `ALL_PROXY` and variables of other schemes count too.
"""

import os
from collections.abc import Mapping

EXCEPTIONS = ("no_proxy", "NO_PROXY")  # variables that list hosts without a proxy, by precedence
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
SAVED = "OPD_PROXY_EXCEPTIONS"  # keeps the user's exceptions for processes started from here


def bypass() -> None:
    """Use no proxy in this process. `restore` gives the proxies back to the processes it starts."""
    os.environ.setdefault(SAVED, _first_set(os.environ, EXCEPTIONS))
    os.environ.update(dict.fromkeys(EXCEPTIONS, "*"))


def restore(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment with the exceptions from before `bypass`, plus this machine."""
    exceptions = _first_set(environment, (SAVED, *EXCEPTIONS))
    hosts = map(str.strip, exceptions.split(","))
    distinct = dict.fromkeys([*hosts, *THIS_MACHINE])
    distinct.pop("", None)
    value = ",".join(distinct)
    return {**environment, **dict.fromkeys(EXCEPTIONS, value)}


def _first_set(environment: Mapping[str, str], names: tuple[str, ...]) -> str:
    for name in names:
        if name in environment:
            return environment[name]
    return ""
