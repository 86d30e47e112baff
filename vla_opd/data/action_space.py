"""Actions <-> bins: OpenVLA-OFT's discretisation.

With V bins, `edges = linspace(-1, 1, V)` has V - 1 centres. A normalised action x in [-1, 1] falls
in bin `digitize(x, edges) - 1` of 0 ... V-1, ascending in x; the last bin holds x = 1 alone and
decodes like its neighbour. OpenVLA numbers the same bins downwards: token id = vocabulary size -
1 - bin.
Source: OpenVLA-OFT, `ActionTokenizer` (ids 31744 ... 31999 of a vocabulary of 32000).
"""

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int16
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vla_opd.artifacts.manifest import canonical_json, sha256

RANGE_FLOOR = 1e-8  # added to q99 - q01, as the original does


class ActionSpace(BaseModel):
    """The meaning of a token: the statistics, bins and chunk of a checkpoint.

    Token distributions can be compared if the digests of their action spaces are equal.

    q01, q99:   1st and 99th percentile of each of the A action dimensions, in the environment's
                units.
    normalised: dimensions scaled by them; the others (a gripper in [-1, 1]) pass through.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    q01: tuple[float, ...]
    q99: tuple[float, ...]
    normalised: tuple[bool, ...]
    chunk: int = Field(ge=1)
    bins: int = Field(default=256, ge=2)

    @model_validator(mode="after")
    def _require_consistent(self) -> "ActionSpace":
        fields = (self.q01, self.q99, self.normalised)
        lengths = [len(values) for values in fields]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"q01, q99 and normalised have {lengths} entries; expected one per action dimension"
            )
        if np.greater(self.q01, self.q99).any():
            raise ValueError(
                f"q01 is {self.q01} and q99 is {self.q99};"
                " expected q01 to be at most q99 in each dimension"
            )
        return self

    @property
    def action_dim(self) -> int:
        """A."""
        return len(self.q01)

    @property
    def tokens(self) -> int:
        """K = S * A, tokens per decision."""
        return self.chunk * self.action_dim

    @property
    def constant(self) -> Bool[np.ndarray, " A"]:
        """The normalised dimensions that never vary."""
        return np.logical_and(
            self.normalised,
            np.equal(self.q01, self.q99),
        )

    @property
    def digest(self) -> str:
        """sha256 of the statistics, bins and chunk."""
        fields = self.model_dump()
        return sha256(canonical_json(fields))

    @property
    def edges(self) -> Float[np.ndarray, " V"]:
        """linspace(-1, 1, V)."""
        return np.linspace(-1.0, 1.0, self.bins)

    @property
    def _centres(self) -> Float[np.ndarray, " centres"]:
        """The V - 1 centres."""
        edges = self.edges
        return 0.5 * (edges[:-1] + edges[1:])

    @property
    def _span(self) -> Float64[np.ndarray, " A"]:
        """q99 - q01 + 1e-8."""
        difference = np.subtract(self.q99, self.q01)
        return difference + RANGE_FLOOR

    def encode(self, actions: Float[np.ndarray, "*B S A"]) -> Int16[np.ndarray, "*B K"]:
        """Convert actions in the environment's units to bins, row-major [step][dimension].

        Out-of-range actions are clipped. A normalised dimension that never varies is 0 in the
        original's training data, and so in the middle bin, whatever the action. The original
        detects such a dimension by min = max; among the statistics kept here, q01 = q99 is nearest
        to that.
        """
        precise = actions.astype(np.float64)
        fraction = 2.0 * (precise - self.q01) / self._span
        normalised = fraction - 1.0
        scaled = np.where(self.normalised, normalised, actions)
        scaled = np.where(self.constant, 0.0, scaled)
        clipped = np.clip(scaled, -1.0, 1.0)
        bins = np.digitize(clipped, self.edges) - 1
        batch = actions.shape[:-2]
        row_major = bins.reshape(*batch, self.tokens)
        return row_major.astype(np.int16)

    def decode(self, bins: Int[np.ndarray, "*B K"]) -> Float32[np.ndarray, "*B S A"]:
        """Convert bins to actions.

        a = 0.5 (x + 1) (q99 - q01 + 1e-8) + q01 of the bin's centre x where normalised, x
        elsewhere.
        """
        last = self.bins - 2
        numbers = np.clip(bins, 0, last)
        batch = bins.shape[:-1]
        x = self._centres[numbers]
        x = x.reshape(*batch, self.chunk, self.action_dim)
        fraction = 0.5 * (x + 1.0)
        scaled = fraction * self._span + self.q01
        actions = np.where(self.normalised, scaled, x)
        return actions.astype(np.float32)


def fit_action_space(actions: Float[np.ndarray, "L A"], chunk: int, bins: int) -> ActionSpace:
    """Compute the statistics of some actions.

    The last dimension is the gripper and passes through, as in LIBERO's and Meta-World's data.
    """
    precise = actions.astype(np.float64)
    q01, q99 = np.quantile(precise, [0.01, 0.99], axis=0)
    arm_dims = actions.shape[1] - 1
    return ActionSpace(
        q01=tuple(q01),
        q99=tuple(q99),
        normalised=(True,) * arm_dims + (False,),
        chunk=chunk,
        bins=bins,
    )


def gaussian_logits(bins: int, sigma: float) -> Float32[np.ndarray, "V V"]:
    """Row v: -(u - v)^2 / (2 sigma^2) for every bin u, the logits of a Gaussian around bin v."""
    index = np.arange(bins, dtype=np.float32)
    distance = np.subtract.outer(index, index)
    variance = sigma**2
    return -(distance**2) / (2 * variance)
