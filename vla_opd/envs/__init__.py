"""Environments: a simulated scene that a policy acts in, a chunk of actions at a time.

`ENVS` names the families that ship with the package; any other is `"package.module:function"` in `params.yaml`.
A family is one function from `EnvironmentParams` to an `Env`; all of a simulator's quirks stay in that family's file.
"""

from collections.abc import Callable

from vla_opd.envs import metaworld
from vla_opd.envs.libero import env
from vla_opd.envs.protocol import Advance, Env, Observation, Placement, Split
from vla_opd.params.stages import EnvironmentParams
from vla_opd.plugins import named_function

__all__ = ["ENVS", "Advance", "Env", "Observation", "Placement", "Split", "make_env"]

ENVS: dict[str, Callable[[EnvironmentParams], Env]] = {
    "libero": env.make,
    "metaworld": metaworld.make,
}


def make_env(params: EnvironmentParams) -> Env:
    """The environment that `params.family` names. Heavy imports happen here, in the process that will own the simulator."""
    return named_function(params.family, ENVS, "environment.family")(params)
