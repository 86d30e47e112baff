"""Which hosts a process and the processes that it starts ask without a proxy."""

import os
import urllib.request

import pytest

from vla_opd.machine import proxies


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*proxies.EXCEPTIONS, proxies.BEFORE, "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_what_was_bypassed_is_restored_with_this_machine_excepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "cluster.local, localhost")
    proxies.bypass()
    assert urllib.request.proxy_bypass("127.0.0.1")
    assert urllib.request.proxy_bypass("elsewhere.example")
    proxies.bypass()  # again, as a flow within a flow does
    theirs = proxies.restored(os.environ)
    assert theirs["no_proxy"] == theirs["NO_PROXY"] == "cluster.local,localhost,127.0.0.1,::1"
    assert theirs["http_proxy"] == "http://proxy:3128"


def test_a_user_who_excepts_nothing_excepts_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxies.restored({})["no_proxy"] == "127.0.0.1,localhost,::1"
    monkeypatch.setenv("no_proxy", "*")
    proxies.bypass()
    assert proxies.restored(os.environ)["no_proxy"] == "*,127.0.0.1,localhost,::1"
