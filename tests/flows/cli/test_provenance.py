"""Commands on artifacts: lineage, compare, verify, audit, sign, gc."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows import cli
from flows.cli import provenance
from tests.flows.toy import ROOT
from vla_opd.artifacts.draft import draft
from vla_opd.artifacts.manifest import open_artifact

LINEAGE = "lineage checkpoints/it001"
NEED_EXTRA = {
    "opd lineage --as prov": f"{LINEAGE} --as prov",
    "opd lineage --as openlineage": f"{LINEAGE} --as openlineage",
    "opd lineage --as in-toto": f"{LINEAGE} --as in-toto",
    "opd sign": "sign checkpoints/it001 --key key.pem",
    "opd verify --signature": "verify checkpoints/it001 --signature s.json --key key.pub",
}
NEED_NO_EXTRA = [LINEAGE, f"{LINEAGE} --as mermaid", f"{LINEAGE} --as html", "verify"]


def test_a_closed_pipe_is_not_an_error(undisturbed: Path) -> None:
    """`opd audit ... | head`: the pipe is closed before everything is written."""
    query = "SELECT * FROM range(20000)"
    command = f"{sys.executable} -m flows audit '{query}' | head -n 1"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=undisturbed,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


@pytest.mark.usefixtures("small")
def test_lineage_in_every_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for form in provenance.Form:
        assert (
            cli.main(
                [
                    "lineage",
                    "checkpoints/it001",
                    "--as",
                    form.value,
                    "--out",
                    str(tmp_path / form.value),
                ]
            )
            == 0
        )
        assert "trajectories/it001" in (tmp_path / form.value).read_text(), form
    assert cli.main(["lineage", "checkpoints/it001"]) == 0
    assert "small/trajectories/it001" in capsys.readouterr().out


def test_verify_exits_with_1_if_an_artifact_is_damaged(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", "--deep"]) == 0
    assert "12 artifacts checked, 0 damaged" in capsys.readouterr().out
    assert cli.main(["verify", "trajectories/it001", "--replay", "shard-000-00000"]) == 0
    assert "the same bytes" in capsys.readouterr().out
    (small / "checkpoints/teacher/metrics.jsonl").write_text("")
    assert cli.main(["verify"]) == 1
    output = capsys.readouterr().out
    assert "metrics.jsonl: 0 bytes" in output
    assert "small/checkpoints/it001" in output.split("void with it:")[1]
    assert cli.main(["verify", "labels/it001"]) == 0


@pytest.mark.usefixtures("small")
def test_a_signature_made_by_one_command_is_checked_by_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", "key.pem"], check=True)
    subprocess.run(["openssl", "pkey", "-in", "key.pem", "-pubout", "-out", "key.pub"], check=True)
    assert (
        cli.main(["sign", "checkpoints/it001", "--key", "key.pem", "--out", "signature.json"]) == 0
    )
    assert (
        cli.main(
            ["verify", "checkpoints/it001", "--signature", "signature.json", "--key", "key.pub"]
        )
        == 0
    )
    assert (
        cli.main(
            ["verify", "checkpoints/teacher", "--signature", "signature.json", "--key", "key.pub"]
        )
        == 1
    )
    assert "signs another history" in capsys.readouterr().err
    assert cli.main(["verify", "--signature", "signature.json", "--key", "key.pub"]) == 1
    assert "are for one artifact" in capsys.readouterr().err


def test_two_evaluations_are_compared_pair_by_pair(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", "evaluations/start", "evaluations/teacher"]) == 0
    output = capsys.readouterr().out
    records = {
        name: [
            json.loads(line)
            for line in (small / f"evaluations/{name}/episodes.jsonl").read_text().splitlines()
        ]
        for name in ("start", "teacher")
    }
    first, second = ([row["success"] for row in records[name]] for name in ("start", "teacher"))
    only = [
        sum(a and not b for a, b in zip(*pair, strict=True))
        for pair in ((first, second), (second, first))
    ]
    (row,) = [line.split() for line in output.splitlines() if line.startswith(" all")]
    assert row == [
        "all",
        "20",
        f"{sum(first) / 20:.1%}",
        f"{sum(second) / 20:.1%}",
        *map(str, only),
    ]
    assert f"second - first: {(sum(second) - sum(first)) / 20:+.1%}, 95% interval" in output
    assert "McNemar's exact test: p = " in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["evaluations/start", "checkpoints/teacher"],
            "small/checkpoints/teacher: is of kind checkpoint; expected an evaluation",
        ),
        (
            ["evaluations/start", "evaluations/other"],
            "environment.stepping is 'fast' in small/evaluations/start and 'exact' in small/",
        ),
        (
            ["evaluations/start", "evaluations/final", "--horizon", "41"],
            "--horizon is 41; expected at most 40, the horizon of small/evaluations/start",
        ),
    ],
)
def test_evaluations_that_differ_in_their_settings_are_not_compared(
    small: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    evaluation = open_artifact(small / "evaluations/final", "evaluation")
    settings = evaluation.params | {
        "environment": evaluation.params["environment"] | {"stepping": "exact"}
    }
    with draft(small / "evaluations/other", "evaluation", evaluation.parents, settings) as work:
        shutil.copyfile(small / "evaluations/final/episodes.jsonl", work.folder / "episodes.jsonl")
        work.publish(evaluation.facts)
    assert cli.main(["compare", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_gc_removes_artifacts_unless_it_is_a_dry_run(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = (
        (small.parents[1] / "params.yaml")
        .read_text()
        .replace("final: it001", "final: student")
        .replace("{it001: student}", "{it009: student}")
    )
    changed = changed.replace("{rl001: it001}", "{}")
    (small.parents[1] / "params.yaml").write_text(changed)
    (small / "report").rename(small.parents[1] / "aside")  # a page keeps what it was made from
    (small / "evaluations/final").rename(small.parents[1] / "final")
    for options, remains in (["--dry-run"], True), ([], False):
        assert cli.main(["gc", *options]) == 0
        assert (small / "checkpoints/it001").is_dir() is remains
        assert "small/labels/it001" in capsys.readouterr().out
    assert (small / "checkpoints/student").is_dir()


@pytest.fixture(scope="module")
def without_extra(undisturbed: Path) -> dict[str, str]:
    """Run commands in a process that cannot import the extra's libraries; return their errors."""
    program = """
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys(["prov", "openlineage", "in_toto_attestation", "cryptography"]))
from flows import cli
errors = {}
for command in sys.argv[1:]:
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(command.split())
    errors[command] = f"{code} {stderr.getvalue().strip()}".strip()
print(json.dumps(errors))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *NEED_EXTRA.values(), *NEED_NO_EXTRA],
        cwd=undisturbed,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", NEED_EXTRA)
def test_commands_name_the_extra_that_they_need(without_extra: dict[str, str], name: str) -> None:
    message = f"1 {name} needs the extra `lineage`: pip install 'vla-opd[lineage]'"
    assert without_extra[NEED_EXTRA[name]].startswith(message)


@pytest.mark.parametrize("command", NEED_NO_EXTRA)
def test_commands_work_without_the_extra(without_extra: dict[str, str], command: str) -> None:
    assert without_extra[command] == "0"
