"""Commands on checkpoints: compare with the original, write in its layout."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows.cli.app import Wanted, app, find_artifact
from vla_opd.machine.host import METRICS, this_host


@app.command()
def parity(
    checkpoint: Annotated[Path, typer.Argument(help="a folder in OpenVLA-OFT's public layout")],
    inputs: Annotated[Path, typer.Argument(metavar="INPUTS.npz", help="pictures and prompts")],
    reference: Annotated[
        Path, typer.Argument(metavar="REFERENCE.npz", help="what the original makes of them")
    ],
    unnorm_key: Annotated[
        str | None, typer.Option(help="whose statistics the actions have, if there are several")
    ] = None,
    crop: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1,
            help="share of a picture's area that is seen; 1 if it was trained without crops",
        ),
    ] = 0.9,
    tolerance: Annotated[
        float,
        typer.Option(
            min=0, help="of features, logits and log-probabilities; what is counted is to be equal"
        ),
    ] = 5e-4,
    device: Annotated[str, typer.Option(help="where ours is computed, as torch says it")] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="and in which precision")
    ] = "float32",
    out: Annotated[Path | None, typer.Option("--out", help="write our arrays to this file")] = None,
) -> None:
    """Whether OpenVLA-OFT as it is here computes what the original does, step by step. Exit code 1 if an array is farther off than it may be."""
    import torch

    from flows.cli import answers
    from vla_opd.policies.openvla_oft import parity
    from vla_opd.policies.openvla_oft.model import from_public

    where = this_host(None, device, "none", METRICS).device
    policy = from_public(checkpoint, unnorm_key, getattr(torch, dtype), crop).to(where)
    found = parity.of_files(policy, inputs, reference, tolerance, out)
    told = [
        (one.name, f"{one.difference:.1e}", f"{one.tolerance:.0e}", one.verdict)
        for one in found.compared
    ]
    print(answers.rows(["array", "largest difference", "allowed", ""], told))
    if found.left:
        print(f"  of the reference, not compared: {', '.join(found.left)}")
    if not all(one.holds for one in found.compared):
        raise typer.Exit(1)


@app.command()
def export(
    artifact: Wanted,
    out: Annotated[Path, typer.Argument(help="a new folder")],
    like: Annotated[
        Path, typer.Option(metavar="FOLDER", help="the public checkpoint that it came from")
    ],
    unnorm_key: Annotated[
        str | None, typer.Option(help="whose statistics the actions have, if there are several")
    ] = None,
) -> None:
    """Write an OpenVLA-OFT checkpoint in the public layout, its adapter merged, for the original's own code."""
    from vla_opd.lineage import store
    from vla_opd.policies.checkpoint import open_checkpoint
    from vla_opd.policies.openvla_oft.export import to_public

    checkpoint = open_checkpoint(find_artifact(store.read_store(), artifact).folder)
    to_public(checkpoint, like, out, unnorm_key)
    print(f"  {out}: {checkpoint.folder}, {checkpoint.digest[:12]}")
