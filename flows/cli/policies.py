"""Commands on checkpoints: compare with the original OpenVLA-OFT, export to its format."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from flows.cli.app import ArtifactName, app, find_artifact, on_project
from vla_opd.machine.host import METRICS, resolve_host

if TYPE_CHECKING:
    from vla_opd.policies.openvla_oft.parity import Comparison

UnnormKey = Annotated[
    str | None,
    typer.Option(help="key of the action statistics, if the checkpoint has several"),
]


@app.command()
@on_project
def parity(
    checkpoint: Annotated[Path, typer.Argument(help="a folder in OpenVLA-OFT's public format")],
    inputs: Annotated[Path, typer.Argument(metavar="INPUTS.npz", help="images and prompts")],
    reference: Annotated[
        Path,
        typer.Argument(metavar="REFERENCE.npz", help="the original's outputs for these inputs"),
    ],
    unnorm_key: UnnormKey = None,
    crop: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1,
            help="fraction of the image area that is kept; 1 if it was trained without crops",
        ),
    ] = 0.9,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0,
            help="of features, logits and log-probabilities; integers must be equal",
        ),
    ] = 5e-4,
    device: Annotated[str, typer.Option(help="torch device of this implementation")] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        typer.Option(help="precision of this implementation"),
    ] = "float32",
    out: Annotated[
        Path | None, typer.Option("--out", help="write this implementation's arrays to this file")
    ] = None,
) -> None:
    """Compare this OpenVLA-OFT with the original, array by array.

    Exit code 1 if an array differs by more than allowed.
    """
    import torch

    from vla_opd.policies.openvla_oft.model import from_public
    from vla_opd.policies.openvla_oft.parity import compare_files

    precision = getattr(torch, dtype)
    torch_device = resolve_host(None, device, "none", METRICS).device
    policy = from_public(checkpoint, unnorm_key, precision, crop).to(torch_device)
    comparison = compare_files(policy, inputs, reference, tolerance, out)
    _print_comparison(comparison)
    if not all(array.holds for array in comparison.compared):
        raise typer.Exit(1)


def _print_comparison(comparison: "Comparison") -> None:
    from flows.cli import answers

    rows: list[tuple[str, ...]] = []
    for array in comparison.compared:
        difference = f"{array.difference:.1e}"
        tolerance = f"{array.tolerance:.0e}"
        rows.append((array.name, difference, tolerance, array.verdict))
    print(answers.table(["array", "largest difference", "allowed", ""], rows))
    if comparison.unmatched:
        print(f"  of the reference, not compared: {', '.join(comparison.unmatched)}")


@app.command()
@on_project
def export(
    artifact: ArtifactName,
    out: Annotated[Path, typer.Argument(help="a new folder")],
    like: Annotated[
        Path, typer.Option(metavar="FOLDER", help="the public checkpoint that it came from")
    ],
    unnorm_key: UnnormKey = None,
) -> None:
    """Write an OpenVLA-OFT checkpoint in the public format, with its adapter merged."""
    from vla_opd.lineage.store import read_store
    from vla_opd.policies.checkpoint import open_checkpoint
    from vla_opd.policies.openvla_oft.export import to_public

    checkpoint = open_checkpoint(find_artifact(read_store(), artifact).folder)
    to_public(checkpoint, like, out, unnorm_key)
    print(f"  {out}: {checkpoint.folder}, {checkpoint.digest[:12]}")
