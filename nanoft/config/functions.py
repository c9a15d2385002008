"""User-defined functions, which a config names as `package.module:function`.

Importing a module runs it, so such a name is accepted only from a Python config, the command line and the environment,
never from a data file (YAML, JSON, a run's config.json): see `loading.py`.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanoft import UserError

FUNCTION = re.compile(r"(?!regex:)[A-Za-z_][\w.]*:[A-Za-z_]\w*")
UNTRUSTED = "untrusted "  # prefix of a function name that comes from a run's config.json
RUN = "run:"  # in rl.reward, the prefix of a reward model's run directory


def is_function(name: str) -> bool:
    return FUNCTION.fullmatch(name) is not None


def import_function(name: str, field: str, signature: str) -> Callable[..., Any]:
    """Import `package.module:function`; the current directory is searched last. The rest is for error messages."""
    here = os.getcwd()
    sys.path.append(here)
    try:
        found = pkgutil.resolve_name(name)
    except UserError:
        raise
    except Exception as error:  # the module is the user's program, and so is the mistake
        raise UserError(f"{field}: {name}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise UserError(f"{field}: {name}: not a function: define def {name.partition(':')[2]}{signature}")
    return found


def source_file(function: Callable[..., Any]) -> Path | None:
    """The Python file that defines a function; None for a built-in."""
    try:
        return Path(inspect.getfile(inspect.unwrap(function)))
    except TypeError:
        return None
