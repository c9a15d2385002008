"""Prompts that several sequences share: every family against transformers, attention by hand, and the bytes held."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiers import rest_is_slow
from tiny_families import CASES, FIRST, PLAIN, make_family
from torch import Tensor

from nanoft import kernels
from nanoft.attention import CacheContext, Scores
from nanoft.generation import decode
from nanoft.generation.decode import Decoding
from nanoft.generation.shared_prompts import SharedPromptContext, SharedPrompts
from nanoft.model import Decoder
from nanoft.models.weights import load_model
from tiny_models import make_reference

CPU = torch.device("cpu")
A, B, C, D = [5, 9, 3], list(range(1, 18)), [42], [7, 7, 7, 100, 30, 20]
JOIN = {0: [A, B, A, C, A, B], 3: [D, D, B], 4: [C], 14: [B, C, C]}  # at which step
STAY = {2: [5, 0, 1, 4], 6: [0, 2, 5, 6, 7], 9: [2, 4], 12: [1]}  # A has left at 6, B at 9, and D, the last one, at 12
SHARED = {0: [3, 17, 1], 2: [3, 17], 3: [3, 17, 6, 17], 6: [17, 6, 17], 9: [6], 12: [], 14: [17, 1]}  # their lengths
MORE = torch.randint(3, 199, (18, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _always_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "WORTH_SHARING", 0)


@torch.no_grad()
def course(model: Decoder, shared: dict[int, list[int]] | None) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Each sequence of each step, and its last hidden state."""
    decoding, texts, hidden, lengths = Decoding(model), list[list[int]](), torch.empty(0), None
    for step, newest in enumerate(MORE):
        if step in JOIN:
            joined = decoding.join(JOIN[step], len(MORE))
            hidden = torch.cat((hidden, joined)) if texts else joined
            texts += map(list, JOIN[step])
        yield from zip(map(tuple, texts), hidden, strict=True)
        if step in STAY:
            texts = [texts[at] for at in STAY[step]]
            decoding.keep(STAY[step])
        if shared is not None:
            lengths = shared.get(step, lengths)
            assert decoding.shared.lengths == lengths
        for text, token in zip(texts, newest.tolist(), strict=False):
            text.append(token)
        hidden = decoding.step(newest[: len(texts)])


def same_as_passes(reference: Any, models: Iterable[Decoder], shared: dict[int, list[int]] | None = SHARED) -> None:
    """Whether log-probabilities of every token are those of a pass of transformers over the whole sequence."""
    expected = dict[tuple[int, ...], Tensor]()
    for model in models:
        for text, hidden in course(model, shared):
            if text not in expected:
                expected[text] = reference(torch.tensor([text])).logits[0, -1].log_softmax(-1).detach()
            found = model.logits(hidden).log_softmax(-1).detach()
            torch.testing.assert_close(found, expected[text], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", rest_is_slow([(case,) for case in CASES], *[(case,) for case in FIRST]), ids=str)
def test_groups_that_come_and_go_are_passes_over_everything(case: tuple[str, int], tmp_path: Path) -> None:
    reference = make_family(case[0], tmp_path, case[1])
    fast = load_model(tmp_path, CPU, torch.float32).eval()
    assert kernels.apply(fast) == ""
    same_as_passes(reference, [load_model(tmp_path, CPU, torch.float32).eval(), fast])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("phi3", {"original_max_position_embeddings": 20}),
        ("llama", {"rope_parameters": {**PLAIN, "rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 20}),
    ],
)
def test_a_rope_that_depends_on_length_reads_everything_again(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    reference = make_family(family, tmp_path, **changes)
    same_as_passes(reference, [load_model(tmp_path, CPU, torch.float32).eval()], None)


@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_attention_is_the_formula_over_prompt_and_answer(
    window: int | None, cap: float | None, has_sinks: bool
) -> None:
    """Two prompts of 5 and 3 tokens, five sequences, one of which shares none, and which begin in different slots."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    prompts, lengths, empty, slot = [0, 1, 0, -1, 0], [5, 3], [0, 2, 2, 1, 4], 4
    parts = [[drawn(length, 2, 8) for length in lengths] for _ in range(2)]
    keys, values = ({7: torch.nn.utils.rnn.pad_sequence(one, True, 0.0, "left").transpose(1, 2)} for one in parts)
    shared = SharedPrompts(CPU)
    for number, own in enumerate([[0], [1]]):  # one after the other
        some_keys, some_values = ({7: cache[7][own][:, :, 5 - lengths[number] :]} for cache in (keys, values))
        shared.add(some_keys, some_values, [lengths[number]], [])
    shared.prompts = prompts
    shared.prepare(empty)
    q, k, v, sinks = drawn(5, 1, 4, 8), drawn(5, 1, 2, 8), drawn(5, 1, 2, 8), drawn(4) if has_sinks else None
    own_keys, own_values = {7: drawn(5, 2, 6, 8)}, {7: drawn(5, 2, 6, 8)}
    filled = torch.arange(6) >= torch.tensor(empty)[:, None]
    context = CacheContext(CacheContext.tables([], filled), own_keys, own_values, slot, max(empty))
    scores = Scores(8**-0.5, window, cap, has_sinks)
    layer: Any = SimpleNamespace(index=9, source=7, scores=scores, sinks=sinks)
    y = SharedPromptContext(context, shared).attend(q, k, v, layer)
    for at, prompt in enumerate(prompts):
        before = [one[prompt] if prompt >= 0 else one[0][:0] for one in parts]  # (tokens, g, d)
        after = (cache[7][at, :, empty[at] : slot].transpose(0, 1) for cache in (own_keys, own_values))
        seen = (torch.cat(three) for three in zip(before, after, (k[at], v[at]), strict=True))
        all_keys, all_values = (part[-(window or 99) :].repeat_interleave(2, dim=1) for part in seen)
        s = torch.einsum("hd,khd->hk", q[at, 0], all_keys) / 8**0.5
        s = s if cap is None else cap * (s / cap).tanh()
        total = s.exp().sum(-1) + (0 if sinks is None else sinks.exp())
        expected = torch.einsum("hk,khd->hd", s.exp() / total[:, None], all_values)
        torch.testing.assert_close(y[at, 0], expected, rtol=0, atol=1e-12)


def held(decoding: Decoding) -> int:
    """Bytes of keys and values."""
    caches = (decoding.keys, decoding.values, decoding.shared.keys, decoding.shared.values)
    storages = [tensor.untyped_storage() for cache in caches for tensor in cache.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())


@torch.no_grad()
def test_each_prompt_is_held_once_until_its_last_sequence_leaves(tmp_path: Path) -> None:
    make_reference("mistral", tmp_path)
    model = load_model(tmp_path, CPU, torch.bfloat16)
    decoding, c = Decoding(model), model.config
    token = 2 * c.num_layers * c.num_kv_heads * c.head_dim * 2  # bytes
    decoding.join([A] * 8 + [B] * 4, 5)
    assert held(decoding) == token * (2 * len(B) + 12 * 5)
    decoding.step(torch.arange(12))
    decoding.keep([0, 1, 2, 8])
    assert held(decoding) == token * (2 * len(B) + 4 * 5)
    decoding.keep([0, 2])
    assert held(decoding) == token * (len(A) + 2 * 5)
    decoding.join([C], 5)  # after the slot of the step
    assert held(decoding) == token * (len(A) + 3 * (1 + 5))
    decoding.keep([2])
    assert held(decoding) == token * (1 + 5)
    decoding.keep([])
    assert held(decoding) == 0
