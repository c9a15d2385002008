"""Read a config from a file, the environment and the command line; the later source wins."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nanoft import UserError
from nanoft.config.aliases import ALIASES, translate
from nanoft.config.functions import UNTRUSTED, is_function
from nanoft.config.settings import SECTION_TYPES, Config
from nanoft.io.untrusted import decode_text, parse_json, parse_yaml, read_bytes

ENVIRONMENT_PREFIX = "NANOFT_"
PATHS = ("model.name", "data.train_file", "data.validation_file", "output.dir")


def load_config(path: str | Path, overrides: Iterable[str] = (), environment: Mapping[str, str] = os.environ) -> Config:
    """Read a config file, apply the environment and then the command line's `section.field=value` overrides."""
    overrides = list(overrides)
    config = _expand_home(load_file(path).override(read_overrides(overrides, environment)))
    name = run_name(path, read_overrides(overrides, {}))  # the same on machines with other environments
    return config if config.output.dir else config.override({"output.dir": f"runs/{name}"})


def _expand_home(config: Config) -> Config:
    """~ at the beginning of a path, which a shell leaves in section.field=~/path; several are separated by commas."""

    def expand(path: str) -> str:
        return re.sub(r"(?:^|(?<=,))\s*~[^/,]*", lambda found: os.path.expanduser(found[0].strip()), path)

    given = {name: path for name, path in config.flat().items() if name in PATHS and path and "~" in path}
    return config.override({name: expand(path) for name, path in given.items()})


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
    """The name of the config, and a hash of the overrides if there are any: one directory per experiment."""
    kept = sorted(f"{k}={v}" for k, v in changes.items() if not k.startswith(("logging.", "output.")))
    digest = hashlib.sha256("\n".join(kept).encode("utf-8", "surrogateescape")).hexdigest()[:6]
    return f"{Path(path).stem}-{digest}" if kept else Path(path).stem


def load_file(path: str | Path, beside: str = "") -> Config:
    """Read one config file: Python (defines `config`), YAML or JSON.

    A config that builds on another gives its `__file__` as `beside`, to whose directory `path` is relative.
    """
    path = Path(beside).parent / os.path.expanduser(path)
    if not path.is_file():
        raise UserError(f"{path}: no such config file: try configs/tiny.py")
    try:
        if path.suffix == ".py":
            return _run_python(path)
        tree = _read_tree(path)
        provenance = tree.pop("provenance", None)  # in the config.json of a run
        if not isinstance(provenance, dict | None):
            raise UserError("provenance: not a mapping: the file is corrupted")
        has_settings = any(name in ALIASES or not isinstance(value, Mapping) for name, value in tree.items())
        is_flat = has_settings and not tree.keys() & SECTION_TYPES.keys()
        config = _from_flat(tree) if is_flat else Config.from_dict(tree)
        if provenance is not None and (path.parent / "metrics.jsonl").is_file():  # a run, which may be a copy
            config = config.override({"output.dir": str(path.parent)})
        return _without_functions(config, is_of_run=provenance is not None)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def _without_functions(config: Config, is_of_run: bool) -> Config:
    """Importing a function runs its module, which no file of data may ask for.

    A run's config.json is read without its own metrics, and its own data.format is marked as untrusted.
    """
    metrics, data_format = config.evaluation.metrics, config.data.format
    for field, names in (("data.format", [data_format]), ("evaluation.metrics", metrics)):
        for name in filter(is_function, names):
            if not is_of_run:
                raise UserError(
                    f"{field}: {name}: would run code, which only a Python config may ask for: "
                    f"write one, or give {field}={name} on the command line"
                )
    kept = tuple(name for name in metrics if not is_function(name))
    data_format = UNTRUSTED + data_format if is_function(data_format) else data_format
    return config.override({"evaluation.metrics": kept, "data.format": data_format})


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


def _from_flat(tree: Mapping[str, Any]) -> Config:
    """A config from Hugging Face's names; errors use the names of the file."""
    found = translate(tree)
    try:
        return Config().override({field: value for field, (_, value) in found.items()})
    except UserError as error:
        name, _ = found.get(str(error).partition(":")[0], ("", None))
        raise UserError(f"{name}: {error}" if name else str(error)) from None


def _run_python(path: Path) -> Config:
    """Run a Python config, the user's own program, and return its `config`."""
    spec = importlib.util.spec_from_file_location(f"nanoft_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"line {error.lineno or 1}: {error.msg}") from None
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{type(error).__name__}: {' '.join(str(error).split())}") from None
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        raise UserError("defines no `config`: write config = Config(...)")
    return config
