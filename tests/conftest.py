"""Shapes and types are checked where tensors are: jaxtyping's annotations in these modules are enforced by beartype. Nowhere else."""

from jaxtyping import install_import_hook

CHECKED = ["arrays", "tokens", "objectives", "logits", "trajectory", "checkpoint"]

install_import_hook([f"vla_opd.{module}" for module in CHECKED], "beartype.beartype")
