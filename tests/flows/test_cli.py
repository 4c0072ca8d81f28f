"""`nst` as a person meets it: the order of its commands, an example of each, completion, exit codes."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from flows.cli import COMMANDS, app
from tests.flows.runs import nst

ROOT = Path(__file__).resolve().parents[2]
GROUP: Any = typer.main.get_command(app)
TABLE = {  # of docs/command-line.md: what a command does, whether it has --json
    found[1]: found[2]
    for found in re.finditer(
        r"^\| `nst ([\w-]+).*\| (yes|always|) ?\|$", (ROOT / "docs/command-line.md").read_text(), re.M
    )
}


def test_help_lists_the_commands_in_the_order_in_which_people_need_them() -> None:
    assert list(GROUP.commands) == list(COMMANDS) == list(TABLE)
    assert list(COMMANDS)[:4] == ["demo", "plan", "run", "results"]
    text = CliRunner().invoke(app, ["--help"]).output
    places = [re.search(rf"^\W {name} ", text, re.M) for name in COMMANDS]
    assert all(places)
    assert [place.start() for place in places if place] == sorted(place.start() for place in places if place)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does_and_gives_an_example_that_parses(name: str) -> None:
    text = CliRunner().invoke(app, [name, "--help"]).output
    assert f"nst {name}" in text
    (example,) = re.findall(r"Example: (?:\w+=\S+ )?nst (.+)", GROUP.commands[name].help)
    words = example.split()
    GROUP.commands[words[0]].make_context(words[0], words[1:])
    assert words[0] == name


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_the_command_line_says_which_commands_have_json(name: str) -> None:
    has = any("--json" in param.opts for param in GROUP.commands[name].params)
    assert has == (TABLE[name] == "yes")


def test_completion_knows_the_commands(tmp_path: Path) -> None:
    program = "import sys; sys.argv = ['nst']; from flows.cli import main; main()"
    environment = {
        "_NST_COMPLETE": "complete_bash",
        "COMP_WORDS": "nst lin",
        "COMP_CWORD": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": "",
    }
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["lineage"], done.stderr
    assert {"--install-completion", "--show-completion"} <= {name for param in GROUP.params for name in param.opts}


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (["results", "digits"], 2, "error: no run 'digits' in"),
        (["nonsense"], 2, "error: No such command 'nonsense'; see nst --help"),
        (["run"], 2, "error: Missing argument"),
        (["gc", "--days", "x"], 2, "error: Invalid value for '--days'"),
        (["verify", "--all"], 0, "all is as it was written"),
        ([], 2, "Commands"),
    ],
)
def test_an_exit_code_says_whose_turn_it_is(line: list[str], code: int, said: str, tmp_path: Path) -> None:
    printed = nst(*line, cwd=tmp_path, code=code, NST_STORE=str(tmp_path / "store"))
    assert said in printed
    assert "Traceback" not in printed
    assert "error: ;" not in printed


def test_the_version_is_told_with_the_commit(tmp_path: Path) -> None:
    assert re.match(r"nst \d+\.\d+\.\d+, code ([0-9a-f]{40}|unknown)\n", nst("--version", cwd=tmp_path))
