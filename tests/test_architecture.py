"""The picture in CONTRIBUTING.md, held against the code."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("storage", "models", "tasks", "flows")
FORBIDDEN = {
    "storage": {"torch", "torchvision", "timm", "prefect", "webdataset"},
    "models": {"prefect"},
}
PROCESS_STARTERS = {"subprocess", "multiprocessing"}


def imports(path: Path) -> Iterator[str]:
    """The modules that a file imports, at its top or later."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def sources(layer: str) -> list[Path]:
    found = sorted((ROOT / layer).rglob("*.py"))
    assert found, layer
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer: str) -> None:
    above = set(LAYERS[LAYERS.index(layer) + 1 :]) | FORBIDDEN.get(layer, set())
    wrong = [f"{path}: {name}" for path in sources(layer) for name in imports(path) if name.split(".")[0] in above]
    assert wrong == []


def test_only_the_stage_task_knows_prefect_below_flows() -> None:
    knowing = {path.name for path in sources("tasks") if any(n.split(".")[0] == "prefect" for n in imports(path))}
    assert knowing == {"stage.py"}


def test_only_launch_starts_processes() -> None:
    starting = {
        path.relative_to(ROOT).as_posix()
        for layer in LAYERS
        for path in sources(layer)
        if PROCESS_STARTERS & {name.split(".")[0] for name in imports(path)}
    }
    assert starting == {"models/launch.py"}


def test_only_the_stage_runner_commits_artifacts() -> None:
    calling = {
        path.relative_to(ROOT).as_posix()
        for layer in LAYERS
        for path in sources(layer)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "commit"
    }
    assert calling == {"tasks/stage.py"}


@pytest.mark.parametrize("module", ["storage.artifacts", "storage.shards", "models.noise", "models.training"])
def test_what_runs_on_a_device_machine_needs_neither_prefect_nor_webdataset_nor_duckdb(module: str) -> None:
    program = (
        "import sys\n"
        "for name in ('prefect', 'webdataset', 's3fs', 'duckdb', 'typer'): sys.modules[name] = None\n"
        f"import {module}"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_installation_has_every_package_of_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        path.parent.relative_to(ROOT) for layer in (*LAYERS, "deployments") for path in (ROOT / layer).rglob("*.py")
    }
    folders = {"deployments.recipes", "deployments.studies"}
    assert sorted(listed) == sorted({*(str(folder).replace("/", ".") for folder in found), *folders})
