"""Read a config from files, the environment and the command line; the later source wins.

A YAML or JSON file may build on others of its kind (`base: other.yaml`). Several files merge from left to right, and a
Python config may be the first. A file of another schema (`schemas.py`) is translated as a whole, after merging.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import re
import runpy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import nanoft
from nanoft import UserError
from nanoft.config.aliases import settle, translate
from nanoft.config.functions import RUN, UNTRUSTED, is_function
from nanoft.config.schemas import MLX_SECTIONS, MODELFORGE, Schema, explain, for_compute_specs, is_flat, recognize
from nanoft.config.settings import Config, flatten
from nanoft.io.untrusted import decode_text, parse_json, parse_yaml, read_bytes

CONFIGS = Path(nanoft.__file__).parent.parent / "configs"
ENVIRONMENT_PREFIX = "NANOFT_"
PATHS = ("model.name", "data.train_file", "data.validation_file", "output.dir")
NAMING = ("model.name", "data.train_file", "training.objective", "training.method")  # overrides that name a run


@dataclass(frozen=True)
class Loaded:
    """A config, and how the names in files of another schema were translated."""

    config: Config
    schema: Schema | None = None  # None: nanoft's own names
    explanation: list[str] = field(default_factory=list)  # for the terminal


def load_config(path: str | Path, overrides: Iterable[str] = (), environment: Mapping[str, str] = os.environ) -> Config:
    """Like `read_config`, but returns the config only."""
    return read_config(path, overrides, environment).config


def read_config(path: str | Path, words: Iterable[str] = (), environment: Mapping[str, str] = os.environ) -> Loaded:
    """Read config files, apply the environment and then the command line's `section.field=value` overrides.

    Args:
        words: overrides, and further config files.
    """
    more, overrides = split_words(words)
    changes = read_overrides(overrides, environment)
    loaded = _read_files([Path(os.path.expanduser(path)), *more], environment)
    config = loaded.config.override(changes)
    # A shell does not expand a ~ after = (section.field=~/path) or after a comma.
    paths = {name: path.split(",") for name, path in config.flat().items() if name in PATHS and path}
    expanded = {name: [os.path.expanduser(part.strip()) for part in parts] for name, parts in paths.items()}
    config = config.override({name: ",".join(parts) for name, parts in expanded.items()})
    if not config.output.dir:  # named without the environment, so that it is the same on every machine
        stems = Path("-".join(file.stem for file in (Path(path), *more)))
        config = config.override({"output.dir": f"runs/{run_name(stems, read_overrides(overrides, {}))}"})
    warnings = [f"warning: {text}" for text in loaded.schema.warn(config)] if loaded.schema else []
    return replace(loaded, config=config, explanation=loaded.explanation + warnings)


def split_words(words: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Config files and overrides on the command line."""
    words = list(words)
    files = [word for word in words if "=" not in word and word.endswith((".py", ".yaml", ".yml", ".json", ".toml"))]
    return [Path(os.path.expanduser(word)) for word in files], [word for word in words if word not in files]


def read_overrides(overrides: Iterable[str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """NANOFT_SECTION__FIELD=value in the environment, then section.field=value overrides, as section.field -> value."""
    named = {k: v for k, v in environment.items() if k.startswith(ENVIRONMENT_PREFIX)}
    if odd := sorted(key for key in named if "__" not in key.removeprefix(ENVIRONMENT_PREFIX)):
        raise UserError(f"{odd[0]}: no such setting: write NANOFT_SECTION__FIELD (two underscores), or unset it")
    changes = {k.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".", 1): v for k, v in named.items()}
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"{item!r} is not section.field=value, for example training.max_steps=20")
        changes[key.strip()] = value.strip()
    return changes


def run_name(path: str | Path, changes: Mapping[str, str]) -> str:
    """The config's name; with overrides, also their base, data and method, and a hash of all: one per experiment."""
    kept = sorted(f"{k}={v}" for k, v in changes.items() if not k.startswith(("logging.", "output.")))
    digest = hashlib.sha256("\n".join(kept).encode("utf-8", "surrogateescape")).hexdigest()[:6]
    values = [re.sub(r"\.(jsonl?|csv|tsv|parquet)\b.*", "", Path(changes[k]).name) for k in NAMING if k in changes]
    words = [re.sub(r"[^A-Za-z0-9._]+", "-", value)[:24].strip("-.") for value in values]
    return "-".join([Path(path).stem, *filter(None, words), *([digest] if kept else [])])


def load_file(path: str | Path, beside: str = "") -> Config:
    """Read one config file: Python (defines `config`), YAML or JSON.

    A config that builds on another passes its own `__file__` as `beside`; `path` is relative to that directory.
    """
    return _read_files([Path(beside).parent / os.path.expanduser(path)], {}).config


def _read_files(paths: Sequence[Path], environment: Mapping[str, str]) -> Loaded:
    """The files merged from left to right; `environment` is for a schema that reads environment variables."""
    layers: list[tuple[str, Config | dict[str, Any]]] = []
    for where, layer in itertools.chain.from_iterable(_layers(path) for path in paths):
        if layers and (merged := _merge(layers[-1][1], layer)) is not None:
            layers[-1] = (f"{layers[-1][0]}, {where}", merged)
        else:
            layers.append((where, layer))
    loaded: Loaded | None = None
    for where, layer in layers:
        with _named(where):
            if isinstance(layer, Config) and loaded is not None:
                raise UserError("a Python config sets every field: name it first")
            loaded = Loaded(layer) if isinstance(layer, Config) else _apply(layer, loaded, environment)
    assert loaded is not None
    return loaded


