"""`python -m flows.serve`: the Prefect server, the deployment `opd/train` and its runner, in one command.

A run that nobody runs any more is first declared crashed, so that `prefect flow-run retry` can take it up again.
"""

import sys
from pathlib import Path
from typing import Any
from uuid import UUID

from flows.prefect_server import liveness, server
from vla_opd import mistakes
from vla_opd.machine import checkout

DEPLOYMENT = "train"
LOCK = Path(".prefect/serve.lock")


def main() -> int:
    """Serve until interrupted. Returns the exit code: 1 if another process serves this folder already."""
    try:
        checkout.require_own_code()
        # Two runners of one folder would each take runs of the same artifacts.
        with (
            liveness.locked(
                LOCK, f"{LOCK} is held: opd/{DEPLOYMENT} is being served from this folder already"
            ),
            server.in_use() as url,
        ):
            for run in crash_orphans():
                print(
                    f"  {run}: its process is gone, so it is now Crashed; go on with  prefect flow-run retry {run}"
                )
            _serve(url)
    except (ValueError, RuntimeError) as error:
        print(f"\n{mistakes.message(error)}\n", file=sys.stderr)
        return 1
    return 0


def crash_orphans() -> list[str]:
    """Declare crashed what the server holds for under way although no process is: runs that died, their iterations, and runs that never began.

    A run that died as it began, or at its very end, has left no trace in this folder: it is one of the deployment's that no process of this machine
    has. On another server than this folder's own such runs are left as they are, for they may be another's. Returns the ids of the runs, without
    their iterations.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
    from prefect.states import Crashed

    states = ["PENDING", "RUNNING"] if server.is_ours() else ["PENDING"]
    under_way = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}
    with get_client(sync_client=True) as client:

        def found(**which: Any) -> list[UUID]:
            runs = client.read_flow_runs(
                flow_run_filter=FlowRunFilter.model_validate(under_way | which)
            )
            return [run.id for run in runs]

        died = liveness.abandoned()
        orphans = found(id={"any_": [UUID(run) for run in died]}) if died else []
        deployed = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": states}}}),
            deployment_filter=DeploymentFilter.model_validate({"name": {"any_": [DEPLOYMENT]}}),
        )
        orphans += [
            run.id for run in deployed if run.id not in orphans and not liveness.alive(str(run.id))
        ]
        below = [orphans]
        while below[
            -1
        ]:  # iterations; of a study its members, their runs, and the iterations of those
            below.append(found(parent_flow_run_id={"any_": below[-1]}))
        for run in [run for level in reversed(below) for run in level]:
            client.set_flow_run_state(run, Crashed(message="its process is gone"), force=True)
    for run in died:
        liveness.forget(run)
    return [str(run) for run in orphans]


def _nightly() -> bool:
    """Whether someone has turned the schedule on: serving again must leave it so."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            return any(
                schedule.active
                for schedule in client.read_deployment_by_name(f"opd/{DEPLOYMENT}").schedules
            )
        except ObjectNotFound:
            return False


def _serve(url: str) -> None:
    from prefect.schedules import Cron

    from flows.train import opd

    print(f"  serving opd/{DEPLOYMENT}; runs are shown at {url.removesuffix('/api')}")
    elsewhere = "" if url == server.LOCAL else f"PREFECT_API_URL={url} "
    print(f"  start one with  {elsewhere}prefect deployment run opd/{DEPLOYMENT} --watch")
    nightly = Cron(
        "0 2 * * *", slug="nightly", active=_nightly()
    )  # off until someone turns it on, in the interface or by `prefect deployment schedule`
    opd.serve(
        name=DEPLOYMENT,
        limit=1,
        schedules=[nightly],
        description=opd.__doc__,
        print_starting_message=False,
    )


if __name__ == "__main__":
    sys.exit(main())
