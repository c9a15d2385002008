"""Every notebook is clean, and its code runs offline from the repository root, as one script.

A notebook with the metadata {"nanoft": {"needs": "gpu"}} is compiled only.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "notebooks").glob("*.ipynb")}
SECONDS = 1200  # limit of a run beside other work; two idle cores need far less


def needs_gpu(notebook: dict[str, Any]) -> bool:
    return notebook["metadata"].get("nanoft", {}).get("needs") == "gpu"


def code_of(notebook: dict[str, Any]) -> str:
    """The code cells as one script, without the lines that only IPython reads: `!pip ...`, `%matplotlib ...`."""
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return "\n\n".join(re.sub(r"^( *)[!%].*$", r"\1pass", cell, flags=re.MULTILINE) for cell in cells)


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_a_notebook_is_valid_clean_and_compiles(name: str) -> None:
    notebook = NOTEBOOKS[name]
    assert notebook["nbformat"] == 4
    assert {"metadata", "nbformat_minor", "cells"} <= notebook.keys()
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown"), f"{name}: {cell}"
        assert {"metadata", "source"} <= cell.keys(), f"{name}: {cell}"
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], f"{name}: strip the outputs (Restart Kernel and Clear Outputs)"
            assert cell["execution_count"] is None, f"{name}: strip the execution counts"
    if notebook["nbformat_minor"] >= 5:  # each cell has an id of its own
        ids = [cell["id"] for cell in notebook["cells"]]
        assert len(set(ids)) == len(ids)
        assert all(re.fullmatch(r"[\w-]{1,64}", cell_id) for cell_id in ids)
    compile(code_of(notebook), name, "exec")
    code = [line for cell in notebook["cells"] if cell["cell_type"] == "code" for line in cell["source"]]
    assert needs_gpu(notebook) or not any(line.lstrip().startswith("!") for line in code), "its test skips this line"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name, notebook in NOTEBOOKS.items() if not needs_gpu(notebook)))
def test_a_notebook_runs(name: str, tmp_path: Path) -> None:
    script = tmp_path / f"{Path(name).stem}.py"
    script.write_text(code_of(NOTEBOOKS[name]), encoding="utf-8")
    offline = {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_cells_of_the_first_notebook_are_the_page() -> None:
    """Each is cut out of nanoft/nano.py, except those that begin with `# look`; no function of the page is missing."""
    page = (ROOT / "nanoft" / "nano.py").read_text(encoding="utf-8")
    script = textwrap.dedent(page.partition('if __name__ == "__main__":\n')[2])
    codes = ["".join(c["source"]) for c in NOTEBOOKS["01_one_page.ipynb"]["cells"] if c["cell_type"] == "code"]
    cut = [code for code in codes if not code.startswith("# look")]
    for code in cut:
        assert f"\n{code}\n" in f"\n{page}" or f"\n{code}\n" in f"\n{script}", f"nano.py has not, or not so:\n{code}"
    for name in re.findall(r"^(?:def|class) (\w+)", page, re.MULTILINE):
        assert any(re.search(rf"^(def|class) {name}\b", code, re.MULTILINE) for code in cut), f"no cell has {name}"


def test_the_lines_of_ipython_are_left_out() -> None:
    cell = {"cell_type": "code", "source": ["if True:\n", "    !ls\n", "%time x = 1\n", "y = 5 % 3\n"]}
    notebook = {"cells": [{"cell_type": "markdown", "source": ["# Title"]}, cell]}
    assert code_of(notebook) == "if True:\n    pass\npass\ny = 5 % 3\n"
