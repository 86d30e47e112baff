"""The laws of the house, checked: names, sizes, what dvc.yaml says about the code, what must never be in a tracked file."""

import ast
import re
import statistics
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML

from flows import shares
from flows.cli.app import app
from flows.train import TARGET
from stages.__main__ import SHARED, VERBS
from vla_opd.params.load import load
from vla_opd.params.run import Params

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "stages", "vla_opd")
VERB = {"pretrain": "finetune"}  # behind stages of dvc.yaml that are called otherwise
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
# What these do is in no result (law 4): the machine, and where curves go.
NOT_IN_RESULTS = {"vla_opd/machine"}
MACHINE_PATH = re.compile(r"(?<![\w.\-/}*])/(work|root|tmp|home|Users)/\w")
REGISTRY = re.compile(
    r"https?://[^\s\"']*(pypi|simple/|conda|index|download\.pytorch)[^\s\"']*|--(extra-)?index-url[ =]+http|--find-links"
)
FOREIGN_CODE = re.compile(
    r"trust_remote_code|torch\.load\(|pickle\.loads?\(|allow_pickle=True|\bAuto(Model|Processor|Tokenizer|Config)\b"
)


def tracked() -> list[Path]:
    """Files in git, or about to be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def sources() -> list[Path]:
    """The Python files of the three packages."""
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def functions() -> Iterator[tuple[str, int]]:
    """Every function's address and its length in lines, decorators and docstring left out."""
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = (
                    node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                )
                body = (node.end_lineno or 0) - first.lineno + 1
                yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", body + 1


@cache
def pipeline() -> dict[str, Any]:
    """The stages of dvc.yaml; a `foreach` stage is what stands under its `do`."""
    tree = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())
    return {
        name: stage.get("do", stage) | {"foreach": stage.get("foreach")}
        for name, stage in tree["stages"].items()
    }


def verb(name: str) -> str:
    """The stages file behind a stage of dvc.yaml."""
    return VERB.get(name, name)


def run_sections() -> dict[str, Any]:
    return YAML(typ="safe").load((ROOT / "params.yaml").read_text())


# One name, four places


def test_every_verb_has_its_stage_its_file_and_its_section() -> None:
    in_dvc = {verb(name) for name in pipeline()}
    in_files = {path.stem for path in (ROOT / "stages").glob("[!_]*.py")}
    assert in_dvc == in_files == set(VERBS)
    for name in in_dvc:
        field = Params.model_fields[name]
        assert field.annotation is not None
        section = (
            get_args(field.annotation)[-1] if name == "adopt" else field.annotation
        )  # of which there are several, by name
        assert section.__name__ == f"{name.capitalize()}Params"


def test_params_has_a_section_for_every_verb_and_every_foreach() -> None:
    assert {
        *VERBS,
        *(stage["foreach"][2:-1] for stage in pipeline().values() if stage["foreach"]),
    } <= set(run_sections())


def test_the_deployment_knows_the_stages_by_name() -> None:
    names = re.findall(r"\w+", TARGET.partition("(@")[0])
    assert set(names) == set(pipeline())


def test_the_commands_of_dvc_yaml_are_the_stages_own() -> None:
    for name, stage in pipeline().items():
        option = VERBS[verb(name)]
        item = {"--name": "${key}", "--iteration": "${key}", None: ""}[option]
        assert stage["cmd"] == " ".join(
            filter(None, ["exec python -m stages", verb(name), option, item])
        )


def test_shares_are_asked_for_by_the_stages_own_options() -> None:
    assert {verb: VERBS[verb] for verb in SHARED} == shares.SHARED


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name
)
def test_examples_are_whole_runs_that_dvc_yaml_can_read(path: Path) -> None:
    params = load(path)
    assert {params.report.start, params.report.final, params.report.teacher} <= set(
        params.evaluations
    )


# What dvc.yaml says about the code


def module_file(module: str) -> list[Path]:
    """The file of a module or a package, if it is ours. A package's __init__ counts only if something is imported from it."""
    path = ROOT.joinpath(*module.split("."))
    return [
        candidate
        for candidate in (path.with_suffix(".py"), path / "__init__.py")
        if candidate.is_file()
    ]


@cache
def direct_imports(path: Path) -> frozenset[Path]:
    """Project files that a file imports, at its head or inside its functions."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in PACKAGES:
                found.update(module_file(name))
    return frozenset(found)


def files_of(name: str) -> set[Path]:
    """The stage's own file and every project file that it imports, directly or not."""
    todo, seen = [ROOT / "stages" / f"{verb(name)}.py"], set[Path]()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo.extend(direct_imports(path))
    return seen


def room(path: Path) -> str:
    """`vla_opd/envs` for a file below it; a file that lies in no room is its own."""
    return Path(*path.relative_to(ROOT).parts[:2]).as_posix()


@pytest.mark.parametrize("name", sorted(pipeline()))
def test_code_deps_are_the_rooms_that_the_stage_imports_from(name: str) -> None:
    empty = {package / "__init__.py" for package in (ROOT / "stages", ROOT / "vla_opd")}
    imported = {room(path) for path in files_of(name) - empty} - NOT_IN_RESULTS
    templates = {room(path) for path in (ROOT / "stages").glob(f"{verb(name)}.*.jinja")}
    listed = {dep for dep in pipeline()[name]["deps"] if dep.startswith(("stages/", "vla_opd/"))}
    assert listed == imported | templates, (
        "dvc.yaml: deps of this stage differ from what it imports"
    )


