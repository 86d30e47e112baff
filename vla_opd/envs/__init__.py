"""Environments: simulated scenes in which a policy acts, one chunk of actions at a time.

`ENVS` lists the families that ship with the package; `params.yaml` can name any other as
`"package.module:function"`. A family is one function from `EnvironmentParams` to an `Env`; all of a
simulator's quirks stay in that family's modules.
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
    """Make an environment of the family `params.family`.

    The simulator is imported here, in the process that will own it.
    """
    return named_function(params.family, ENVS, "environment.family")(params)
