"""The configs that come with nanoft, and that every field they may set is read by the program."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanoft.config import SECTION_NAMES, SECTION_TYPES, Config, load_file

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
PROGRAM = [*sorted((ROOT / "nanoft").glob("*.py")), ROOT / "train.py", ROOT / "eval.py", ROOT / "merge.py"]
NEEDS_NO_COMMENT = {"system.device"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_has_a_docstring(path: Path) -> None:
    config = load_file(path)
    assert config.data.train_file
    assert config.model.name
    assert Config.from_dict(config.to_dict()) == config
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_there_is_a_config_to_start_with() -> None:
    assert ROOT / "configs" / "tiny.py" in CONFIGS


def bindings(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Every `name = value`, also inside `a, b = x, y`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            yield from ((name.id, part) for name, part in pairs if isinstance(name, ast.Name))


def fields_read(source: str) -> set[str]:
    """`section.field` for every `<...>.section.field`, and `s.field` if `s = <...>.section` or `s: SectionConfig`."""
    tree = ast.parse(source)
    dataclass_bodies = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Config")]
    definitions = {id(node) for body in dataclass_bodies for node in ast.walk(body) if body.name != "Config"}
    aliases = {
        (name, value.attr)
        for name, value in bindings(tree)
        if isinstance(value, ast.Attribute) and value.attr in SECTION_TYPES
    }
    aliases |= {
        (node.arg, SECTION_NAMES[node.annotation.id])
        for node in ast.walk(tree)
        if isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name) and node.annotation.id in SECTION_NAMES
    }
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or id(node) in definitions:
            continue
        if isinstance(node.value, ast.Attribute):
            found.add(f"{node.value.attr}.{node.attr}")
        elif isinstance(node.value, ast.Name):
            found |= {f"{section}.{node.attr}" for name, section in aliases if name == node.value.id}
    return found


def test_the_reader_of_fields_sees_reads_and_nothing_else() -> None:
    source = """
class LoRAConfig:
    x = a.lora.alpha
t, seed = config.training, config.system.seed
print(t.max_steps, other.rank, f"{config.lora.rank}", "config.lora.dropout")
def f(d: DataConfig, rank: int): return d.packing, rank.columns
"""
    assert fields_read(source) & {f"{s}.{f.name}" for s, c in SECTION_TYPES.items() for f in dataclasses.fields(c)} == {
        "training.max_steps",
        "system.seed",
        "lora.rank",
        "data.packing",
    }


@pytest.mark.parametrize("section", SECTION_TYPES)
def test_every_field_is_read_by_the_program(section: str) -> None:
    read = set().union(*(fields_read(path.read_text()) for path in PROGRAM if path.name != "config.py"))
    fields = {f"{section}.{item.name}" for item in dataclasses.fields(SECTION_TYPES[section])}
    assert fields - read == set(), "settings that nothing reads"


@pytest.mark.parametrize("section", SECTION_TYPES)
def test_every_field_is_explained_beside_it(section: str) -> None:
    source = (ROOT / "nanoft" / "config.py").read_text()
    bodies = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    for node in bodies[SECTION_TYPES[section].__name__].body:
        assert isinstance(node, ast.AnnAssign)
        assert isinstance(node.target, ast.Name)
        line = source.splitlines()[node.lineno - 1]
        assert "  # " in line or f"{section}.{node.target.id}" in NEEDS_NO_COMMENT, line
