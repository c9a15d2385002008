"""Collects the largest differences that the tests of families find: pytest --differences bench/families.md"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from nanoft.io.tables import markdown_table
from nanoft.models.families import FAMILIES

# How a difference is measured, by its name in `differs`; the order of the columns.
CHECKS = {
    "logits": "of logits, from transformers: the plain and the fast forward pass, short and long inputs",
    "gradients": "of the gradients of all parameters, from transformers, as a share of each norm",
    "packed": "of hidden states of packed documents, from those of the documents alone",
    "recomputed": "of gradients on packed documents, kernels and recomputed blocks, from the plain code, likewise",
    "LoRA": "of adapters after a step, from PEFT",
    "QLoRA": "the same on an NF4 base, from PEFT with bitsandbytes",
    "PEFT": "of logits of an adapter, from PEFT, which reads our files, and we its files",
    "merged": "of logits of a merged model in transformers, from base and adapter",
    "GGUF": "of logits of a merged model in llama.cpp, from base and adapter",
    "GGUF LoRA": "of logits of base and adapter file in llama.cpp",
    "MLX": "of logits of base and adapter in mlx-lm",
    "plan float32": "of the planned peak of memory from the measured one",
    "plan bfloat16": "of the planned peak of memory in bfloat16 from the measured one",
}
HEAD = """# Families: the largest differences

Random models of every family, as in tests/tiny_families.py, in float32 on a CPU. Written by

    pytest --differences bench/families.md tests/models tests/export/test_gguf.py

for one shape of each family; with -m '', for all shapes. In every family, 64 greedy tokens equal those of transformers,
greedy answers equal those of llama.cpp, and two processes train the same bits as one. llama.cpp's GELU is a table in
float16.
"""


def noted(reports: Iterable[Any]) -> Iterator[tuple[str, str, float]]:
    """(family, check, difference) of each report of a test."""
    for report in reports:
        parameters = report.nodeid.partition("[")[2]
        family = next((name for name in FAMILIES if re.search(rf"\b{name}\b", parameters)), None)
        for check, found in report.user_properties:
            if family and check in CHECKS:
                yield family, check, found


def table(reports: Iterable[Any]) -> str:
    largest: dict[tuple[str, str], float] = {}
    for family, check, found in noted(reports):
        largest[family, check] = max(found, largest.get((family, check), found), key=abs)
    checks = [check for check in CHECKS if any(name == check for _, name in largest)]
    rows = [[family, *(_shown(check, largest.get((family, check))) for check in checks)] for family in FAMILIES]
    explained = "".join(f"- {check}: {CHECKS[check]}\n" for check in checks)
    return f"{HEAD}\n{markdown_table(['family', *checks], rows)}\n\nLargest difference\n\n{explained}"


def _shown(check: str, found: float | None) -> str:
    return "" if found is None else f"{found:+.1%}" if check.startswith("plan") else f"{found:.1e}"
