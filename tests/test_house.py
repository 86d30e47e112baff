"""The laws of the house, checked.

Names, sizes, what dvc.yaml says about the code, what must never be in a tracked file.
"""

import ast
import importlib
import inspect
import re
import statistics
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML

from flows.cli.app import app
from stages.catalog import BEHIND, STAGES, arguments
from tests.readability import Readability, measure
from vla_opd.params.load import load
from vla_opd.params.run import Params

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "stages", "vla_opd")
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "misc", "base"}
# What these do is in no result (law 4): the machine, and where curves go.
NOT_IN_RESULTS = {"vla_opd/machine"}
MACHINE_PATH = re.compile(r"(?<![\w.\-/}*])/(work|root|tmp|home|Users)/\w")
REGISTRY = re.compile(
    r"https?://[^\s\"']*(pypi|simple/|conda|index|download\.pytorch)[^\s\"']*"
    r"|--(extra-)?index-url[ =]+http|--find-links"
)
FOREIGN_CODE = re.compile(
    r"trust_remote_code|torch\.load\(|pickle\.loads?\(|allow_pickle=True"
    r"|\bAuto(Model|Processor|Tokenizer|Config)\b"
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


def run_sections() -> dict[str, Any]:
    return YAML(typ="safe").load((ROOT / "params.yaml").read_text())


# One name, four places, and the catalog


def test_every_stage_has_its_row_its_file_and_its_section() -> None:
    in_files = {path.stem for path in (ROOT / "stages").glob("[!_]*.py")} - {"catalog"}
    assert in_files == set(STAGES)
    assert set(pipeline()) == set(BEHIND)
    for name in STAGES:
        field = Params.model_fields[name]
        assert field.annotation is not None
        # of `adopt` there are several, by name
        section = get_args(field.annotation)[-1] if name == "adopt" else field.annotation
        assert section.__name__ == f"{name.capitalize()}Params"


def test_params_has_a_section_for_every_stage_and_every_foreach() -> None:
    items = {section for stage in STAGES.values() for section in stage.items.values() if section}
    assert {*STAGES, *items} <= set(run_sections())


@pytest.mark.parametrize("name", sorted(BEHIND))
def test_dvc_yaml_repeats_and_runs_a_stage_as_its_row_says(name: str) -> None:
    row, stage = STAGES[BEHIND[name]], pipeline()[name]
    items = row.items[name]
    assert stage["foreach"] == (None if items is None else f"${{{items}}}")
    option = "" if row.option is None else f" {row.option} ${{key}}"
    assert stage["cmd"] == f"exec python -m stages {BEHIND[name]}{option}"


@pytest.mark.parametrize("name", sorted(BEHIND))
def test_run_takes_what_the_row_gives(name: str) -> None:
    """`run` has keyword parameters only: the run's name, seed, sections, inputs, output, host."""
    run = inspect.signature(importlib.import_module(f"stages.{BEHIND[name]}").run)
    assert {one.kind for one in run.parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    given = arguments(BEHIND[name], EVERYTHING, ITEMS[name])
    assert set(run.parameters) == {*given, "host"}


@pytest.mark.parametrize("name", sorted(set(BEHIND) - {"report"}))
def test_dvc_yaml_lists_the_artifacts_and_sections_of_the_row(name: str) -> None:
    """`report` reads whatever there is; what `finetune` makes has no architecture of its own."""
    row, stage = STAGES[BEHIND[name]], pipeline()[name]
    given = arguments(BEHIND[name], EVERYTHING, ITEMS[name])
    paths = {str(value) for value in given.values() if isinstance(value, Path)}
    outs = [out if isinstance(out, str) else next(iter(out)) for out in stage["outs"]]
    written = [_filled(entry, name) for entry in [*stage["deps"], *outs]]
    assert paths == {entry for entry in written if entry.startswith("artifacts/")}
    sections = set(row.sections) - ({"policy"} if name == "finetune" else set())
    seed = {f"run.{row.seed}"} if row.seed else set()
    chunk = {"policy.chunk"} if name == "demonstrate" else set()
    # An iteration's labels depend on its trajectories alone, not on what it starts from.
    items = set() if name == "label" else {f"{row.items[name]}.${{key}}"}
    assert set(stage["params"]) == sections | seed | chunk | items


EVERYTHING = load(
    ROOT / "params.yaml", ["adopt.public={folder: /public}", "reinforcements.rl001=it001"]
)
ITEMS = {
    name: "" if section is None else list(getattr(EVERYTHING, section))[-1]
    for stage in STAGES.values()
    for name, section in stage.items.items()
}
"""An item of params.yaml that each of DVC's stages makes."""


def _filled(entry: str, name: str) -> str:
    """A path of dvc.yaml for the stage's item."""
    item = EVERYTHING.model_dump().get(STAGES[BEHIND[name]].items[name], {}).get(ITEMS[name])
    fields = item if isinstance(item, dict) else {}
    entry = entry.replace("${run.name}", EVERYTHING.run.name).replace("${key}", ITEMS[name])
    entry = entry.replace("${label.teacher}", EVERYTHING.label.teacher).replace(
        "${item}", str(item)
    )
    return re.sub(r"\$\{item\.(\w+)\}", lambda match: str(fields[match[1]]), entry)


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
    """Return the file of a module or a package, if it is ours.

    A package's __init__ counts only if something is imported from it.
    """
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
    todo, seen = [ROOT / "stages" / f"{BEHIND[name]}.py"], set[Path]()
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
    listed = {dep for dep in pipeline()[name]["deps"] if dep.startswith(("stages/", "vla_opd/"))}
    assert listed == imported, "dvc.yaml: deps of this stage differ from what it imports"


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


# Lines


LIMIT = Readability(9.5, 0.01, 3.5, 1.5, 0.01)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_line_says_one_thing(package: str) -> None:
    measured = measure((ROOT / package).rglob("*.py"))
    assert measured.nodes_per_line <= LIMIT.nodes_per_line
    assert measured.tuple_assignments <= LIMIT.tuple_assignments
    assert measured.comprehensions <= LIMIT.comprehensions
    assert measured.conditionals <= LIMIT.conditionals
    assert measured.vague_names <= LIMIT.vague_names


def test_a_function_has_at_most_seven_parameters() -> None:
    """A stage's `run` and a command have as many as their sections, inputs and options."""
    crowded: list[str] = []
    for path in (ROOT / "vla_opd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [argument.arg for argument in [*node.args.args, *node.args.kwonlyargs]]
                if len({*names} - {"self", "cls"}) > 7:
                    crowded.append(f"{path}:{node.lineno} {node.name}")
    assert crowded == []


@pytest.mark.parametrize("verb", sorted(STAGES))
def test_a_stage_is_a_recipe(verb: str) -> None:
    lines = (ROOT / "stages" / f"{verb}.py").read_text().splitlines()
    assert len(lines) < 90, "what a stage works with belongs in a room of vla_opd"


@pytest.mark.parametrize("folder", ["benchmarks", "tests"])
def test_names_say_what_they_are_for_elsewhere_too(folder: str) -> None:
    measured = measure((ROOT / folder).rglob("*.py"))
    assert measured.vague_names <= LIMIT.vague_names


def test_a_folder_is_seen_at_a_glance() -> None:
    """At most sixteen modules in a folder."""
    folders = {path.parent for path in sources()}
    sizes = {folder: len(list(folder.glob("[!_]*.py"))) for folder in folders}
    assert {folder: size for folder, size in sizes.items() if size > 16} == {}


@pytest.mark.parametrize(
    ("text", "nodes", "tuples", "vague"),
    [
        ("def f():\n    return 1\n", 2, 0, 0),
        ("def f():\n    a, b = 1, 2\n", 11, 1, 0),
        ("def f():\n    (a, b) = pair\n", 9, 0, 0),
        ("def f():\n    # a comment\n    its = 1\n\n", 4, 0, 1),
        ('def f():\n    """Say."""\n    return [one for one in x if one]\n', 11, 0, 1),
    ],
)
def test_the_measures_are_counted_as_by_hand(
    tmp_path: Path, text: str, nodes: int, tuples: int, vague: int
) -> None:
    path = tmp_path / "module.py"
    path.write_text(text)
    found = measure([path])
    assert (found.nodes_per_line, found.tuple_assignments, found.vague_names) == (
        nodes,
        tuples,
        vague,
    )


def test_the_reliability_page_names_tests_that_exist() -> None:
    """It names a test by the beginning of its name, or a file of tests."""
    page = (ROOT / "docs/reliability.md").read_text()
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("test_*.py"):
        tests.update(re.findall(r"def (test_\w+)", path.read_text()))
    cited = set(re.findall(r"`(test_\w+)`", page))
    assert cited
    assert {name for name in cited if not any(test.startswith(name) for test in tests)} == set()


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
            set(STAGES)
            if match[1] == "stages"
            else {one.name or one.callback.__name__ for one in app.registered_commands}
        )
        assert match[2] in known, command
    if match := re.search(r"dvc repro\s+(.*)", command):
        named = {word.partition("@")[0] for word in match[1].split() if not word.startswith("-")}
        assert named <= set(pipeline()), command
    for path in re.findall(r"\S+\.(?:py|yaml)\b", command):
        assert (ROOT / path).exists(), command
