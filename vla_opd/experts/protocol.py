"""The protocol of a scripted expert."""

from typing import Protocol

import numpy as np
from jaxtyping import Float32


class Expert(Protocol):
    """A closed-loop controller for one environment, with access to the simulator's full state."""

    def reset(self) -> None:
        """Plan, deterministically, from the environment's current state.

        This is the start of an episode, or, for an expert that labels, any state of one.
        """
        ...

    def act(self) -> Float32[np.ndarray, "A"]:
        """Return the next action for the simulator's current state.

        The expert thus recovers from whatever was executed since the last action.
        """
        ...
