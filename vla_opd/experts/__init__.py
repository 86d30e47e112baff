"""Scripted experts: from privileged simulator state to one action.

They make demonstrations and, on request, labels; they never act for a student.
"""

from collections.abc import Callable
from typing import Any

from vla_opd.experts import metaworld
from vla_opd.experts.libero import expert
from vla_opd.experts.protocol import Expert
from vla_opd.plugins import named_function

__all__ = ["EXPERTS", "Expert", "make_expert"]

EXPERTS: dict[str, Callable[[Any], Expert]] = {
    "libero": expert.make,
    "metaworld": metaworld.make,
}
"""Each takes its own family's `Env`, whose privileged attributes it reads."""


def make_expert(name: str, env: object) -> Expert:
    """Make a scripted expert for one environment.

    name: a key of `EXPERTS`, or `"package.module:function"`.
    """
    return named_function(name, EXPERTS, "demonstrate.expert")(env)