@contextlib.contextmanager
def _named(where: str) -> Iterator[None]:
    """Errors begin with the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None


def _layers(path: Path, above: tuple[Path, ...] = ()) -> Iterator[tuple[str, Config | dict[str, Any]]]:
    """A file, after those that it names as its base."""
    if not path.is_file():
        raise UserError(f"{path}: no such config file: try configs/tiny.py")
    with _named(str(path)):
        if path.resolve() in above:
            raise UserError("base: this file builds on itself: remove one of the base lines")
        if path.suffix == ".py" and above:
            raise UserError("base: must not name a Python file: give both on the command line, the Python file first")
        layer = _run_python(path) if path.suffix == ".py" else _read_tree(path)
        bases = [] if isinstance(layer, Config) else layer.pop("base", None) or []
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise UserError(f"base: {bases!r:.60} is neither a file name nor a list of file names")
    for base in bases:
        yield from _layers(path.parent / os.path.expanduser(base), (*above, path.resolve()))
    if isinstance(layer, dict) and "provenance" in layer and (path.parent / "metrics.jsonl").is_file():
        layer["output"] = {"dir": str(path.parent)}  # a run, which may be a copy
    yield str(path), layer


def _merge(old: Config | dict[str, Any], new: Config | dict[str, Any]) -> dict[str, Any] | None:
    """Merge two files that use the same kind of names, the later wins field by field; None: the kinds differ."""
    if isinstance(old, Config) or isinstance(new, Config) or is_flat(old) != is_flat(new):
        return None
    if is_flat(new):
        return {**old, **new}
    both = [name for name in old if isinstance(old[name], Mapping) and isinstance(new.get(name), Mapping)]
    return {**old, **new, **{section: {**old[section], **new[section]} for section in both}}


def _apply(tree: dict[str, Any], loaded: Loaded | None, environment: Mapping[str, str]) -> Loaded:
    """Apply a file's settings to what is loaded so far; the first file of a schema also brings its defaults."""
    provenance = tree.pop("provenance", None)  # in the config.json of a run
    if not isinstance(provenance, dict | None):
        raise UserError("provenance: not a mapping: the file is corrupted")
    schema, before = recognize(tree), loaded or Loaded(Config())
    if schema is None:
        settings = flatten(tree, MLX_SECTIONS)
        config = _without_functions(before.config.override(settings), settings, is_of_run=provenance is not None)
        return replace(before, config=config)
    where = "in a flat file" if is_flat(tree) else f"in the {schema.name} schema"
    names = dict(tree) if is_flat(tree) else flatten(tree, MLX_SECTIONS)
    given = {name: variable for variable, name in schema.environment.items() if variable in environment}
    names |= {name: environment[variable] for name, variable in given.items()}
    meanings = translate(names, schema.table, schema.rules, where)
    meanings = {given.get(name, name): meaning for name, meaning in meanings.items()}
    found = settle(meanings)
    supplied = {} if loaded else dict(schema.defaults)  # what is loaded before has a value for every field
    if schema is MODELFORGE and (loaded is None or tree.get("compute_specs")):
        supplied |= for_compute_specs(tree, lambda name: load_file(CONFIGS / name))
    left_out = {path: value for path, value in supplied.items() if path not in found}
    try:
        config = before.config.override(left_out).override({path: value for path, (_, value) in found.items()})
    except UserError as error:
        path = str(error).partition(": ")[0]
        name = found[path][0] if path in found else path
        raise UserError(str(error) if name == path else f"{name}: {error}") from None
    config = _without_functions(config, found, is_of_run=False)
    return Loaded(config, schema, before.explanation + explain(schema, meanings, environment))


def _without_functions(config: Config, given: Collection[str], is_of_run: bool) -> Config:
    """Refuse functions in the fields `given` by a data file: importing a function runs its module.

    A run's config.json loses its user-defined metrics; its user-defined data.format and rewards become untrusted.
    """
    metrics, data_format, rewards = config.evaluation.metrics, config.data.format, config.rl.reward
    named = {"data.format": (data_format,), "evaluation.metrics": metrics, "rl.reward": rewards}
    own = set[str]()
    for path in (path for path in named if path in given):
        functions = [name for name in named[path] if is_function(name) and not name.startswith(RUN)]
        if functions and not is_of_run:
            fix = f"use a Python config, or give {path}={functions[0]} on the command line"
            raise UserError(f"{path}: {functions[0]}: a data file must not name code to run: {fix}")
        own.update(functions)
    kept = tuple(name for name in metrics if name not in own)
    marked = [tuple(UNTRUSTED * (name in own) + name for name in names) for names in ((data_format,), rewards)]
    return config.override({"evaluation.metrics": kept, "data.format": marked[0][0], "rl.reward": marked[1]})


def _read_tree(path: Path) -> dict[str, Any]:
    content = read_bytes(path, confined=False)
    if path.suffix == ".toml":
        fix = "import sys, json, tomllib; print(json.dumps(tomllib.load(sys.stdin.buffer)))"
        raise UserError(f'is TOML: convert it to JSON: python -c "{fix}" < {path} > {path.with_suffix(".json")}')
    try:
        tree = parse_json(content) if path.suffix == ".json" else parse_yaml(decode_text(content))
    except ValueError as error:
        raise UserError(f"not valid {path.suffix.lstrip('.').upper()}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError("expected a mapping of sections (model, data, training, ...)")
    return tree


def _run_python(path: Path) -> Config:
    """Run a Python config, the user's own program, and return its `config`."""
    try:
        config = runpy.run_path(str(path)).get("config")
    except SyntaxError as error:
        raise UserError(f"line {error.lineno or 1}: {error.msg}") from None
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
    if not isinstance(config, Config):
        raise UserError("does not define `config`: add config = Config(...)")
    return config
