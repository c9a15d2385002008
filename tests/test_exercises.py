"""docs/exercises.md: every check fails with the program as it is, and passes with the solutions."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOLUTIONS = ROOT / "docs" / "solutions"
NAMES = list(runpy.run_path(str(SOLUTIONS / "checks.py"))["CHECKS"])


def apply(patch: Path, directory: Path, *options: str) -> None:
    """`git apply` in a directory, whether or not it lies in a repository."""
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(directory.parent)}
    command = ["git", "apply", *options, str(patch)]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{patch.name} does not apply: adapt it to the source\n{done.stderr}"


def results(directory: Path) -> dict[str, str]:
    """The results of the checks in a directory, by name."""
    command = [sys.executable, str(directory / "docs" / "solutions" / "checks.py")]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    found = dict(re.findall(r"^(\w+): (passes|fails.*)$", done.stdout, re.MULTILINE))
    assert done.returncode == sum(said != "passes" for said in found.values()), done.stderr
    return found


@pytest.mark.quick
def test_every_exercise_has_a_text_a_solution_and_a_check() -> None:
    text = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    assert re.findall(r"^## \d\. .*: `(\w+)`$", text, re.MULTILINE) == NAMES
    assert sorted(path.stem for path in SOLUTIONS.glob("*.patch")) == sorted(NAMES)


@pytest.mark.quick
@pytest.mark.parametrize("name", NAMES)
def test_a_solution_applies_alone(name: str) -> None:
    apply(SOLUTIONS / f"{name}.patch", ROOT, "--check")


def test_checks_fail_before_the_solutions_and_pass_after_them(tmp_path: Path) -> None:
    assert {name: said[:6] for name, said in results(ROOT).items()} == dict.fromkeys(NAMES, "fails:")
    copy = tmp_path / "copy"
    leave_out = shutil.ignore_patterns("__pycache__", "*.md")
    for name in ("nanoft", "configs", "docs", "train.py", "eval.py", "merge.py"):
        source, target = ROOT / name, copy / name
        copy.mkdir(exist_ok=True)
        shutil.copytree(source, target, ignore=leave_out) if source.is_dir() else shutil.copy(source, target)
    for name in NAMES:
        apply(SOLUTIONS / f"{name}.patch", copy)
    assert results(copy) == dict.fromkeys(NAMES, "passes")