def test_what_dvc_ignores_changes_no_artifact() -> None:
    """`.dvcignore` keeps some code out of what makes stages stale: no stage may import it."""
    ignored = {
        ROOT / line[1:]
        for line in (ROOT / ".dvcignore").read_text().splitlines()
        if line.endswith(".py")
    }
    assert ignored
    assert all(path.is_file() for path in ignored)
    assert {name: files_of(name) & ignored for name in pipeline() if files_of(name) & ignored} == {}


@pytest.mark.parametrize("name", sorted(pipeline()))
def test_params_deps_are_what_the_stage_reads(name: str) -> None:
    """Every section that the stage's file reads as `params.<section>` is among its params, whole or for its own item."""
    text = "".join(
        path.read_text() for path in (ROOT / "stages").glob(f"{verb(name)}.*")
    )  # its template too, if it has one
    read = set(re.findall(r"\bparams\.([a-z_]+)", text)) & set(Params.model_fields)
    seed = {"run"} if re.search(r"params\.run\.(learning_)?seed", text) else set()
    wanted = (read - {"run"}) | seed
    if name == "finetune":
        wanted -= {"policy"}  # its parent's
    listed = {entry.partition(".")[0] for entry in pipeline()[name]["params"]}
    assert listed >= wanted, (
        f"dvc.yaml: {name} reads {sorted(wanted - listed)} and doesn't list them"
    )
    assert listed <= wanted | {
        "pretrained",
        "finetuned",
        "iterations",
        "reinforcements",
        "evaluations",
    }, f"dvc.yaml: {name} lists {sorted(listed - wanted)} and doesn't read them"


# Sizes and names


def test_functions_are_short() -> None:
    lengths = dict(functions())
    assert statistics.median(lengths.values()) <= 12
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= 40
    assert {where: length for where, length in lengths.items() if length > 60} == {}


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert [
        path
        for path in sources()
        if path.stem in FORBIDDEN_NAMES or path.parent.name in FORBIDDEN_NAMES
    ] == []


# What must never be in a tracked file


def texts() -> Iterator[tuple[str, int, str]]:
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        yield from (
            (str(path.relative_to(ROOT)), number, line)
            for number, line in enumerate(text.splitlines(), 1)
        )


def test_no_path_of_a_machine_is_in_a_tracked_file() -> None:
    assert [f"{path}:{number}" for path, number, line in texts() if MACHINE_PATH.search(line)] == []


def test_no_registry_address_is_in_a_tracked_file() -> None:
    spared = {
        "README.md",
        Path(__file__).relative_to(ROOT).as_posix(),
    }  # the rule's own words would break it
    found = [
        f"{path}:{number}"
        for path, number, line in texts()
        if path not in spared and REGISTRY.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("folder", ["work", "root", "tmp", "home", "Users"])
@pytest.mark.parametrize(
    ("line", "bad"),
    [("see /{}/x", True), ("'/{}/a'", True), ("artifacts/{}/x", False), ("!/*/{}/x", False)],
)
def test_the_rule_on_machine_paths_catches_what_it_should(
    line: str, bad: bool, folder: str
) -> None:
    assert bool(MACHINE_PATH.search(line.format(folder))) == bad


def test_no_code_comes_with_a_checkpoint_and_no_pickle_is_opened() -> None:
    python = [*sources(), *(ROOT / "benchmarks").glob("*.py")]
    lines = [
        (path.relative_to(ROOT).as_posix(), line)
        for path in python
        for line in path.read_text().splitlines()
    ]
    assert [one for one in lines if FOREIGN_CODE.search(one[1])] == []


@pytest.mark.parametrize(
    ("line", "bad"),
    [
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", True),
        ("torch.load(path)", True),
        ("pickle.loads(data)", True),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path, allow_pickle=False)", False),
        ("safetensors.torch.load_file(path)", False),
    ],
)
def test_the_rule_on_foreign_code_catches_what_it_should(line: str, bad: bool) -> None:
    assert bool(FOREIGN_CODE.search(line)) == bad


# The README


def readme_commands() -> list[str]:
    """The lines of the README's shell blocks, without comments."""
    blocks = re.findall(
        r"```(?:bash|sh|console)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    lines = [
        line.split("#")[0].strip().removeprefix("$ ")
        for block in blocks
        for line in block.splitlines()
    ]
    return [line for line in lines if line]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("command", sorted(set(readme_commands())) or ["make run"])
def test_readme_commands_exist(command: str) -> None:
    words = command.split()
    if words[0] == "make":
        assert words[1] in make_targets(), command
    if match := re.search(r"(?:python -m )?(opd|stages) (\w+)", command):
        known = (
            set(VERBS)
            if match[1] == "stages"
            else {one.name or one.callback.__name__ for one in app.registered_commands}
        )
        assert match[2] in known, command
    if match := re.search(r"dvc repro\s+(.*)", command):
        named = {word.partition("@")[0] for word in match[1].split() if not word.startswith("-")}
        assert named <= set(pipeline()), command
    for path in re.findall(r"\S+\.(?:py|yaml)\b", command):
        assert (ROOT / path).exists(), command
