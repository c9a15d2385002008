"""`python -m nanoft`, and what all commands share: help and version without torch, old and misspelled commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import merge
from nanoft import __version__
from nanoft.__main__ import main
from nanoft.export.gguf import GGUF_DTYPES
from nanoft.export.merge import EXPORT_DTYPES

ROOT = Path(__file__).parents[2]
SCRIPTS = ["train.py", "eval.py", "merge.py"]
COMMANDS = [*SCRIPTS, "-m nanoft", *(f"-m nanoft {name}" for name in ("chat", "doctor", "compare", "plot"))]
WITHOUT_TORCH = """
import runpy, sys
command, sys.argv[1:] = sys.argv[1], sys.argv[2:]
try:
    if command == "nanoft":
        runpy.run_module("nanoft", run_name="__main__")
    else:
        runpy.run_path(command, run_name="__main__")
except SystemExit as left:
    assert "torch" not in sys.modules, "torch was imported"
    raise
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


def run_without_torch(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, which fails if torch was imported when it exits."""
    return run("-c", WITHOUT_TORCH, *command.removeprefix("-m ").split(), *arguments)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_version_do_not_import_torch(command: str) -> None:
    done = run_without_torch(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {'python ' if command.startswith('-m') else ''}{command} ")
    assert "--version" in done.stdout
    done = run_without_torch(command, "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"nanoft {__version__}\n", "")


MISTAKES = {
    "train.py --lr 1e-4": "error: --lr: settings are written section.field=value: training.learning_rate=VALUE\n",
    "eval.py runs/a --prompts=3": "error: --prompts: settings are written section.field=value: evaluation.prompts=3\n",
    "merge.py a --out b --lr 3": "error: unrecognized arguments: --lr 3 (see --help)\n",
    "-m nanoft doctor c.py --lr=1": "error: --lr: settings are written section.field=value: training.learning_rate=1\n",
    "-m nanoft plot": "error: the following arguments are required: RUN (see --help)\n",
    "-m nanoft plots": "error: argument chat|doctor|compare|plot: invalid choice: 'plots' (choose from ",
    "-m nanoft": "error: the following arguments are required: chat|doctor|compare|plot (see --help)\n",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_does_not_import_torch(line: str) -> None:
    script, *arguments = line.removeprefix("-m ").split()
    done = run_without_torch(script, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(MISTAKES[line])
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new"), [("generate", "chat"), ("runtime", "doctor"), ("metrics", "compare"), ("curves", "plot")]
)
def test_the_old_commands_name_the_new_ones(old: str, new: str) -> None:
    done = run("-m", f"nanoft.{old}", "runs/tiny")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: python -m nanoft.{old} was renamed: use python -m nanoft {new}\n"


def test_the_dtypes_of_the_parser_are_those_of_the_writers() -> None:
    """merge.py repeats them, because it parses its arguments before torch is imported."""
    assert list(dict.fromkeys([*EXPORT_DTYPES, *GGUF_DTYPES])) == merge.DTYPES


def test_each_command_of_the_package_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["chat", ""], ["doctor", "no.py"], ["compare", str(tmp_path)], ["plot", str(tmp_path / "no")]):
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
