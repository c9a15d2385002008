"""Allowed imports: packages in layers, no framework at run time, only declared dependencies."""

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
CORE = "the core"  # modules directly in nanoft/, and the blocks
LAYERS = [  # a module imports only from its own package and from packages before it
    "io", "config", "runtime", CORE, "kernels", "data", "models", "tracking", "generation", "metrics", "objectives",
    "evaluation", "export", "training", "__main__",
]  # fmt: skip
COMMANDS = ["train.py", "eval.py", "merge.py"]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "nanoft").rglob("*.py"))
}
PROGRAM = [*MODULES.values(), *(ROOT / name for name in COMMANDS)]
OPTIONAL = ROOT / "nanoft" / "kernels" / "triton_kernels.py"  # only where its extra is installed
FRAMEWORKS = {"transformers", "peft", "accelerate", "datasets", "trl", "lightning"}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Dotted names that a file imports, and whether at its top; `from nanoft import x` is nanoft.x."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in tree.body) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield from ((f"{node.module}.{alias.name}", node in tree.body) for alias in node.names)


def layer_of(module: str) -> int:
    """The index of a module's layer in LAYERS; -1: nanoft itself, which every module may import."""
    parts = module.split(".")
    if len(parts) == 1:
        return -1
    return LAYERS.index(parts[1] if parts[1] in LAYERS else CORE)


def imported_modules(path: Path) -> set[str]:
    """The modules of nanoft that a file imports, anywhere in it."""
    names = {name for name, _ in imports(path) if name.split(".")[0] == "nanoft"}
    return {name if name in MODULES else name.rpartition(".")[0] for name in names}


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0].lower() for requirement in requirements}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = declared(PROJECT["dependencies"])
EXTRAS = {
    name
    for extra, wanted in PROJECT["optional-dependencies"].items()
    if extra not in ("test", "bench")
    for name in declared(wanted)
}  # fmt: skip


def test_every_package_is_a_layer() -> None:
    packages = {path.parent.name for path in (ROOT / "nanoft").glob("*/__init__.py")}
    assert packages - {"blocks"} <= set(LAYERS), "give the new package its place in LAYERS and in README.md"


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_to_the_left_only(module: str) -> None:
    later = {name for name in imported_modules(MODULES[module]) if layer_of(name) > layer_of(module)}
    assert not later, f"{module} imports {later}, which stand to its right in LAYERS"


def test_no_module_imports_a_script() -> None:
    scripts = {Path(name).stem for name in COMMANDS}
    assert not [path for path in PROGRAM for name, _ in imports(path) if name.split(".")[0] in scripts]


def test_no_cycles() -> None:
    """Modules of one package may import each other, but not in a cycle."""
    after = {name: imported_modules(path) & MODULES.keys() - {name} for name, path in MODULES.items()}
    while free := {name for name, needed in after.items() if not needed & after.keys()}:
        after = {name: needed for name, needed in after.items() if name not in free}
    assert not after, f"these import one another in a circle: {sorted(after)}"


@pytest.mark.parametrize("path", PROGRAM, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_package_is_declared_and_none_is_a_framework(path: Path) -> None:
    distributions = importlib.metadata.packages_distributions()
    for name, at_top in imports(path):
        package = name.split(".")[0]
        assert package not in FRAMEWORKS
        if package == "nanoft" or package in sys.stdlib_module_names:
            continue
        names = {found.lower() for found in distributions.get(package, [package])}  # an extra need not be installed
        is_late = not at_top or path == OPTIONAL
        assert names & (DEPENDENCIES | EXTRAS if is_late else DEPENDENCIES), f"{package} is not in pyproject.toml"


def test_a_module_that_needs_an_extra_is_loaded_by_name_only() -> None:
    assert not [path for path in PROGRAM if "nanoft.kernels.triton_kernels" in imported_modules(path)]


def test_every_declared_package_is_used() -> None:
    distributions = importlib.metadata.packages_distributions()
    packages = {name.split(".")[0] for path in PROGRAM for name, _ in imports(path)}
    used = {found.lower() for package in packages for found in distributions.get(package, [])}
    assert DEPENDENCIES - used == set()


def test_importing_nanoft_brings_in_no_framework() -> None:
    names = ", ".join(name for name, path in MODULES.items() if path.stem != "__main__" and path != OPTIONAL)
    code = f"import sys, {names}; print(sorted(set(sys.modules) & {FRAMEWORKS!r}))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_no_package_of_odds_and_ends() -> None:
    assert not {"utils", "util", "helpers", "common", "misc"} & {path.stem for path in MODULES.values()}
