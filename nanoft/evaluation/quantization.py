"""The cost of quantization: perplexity of base and adapter on the original and on quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from nanoft import UserError
from nanoft.io.tables import markdown_table
from nanoft.lora import DoRALinear, disabled
from nanoft.models.model_files import ModelFiles
from nanoft.models.open import LoadedModel
from nanoft.nf4 import quantize


def compare_quantization(
    source: str, loaded: LoadedModel, perplexity: Callable[[], float | None]
) -> tuple[dict[str, Any], str]:
    """Figures and a table for the run's own quantization, or else NF4; the model stays quantized.

    `perplexity` evaluates `loaded.model` in its current state.
    """
    form = loaded.quantization or ("nf4", True)
    if not loaded.adapters:
        raise UserError(f"--quantization: {source} has no adapter: name a LoRA run or an adapter")
    if ModelFiles.read(loaded.base_directory).quantization:
        raise UserError(
            f"--quantization: {loaded.base_directory} has quantized weights only: name a run on the original"
        )

    def both() -> dict[str, float | None]:
        with disabled(loaded.adapters):
            base = perplexity()
        return {"base": base, "tuned": perplexity()}

    figures = {"original": both()}
    for name, linear in list(loaded.model.named_modules()):  # one after another; the adapters stay
        if isinstance(linear, nn.Linear) and name.startswith("model.layers."):
            quantized = quantize(linear.weight.detach(), form, loaded.dtype)
            quantized.register_parameter("bias", linear.bias)
            loaded.model.set_submodule(name, quantized)
    for adapter in loaded.adapters.values():
        if isinstance(adapter, DoRALinear):
            adapter.measure_base()
    figures[form[0]] = both()
    rows = [[weights, *(f"{value:.5g}" for value in pair.values())] for weights, pair in figures.items()]
    trained_on = f"{loaded.quantization[0]} weights" if loaded.quantization else "the original weights"
    text = f"{markdown_table(['perplexity on weights', 'base', 'tuned'], rows)}\n\ntrained on {trained_on}"
    return {"quantization": figures}, text
