"""Tests of nanoft/evaluation/quantization.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nanoft import UserError
from nanoft.evaluation.quantization import compare_quantization
from nanoft.models.open import open_model
from nanoft.nf4 import PackedLinear, quantize
from tiny_models import make_chat_model, train_run, write_records

CPU = torch.device("cpu")


def test_base_and_adapter_are_evaluated_on_both_weights(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base")
    run = train_run(tmp_path / "run", tmp_path / "base", write_records(tmp_path / "data.jsonl"))
    loaded = open_model(str(run), CPU, torch.float32)
    ids, original = torch.arange(5, 40)[None], {}
    for name, adapter in loaded.adapters.items():
        original[name] = adapter.base.weight.detach().clone()  # type: ignore[union-attr]
        with torch.no_grad():
            adapter.lora_B.add_(0.1)
    logits: list[torch.Tensor] = []

    def perplexity() -> float:
        with torch.no_grad():
            logits.append(loaded.model.logits(loaded.model(ids)))
        return float(len(logits))

    figures, text = compare_quantization(str(run), loaded, perplexity)
    assert figures == {"quantization": {"original": {"base": 1.0, "tuned": 2.0}, "nf4": {"base": 3.0, "tuned": 4.0}}}
    assert text.endswith("trained on the original weights")
    pairs = [(i, j) for i in range(4) for j in range(i)]
    assert all(not torch.equal(logits[i], logits[j]) for i, j in pairs)  # four different models
    for name, adapter in loaded.adapters.items():
        assert isinstance(adapter.base, PackedLinear)
        expected = quantize(original[name], ("nf4", True), torch.float32).dequantize()
        assert torch.equal(adapter.base.dequantize(), expected)


def test_a_model_without_an_adapter_has_nothing_to_compare(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "base")
    loaded = open_model(str(tmp_path / "base"), CPU, torch.float32)
    with pytest.raises(UserError, match=r"--quantization: .* has no adapter"):
        compare_quantization(str(tmp_path / "base"), loaded, lambda: 1.0)
