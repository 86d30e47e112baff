"""The hosts that a process, and the processes that it starts, reach without a proxy."""

import os
import urllib.request

import pytest

from vla_opd.machine import proxies


@pytest.fixture(autouse=True)
def _without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*proxies.EXCEPTIONS, proxies.SAVED, "http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_exceptions_are_restored_and_include_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", "cluster.local, localhost")
    proxies.bypass()
    assert urllib.request.proxy_bypass("127.0.0.1")
    assert urllib.request.proxy_bypass("elsewhere.example")
    proxies.bypass()  # again, as a flow within a flow does
    restored = proxies.restore(os.environ)
    assert restored["no_proxy"] == restored["NO_PROXY"] == "cluster.local,localhost,127.0.0.1,::1"
    assert restored["http_proxy"] == "http://proxy:3128"


def test_this_machine_is_an_exception_even_without_a_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert proxies.restore({})["no_proxy"] == "127.0.0.1,localhost,::1"
    monkeypatch.setenv("no_proxy", "*")
    proxies.bypass()
    assert proxies.restore(os.environ)["no_proxy"] == "*,127.0.0.1,localhost,::1"
