"""`python -m flows.serve`: the Prefect server, the deployment `opd/train` and its runner.

Runs whose processes are gone are first declared crashed, so that `prefect flow-run retry` can
resume them.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from flows.prefect_server import liveness, server
from vla_opd import mistakes
from vla_opd.machine import checkout

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

DEPLOYMENT = "train"
LOCK = Path(".prefect/serve.lock")


def main() -> int:
    """Serve until interrupted. Return the exit code: 1 if another process serves this folder."""
    # Two runners of one folder would each take runs of the same artifacts.
    occupied = f"{LOCK} is held: opd/{DEPLOYMENT} is being served from this folder already"
    try:
        checkout.require_own_code()
        with liveness.hold_lock(LOCK, occupied), server.use_server() as url:
            for run in crash_orphans():
                print(f"  {run}: its process is gone, so it is now Crashed")
                print(f"  resume it with  prefect flow-run retry {run}")
            _serve(url)
    except (ValueError, RuntimeError) as error:
        print(f"\n{mistakes.message(error)}\n", file=sys.stderr)
        return 1
    return 0


def crash_orphans() -> list[str]:
    """Declare runs crashed that are under way by the server, but have no process.

    These are runs that died, with their subflows, and runs that never began. Return the ids of
    the runs, without those of their subflows: retrying the run continues these.
    """
    from prefect.client.orchestration import get_client
    from prefect.states import Crashed

    died = liveness.abandoned_runs()
    with get_client(sync_client=True) as client:
        orphans: list[UUID] = []
        if died:
            orphans = _read_runs_under_way(client, id={"any_": [UUID(run) for run in died]})
        orphans += [run for run in _read_runs_without_trace(client) if run not in orphans]
        # Subflows: iterations; of a study its members, their runs, and the iterations of those.
        subflows: list[UUID] = []
        children = orphans
        while children:
            parents = {"any_": children}
            children = _read_runs_under_way(client, parent_flow_run_id=parents)
            subflows += children
        for run in reversed(orphans + subflows):
            client.set_flow_run_state(run, Crashed(message="its process is gone"), force=True)
    for run in died:
        liveness.forget_run(run)
    return [str(run) for run in orphans if run not in subflows]


def _read_runs_under_way(client: "SyncPrefectClient", **conditions: Any) -> list[UUID]:
    """Return the ids of the runs that are under way by the server, and meet the conditions."""
    from prefect.client.schemas.filters import FlowRunFilter

    state = {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}
    runs = client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate({"state": state, **conditions})
    )
    return [run.id for run in runs]


def _read_runs_without_trace(client: "SyncPrefectClient") -> list[UUID]:
    """Return the ids of the deployment's runs that no process of this machine has.

    A run that died as it began, or at its very end, has left no trace in this folder. On a server
    that was not started here, RUNNING runs may be those of another machine: only PENDING ones
    count.
    """
    from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter

    states = ["PENDING", "RUNNING"] if server.is_own_server() else ["PENDING"]
    deployed = client.read_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate({"state": {"type": {"any_": states}}}),
        deployment_filter=DeploymentFilter.model_validate({"name": {"any_": [DEPLOYMENT]}}),
    )
    return [run.id for run in deployed if not liveness.is_alive(str(run.id))]


def _schedule_is_on() -> bool:
    """Return whether someone has turned the schedule on: serving again must not turn it off."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(f"opd/{DEPLOYMENT}")
        except ObjectNotFound:
            return False
    return any(schedule.active for schedule in deployment.schedules)


def _serve(url: str) -> None:
    from prefect.schedules import Cron

    from flows.train import opd

    print(f"  serving opd/{DEPLOYMENT}; runs are shown at {url.removesuffix('/api')}")
    variable = "" if url == server.LOCAL else f"PREFECT_API_URL={url} "
    print(f"  start one with  {variable}prefect deployment run opd/{DEPLOYMENT} --watch")
    # Off until someone turns it on, in the interface or by `prefect deployment schedule`.
    nightly = Cron("0 2 * * *", slug="nightly", active=_schedule_is_on())
    opd.serve(
        name=DEPLOYMENT,
        limit=1,
        schedules=[nightly],
        description=opd.__doc__,
        print_starting_message=False,
    )


if __name__ == "__main__":
    sys.exit(main())
