"""Who may import whom: the modules in order, no framework at run time, nothing that is not declared."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [  # a module imports only what stands before it
    "untrusted", "curves", "aliases", "config", "guard", "runtime", "energy", "attention", "model", "loss", "optim",
    "tensorfile", "checkpoint", "metrics", "sinks", "watch", "probe", "parallel", "template", "chat", "files",
    "records", "quality", "truncate", "nf4", "lora", "adapter", "ranks", "weights", "stream", "plan", "batches",
    "cache", "corpus", "sampling", "decode", "talk", "generate", "bootstrap", "scores", "evaluate", "report",
    "preflight", "export", "card", "gguf_tokenizer", "gguf_export", "job", "opening", "finish", "selftest",
    "environment",
]  # fmt: skip
COMMANDS = ["train.py", "eval.py", "merge.py"]
MODULES = {path.stem: path for path in (ROOT / "nanoft").glob("*.py") if path.stem != "__init__"}
PROGRAM = [*MODULES.values(), ROOT / "nanoft" / "__init__.py", *(ROOT / name for name in COMMANDS)]
FRAMEWORKS = {"transformers", "peft", "accelerate", "datasets", "trl", "lightning"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Dotted names that a file imports, and whether at its top; `from nanoft import x` is nanoft.x."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not is_command(node)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield from ((f"{node.module}.{alias.name}", node in tree.body) for alias in node.names)


def is_command(node: ast.stmt) -> bool:
    """`if __name__ == "__main__":`, where nothing is imported by others any more."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def own_imports(path: Path) -> set[str]:
    """The modules of nanoft that a file imports, anywhere in it."""
    parts = [name.split(".") for name, _ in imports(path)]
    return {part[1] for part in parts if part[0] == "nanoft" and len(part) > 1 and part[1] in MODULES}


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE = declared(PROJECT["dependencies"])
EXTRAS = {
    name
    for extra, wanted in PROJECT["optional-dependencies"].items()
    if extra not in ("test", "bench")
    for name in declared(wanted)
}  # fmt: skip


def test_every_module_has_its_place() -> None:
    assert set(MODULES) == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_up_the_list_only(module: str) -> None:
    later = own_imports(MODULES[module]) - set(ORDER[: ORDER.index(module)])
    assert not later, f"{module} imports {later}"


def test_no_module_imports_a_command() -> None:
    commands = {Path(name).stem for name in COMMANDS}
    assert not [path for path in PROGRAM for name, _ in imports(path) if name.split(".")[0] in commands]


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: path.name)
def test_every_package_is_declared_and_none_is_a_framework(path: Path) -> None:
    distributions = importlib.metadata.packages_distributions()
    for name, at_top in imports(path):
        package = name.split(".")[0]
        assert package not in FRAMEWORKS
        if package == "nanoft" or package in sys.stdlib_module_names:
            continue
        names = {found.lower() for found in distributions[package]}
        assert names & (CORE if at_top else CORE | EXTRAS), f"{path.name}: {package} is not in pyproject.toml"


def test_every_declared_package_is_used() -> None:
    distributions = importlib.metadata.packages_distributions()
    packages = {name.split(".")[0] for path in PROGRAM for name, _ in imports(path)}
    used = {found.lower() for package in packages for found in distributions.get(package, [])}
    assert CORE - used == set()


def test_importing_nanoft_brings_in_no_framework() -> None:
    names = ", ".join(f"nanoft.{module}" for module in ORDER)
    code = f"import sys, {names}; print(sorted(set(sys.modules) & {FRAMEWORKS!r}))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ORDER)
def test_every_module_has_its_tests(module: str) -> None:
    assert (ROOT / "tests" / f"test_{module}.py").is_file()


def test_the_house_is_flat() -> None:
    inside = [path for path in (ROOT / "nanoft").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert inside == []
    assert not {"utils", "util", "helpers", "common", "misc"} & set(MODULES)
