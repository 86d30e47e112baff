"""What a scripted expert is."""

from typing import Protocol

import numpy as np
from jaxtyping import Float32


class Expert(Protocol):
    """A closed-loop controller for one environment. It may read everything that the simulator knows."""

    def reset(self) -> None:
        """Plan for the episode that the environment has just been reset to. Deterministic."""
        ...

    def act(self) -> Float32[np.ndarray, "A"]:
        """The next action, from the simulator's present state (so it recovers from whatever was executed meanwhile)."""
        ...
