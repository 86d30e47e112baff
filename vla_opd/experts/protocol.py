"""What a scripted expert is."""

from typing import Protocol

import numpy as np
from jaxtyping import Float32


class Expert(Protocol):
    """A closed-loop controller for one environment. It may read everything that the simulator knows."""

    def reset(self) -> None:
        """Plan from the environment's present state, deterministically: the beginning of an episode, or, if it is to label, any state of one."""
        ...

    def act(self) -> Float32[np.ndarray, "A"]:
        """The next action, from the simulator's present state (so it recovers from whatever was executed meanwhile)."""
        ...
