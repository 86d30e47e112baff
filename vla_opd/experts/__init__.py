"""Scripted experts: privileged simulator state in, one action out. They make demonstrations, and label if asked; they never act for a student."""

from collections.abc import Callable
from typing import Any

from vla_opd.experts import metaworld
from vla_opd.experts.libero import expert
from vla_opd.experts.protocol import Expert
from vla_opd.plugins import named_function

__all__ = ["EXPERTS", "Expert", "make_expert"]

EXPERTS: dict[
    str, Callable[[Any], Expert]
] = {  # each takes its own family's Env, whose privileged attributes it reads
    "libero": expert.make,
    "metaworld": metaworld.make,
}


def make_expert(name: str, env: object) -> Expert:
    """The scripted expert called `name` (a key of `EXPERTS`, or `"package.module:function"`), bound to one environment."""
    return named_function(name, EXPERTS, "demonstrate.expert")(env)
