"""llama.cpp's graphs: each exported family has one, under a name that gguf-py knows."""

from __future__ import annotations

import gguf
import pytest

from nanoft.export.gguf_graphs import GRAPHS
from nanoft.models.families import FAMILIES

EXPORTED = {name: family.gguf for name, family in FAMILIES.items() if family.gguf is not None}


@pytest.mark.parametrize("family", EXPORTED)
def test_every_exported_family_has_a_graph_of_llama_cpp(family: str) -> None:
    assert EXPORTED[family] in GRAPHS
    assert EXPORTED[family] in gguf.MODEL_ARCH_NAMES.values()


def test_no_graph_is_without_a_family() -> None:
    assert set(GRAPHS) <= set(EXPORTED.values())
