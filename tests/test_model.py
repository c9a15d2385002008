"""The decoder against transformers, architecture by architecture."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoft import UserError
from nanoft.attention import Documents
from nanoft.config import LoRAConfig
from nanoft.kernels import compile_blocks
from nanoft.lora import inject_lora
from nanoft.model import Decoder, select
from nanoft.models.families import decoder_config
from nanoft.models.weights import load_model
from tiny_models import CASES, make_reference

CPU = torch.device("cpu")
COMPILE = torch.nn.Module.compile


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_tokens_equal_transformers(case: str, tmp_path: Path) -> None:
    reference = make_reference(case, tmp_path)
    model = load_model(tmp_path, CPU, torch.float32)
    ids = torch.randint(0, 199, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.logits(model(ids)), reference(ids).logits
        assert (ours - theirs).abs().max() < 1e-4
        assert theirs.std() > 0.1  # logits that say something
        settings = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0}
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), **settings)[:, 48:]
    assert torch.equal(greedy(model, ids, 64), expected)


@torch.no_grad()
def greedy(model: Decoder, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy decoding without a cache."""
    start = ids.shape[1]
    for _ in range(count):
        ids = torch.cat((ids, model.logits(model(ids)[:, -1]).argmax(-1, keepdim=True)), dim=1)
    return ids[:, start:]


def test_packed_documents_equal_the_same_documents_alone(tmp_path: Path) -> None:
    make_reference("mistral-window", tmp_path)  # the second one is longer than the window
    model = load_model(tmp_path, CPU, torch.float32)
    first, second = torch.randint(0, 199, (1, 10)), torch.randint(0, 199, (1, 30))
    positions = torch.cat((torch.arange(10), torch.arange(30)))[None]
    documents = Documents((10, 30), torch.tensor([0, 10, 40], dtype=torch.int32))
    with torch.no_grad():
        packed = model(torch.cat((first, second), dim=1), positions, documents)
        assert (packed[:, :10] - model(first)).abs().max() < 1e-5
        assert (packed[:, 10:] - model(second)).abs().max() < 1e-5


@pytest.mark.parametrize("keep", ["all", "input", "offloaded"])
@pytest.mark.parametrize("case", ["mistral", "qwen3", "llama-bias"])
def test_some_rows_are_those_of_all_and_so_are_their_gradients(case: str, keep: Any, tmp_path: Path) -> None:
    make_reference(case, tmp_path)
    ids = torch.randint(0, 199, (2, 12), generator=torch.Generator().manual_seed(1))

    def run(rows: torch.Tensor, chosen: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = load_model(tmp_path, CPU, torch.float32)
        model.activation_policy = [keep] * 3
        hidden = model(ids, target_positions=rows) if chosen else select(model(ids), rows)
        hidden.sin().sum().backward()
        return hidden, {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}

    for rows in (torch.tensor([3, 4, 11, 17]), torch.arange(24), torch.zeros(0, dtype=torch.int64)):
        (few, own), (all_, other) = run(rows, True), run(rows, False)
        assert few.shape == (1, len(rows), 64)
        assert torch.allclose(few, all_, atol=1e-5)
        assert own.keys() == other.keys()
        assert all(torch.allclose(own[name], other[name], atol=1e-4, rtol=1e-4) for name in own)


def test_neftune_noise_is_uniform_in_alpha_over_the_root_of_its_size_and_only_there_in_training(tmp_path: Path) -> None:
    make_reference("llama", tmp_path)
    model, ids = load_model(tmp_path, CPU, torch.float32), torch.arange(100).view(2, 50)
    plain = model.eval()(ids)
    model.neftune_alpha = 5.0
    assert torch.equal(model(ids), plain)
    entered: list[torch.Tensor] = []
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].detach()))
    assert not torch.equal(model.train()(ids), plain)
    noise, bound = entered[0] - model.model.embed_tokens(ids).detach(), 5 / (50 * model.config.hidden_size) ** 0.5
    assert 0.99 * bound < noise.abs().max() <= 1.001 * bound
    assert abs(noise.std() / bound - 3**-0.5) < 0.02  # of a uniform distribution


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_have_the_gradients_of_eager_ones(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_reference("qwen3", tmp_path)
    lengths = (12, 8, 20)
    documents = Documents(lengths, torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0).int())
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 20)
    ids = torch.randint(0, 199, (2, 20), generator=torch.Generator().manual_seed(1))

    def gradients(compiled: bool, keep: Any) -> dict[str, torch.Tensor]:
        model = load_model(tmp_path, CPU, torch.float32)
        model.activation_policy = ["all", keep, keep]
        if compiled:
            monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(COMPILE, backend=backend))
            compile_blocks(model)
        model(ids, positions, documents).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients(False, "all")
    for keep in ("all", "input"):
        found = gradients(True, keep)
        assert all(torch.allclose(found[n], expected[n], rtol=1e-4, atol=1e-4) for n in expected)


@pytest.mark.parametrize("case", ["llama3-rope", "qwen2-window", "mistral-window"])
def test_classic_and_current_config_give_the_same_shape(case: str, tmp_path: Path) -> None:
    make_reference(case, tmp_path)
    current = json.loads((tmp_path / "config.json").read_text())
    classic = dict(current)
    rope = classic.pop("rope_parameters")
    classic["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        classic["rope_scaling"] = {("type" if k == "rope_type" else k): v for k, v in rope.items() if k != "rope_theta"}
    classic.pop("layer_types", None)
    classic["torch_dtype"] = classic.pop("dtype")
    a, b = decoder_config(current), decoder_config(classic)
    assert (a.windows, a.ropes[0].theta, a.ropes[0].kind) == (b.windows, b.ropes[0].theta, b.ropes[0].kind)
    assert torch.equal(a.ropes[0].angles(a.head_dim)[0], b.ropes[0].angles(b.head_dim)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "architectures: BloomForCausalLM"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
    ],
)
def test_what_changes_the_maths_and_is_unknown_is_refused(change: dict[str, object], message: str) -> None:
    base = {"architectures": ["MistralForCausalLM"], "vocab_size": 9, "hidden_size": 8, "intermediate_size": 8}
    base |= {"num_attention_heads": 2, "num_hidden_layers": 1}
    assert decoder_config(base).windows == (4096,)  # Mistral's default when the key is absent
    with pytest.raises(UserError, match=message):
        decoder_config(base | change)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("quantization", [None, ("nf4", True)])
def test_compiled_blocks_on_cuda_have_the_gradients_of_eager_ones(quantization: Any, tmp_path: Path) -> None:
    make_reference("mistral", tmp_path)
    ids = torch.randint(0, 199, (2, 64), generator=torch.Generator().manual_seed(1)).cuda()

    def gradients(compiled: bool) -> list[torch.Tensor]:
        model = load_model(tmp_path, torch.device("cuda"), torch.bfloat16, quantization)
        adapters = inject_lora(model, LoRAConfig(rank=8, alpha=16.0), seed=1)
        for number, adapter in enumerate(adapters.values()):
            generator = torch.Generator("cuda").manual_seed(number)
            torch.nn.init.normal_(adapter.lora_B, std=0.05, generator=generator)
        if compiled:
            compile_blocks(model)
        model(ids).float().square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for own, other in zip(gradients(True), gradients(False), strict=True):
        assert (own - other).norm() < 0.03 * other.norm()
