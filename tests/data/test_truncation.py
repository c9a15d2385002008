"""Samples that are too long: what is cut, what is kept, and what is never done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from templates import CONTROL, STYLES, save

from nanoft import UserError
from nanoft.batches import Sample
from nanoft.data import truncation
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.formats import Conversation
from nanoft.data.truncation import OMITTED, chunk

POLICIES = ["drop", "prompt", "response", "proportional"]
LONG = "I want euros for my 921 rupees, please. "


def fit(sample: Sample, conversation: Conversation, chat: ChatTokenizer, limit: int, policy: str) -> Sample | None:
    """A sample alone, as in supervised training."""
    found = truncation.fit([sample], [conversation.messages], conversation, chat, limit, policy, "assistant")
    return found[0] if found else None


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    root = tmp_path_factory.mktemp("truncate")
    return {name: ChatTokenizer(save(root / name, STYLES[name])) for name in ("chatml", "llama", "qwen")}


def talk(*turns: tuple[str, str]) -> Conversation:
    return Conversation([{"role": role, "content": content} for role, content in turns], None, "data.jsonl", 3)


def encode(chat: ChatTokenizer, conversation: Conversation) -> list[Sample]:
    return chat.encode_now(chat.render_samples(conversation.messages, 0))


def targets_of(sample: Sample) -> list[int]:
    ids: list[int] = sample.ids[sample.is_target].tolist()
    return ids


def shorten(chat: ChatTokenizer, conversation: Conversation, limit: int, policy: str) -> Sample | None:
    (sample,) = encode(chat, conversation)
    return fit(sample, conversation, chat, limit, policy)


EXCHANGES = talk(
    ("system", "Be brief."), *[(role, f"{role} {n} " + LONG * n) for n in (3, 2, 1) for role in ("user", "assistant")]
)
ONE = talk(("system", "Be brief."), ("user", "First word. " + LONG * 9 + "Last word."), ("assistant", "Yes, please."))


def test_what_fits_is_untouched_by_every_policy(chats: dict[str, ChatTokenizer]) -> None:
    for chat in (chats["chatml"], chats["llama"]):
        (whole,) = encode(chat, ONE)
        for policy in [*POLICIES, "reject"]:
            assert fit(whole, ONE, chat, len(whole.ids), policy) is whole


def test_drop_and_reject(chats: dict[str, ChatTokenizer]) -> None:
    chat = chats["chatml"]
    (whole,) = encode(chat, ONE)
    limit = len(whole.ids) - 1
    assert fit(whole, ONE, chat, limit, "drop") is None
    with pytest.raises(UserError, match=rf"^data\.jsonl:3: {len(whole.ids):,} tokens, .*max_seq_length={limit}"):
        fit(whole, ONE, chat, limit, "reject")


@pytest.mark.parametrize("style", ["chatml", "llama"])
def test_the_oldest_exchanges_go_first_and_the_system_text_stays(chats: dict[str, ChatTokenizer], style: str) -> None:
    chat = chats[style]
    kept_turns = {}
    (whole,) = encode(chat, EXCHANGES)
    for first in (1, 3, 5):  # the conversation from each of its user turns on is what a limit of its length leaves
        rest = Conversation([EXCHANGES.messages[0], *EXCHANGES.messages[first:]], None, "data.jsonl", 3)
        (expected,) = encode(chat, rest)
        for limit in (len(expected.ids), len(expected.ids) + 1):
            found = fit(whole, EXCHANGES, chat, limit, "prompt")
            assert found is not None
            assert found.ids.tolist() == expected.ids.tolist()
            assert found.is_target.tolist() == expected.is_target.tolist()
        kept_turns[first] = len(expected.ids)
    assert len(set(kept_turns.values())) == 3


@pytest.mark.parametrize("style", ["chatml", "llama"])
def test_a_single_long_message_keeps_its_beginning_and_its_end(chats: dict[str, ChatTokenizer], style: str) -> None:
    chat = chats[style]
    (whole,) = encode(chat, ONE)
    for limit in range(len(whole.ids) - 1, len(whole.ids) - 150, -17):
        found = fit(whole, ONE, chat, limit, "prompt")
        assert found is not None
        assert 0.75 * limit < len(found.ids) <= limit
        text = chat.decode(found.ids.tolist(), keep_special=True)
        assert "First w" in text
        assert "word." in text.split(OMITTED)[1]
        assert "Be brief." in text
        assert targets_of(found) == targets_of(whole)
    assert fit(whole, ONE, chat, len(targets_of(whole)) + 3, "prompt") is None  # not even the headers fit


@pytest.mark.parametrize("style", ["chatml", "llama"])
def test_a_response_is_cut_at_its_tail_and_gets_no_end(chats: dict[str, ChatTokenizer], style: str) -> None:
    chat = chats[style]
    conversation = talk(("user", "Go"), ("assistant", LONG * 5))
    (whole,) = encode(chat, conversation)
    first = int(whole.is_target.argmax())
    for limit in range(first + 1, len(whole.ids) - 1, 7):
        found = fit(whole, conversation, chat, limit, "response")
        assert found is not None
        assert found.ids.tolist() == whole.ids[:limit].tolist()
        assert found.ids[-1] not in chat.stop_ids
        assert found.is_target[-1]
    assert fit(whole, conversation, chat, first, "response") is None  # no target would be left


def test_a_cut_response_ends_with_a_target(chats: dict[str, ChatTokenizer]) -> None:
    chat = chats["chatml"]
    conversation = talk(("user", "a"), ("assistant", "b"), ("user", LONG), ("assistant", "c"))
    (whole,) = encode(chat, conversation)
    found = fit(whole, conversation, chat, len(whole.ids) - 10, "response")
    assert found is not None
    assert chat.decode(found.ids.tolist(), keep_special=True).endswith("assistant\nb<|im_end|>")


def test_proportional_cuts_both(chats: dict[str, ChatTokenizer]) -> None:
    chat = chats["chatml"]
    conversation = talk(("user", "Q " + LONG * 8), ("assistant", "A " + LONG * 4))
    (whole,) = encode(chat, conversation)
    targets = len(targets_of(whole))
    limit = len(whole.ids) // 2
    found = fit(whole, conversation, chat, limit, "proportional")
    assert found is not None
    assert len(found.ids) <= limit
    assert abs(len(targets_of(found)) - targets / 2) <= 2
    assert targets_of(found) == targets_of(whole)[: len(targets_of(found))]
    prompt = len(found.ids) - len(targets_of(found))
    assert 0.7 < prompt / (len(whole.ids) - targets) * 2 <= 1.05


def test_a_turn_of_a_rewritten_history_is_cut_alone(chats: dict[str, ChatTokenizer]) -> None:
    chat = chats["qwen"]
    conversation = talk(
        ("user", LONG * 3), ("assistant", "<think>\nh\n</think>\n\nOne"), ("user", "b"), ("assistant", "Two")
    )
    first, second = encode(chat, conversation)
    assert (first.turn, second.turn) == (1, 3)
    found = fit(second, conversation, chat, 40, "prompt")
    assert found is not None
    assert chat.decode(targets_of(found), keep_special=True) == "Two<|im_end|>"
    assert "One" not in chat.decode(found.ids.tolist())
    cut = fit(first, conversation, chat, 60, "prompt")
    assert cut is not None
    assert chat.decode(targets_of(cut), keep_special=True) == "<think>\nh\n</think>\n\nOne<|im_end|>"


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("length", [9, 10, 15, 16, 57])
def test_every_token_of_a_chunked_text_is_a_target_once(length: int, has_bos: bool) -> None:
    ids = np.arange(100, 100 + length, dtype=np.int32)
    whole = Sample(ids, np.arange(length) > 0, record=7)
    pieces = chunk(whole, 8, bos_id=100 if has_bos else None)
    assert np.concatenate([piece.ids[piece.is_target] for piece in pieces]).tolist() == ids[1:].tolist()
    for piece in pieces:
        assert len(piece.ids) <= 8
        assert piece.record == 7
        first = int(piece.is_target.argmax())
        assert piece.ids[first - 1] == piece.ids[first] - 1  # predicted from the token before it
        assert piece.is_target[first:].all()
        assert (piece.ids[0] == 100) or not has_bos


def test_plain_text_has_no_prompt_to_cut(chats: dict[str, ChatTokenizer]) -> None:
    chat = chats["chatml"]
    text = Conversation([], LONG * 5, "data.jsonl", 1)
    (whole,) = chat.encode_now([chat.text_sample(text.text or "", 0)])
    assert fit(whole, text, chat, 50, "prompt") is None
    cut = fit(whole, text, chat, 50, "response")
    assert cut is not None
    assert cut.ids.tolist() == whole.ids[:50].tolist()


words = st.lists(st.sampled_from([*"ab é😀\n", "<|im_end|>"]), min_size=1, max_size=60).map("".join).filter(str.strip)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(st.tuples(words, words), min_size=1, max_size=4),
    limit=st.integers(8, 150),
    policy=st.sampled_from(POLICIES),
    style=st.sampled_from(["chatml", "llama", "qwen"]),
)
def test_whatever_is_cut(
    chats: dict[str, ChatTokenizer], turns: list[Any], limit: int, policy: str, style: str
) -> None:
    """Never too long, never without a target, never a control token that was not there, never an end that was not."""
    chat = chats[style]
    spoken = [turn for asked, said in turns for turn in (("user", asked), ("assistant", said))]
    conversation = talk(*spoken)
    for sample in encode(chat, conversation):
        found = fit(sample, conversation, chat, limit, policy)
        if found is None:
            assert len(sample.ids) > limit
            continue
        assert len(found.ids) == len(found.is_target) <= limit
        assert found.is_target.any()
        assert not found.is_target[0]
        controls = [sum(token < len(CONTROL) for token in s.ids.tolist()) for s in (found, sample)]
        assert controls[0] <= controls[1]
        ends = [[t for t in targets_of(s) if t in chat.stop_ids] for s in (found, sample)]
        assert len(ends[0]) <= len(ends[1])
        if policy == "prompt":
            assert targets_of(sample)[-len(targets_of(found)) :] == targets_of(found)
        if policy == "response":
            assert sample.ids[: len(found.ids)].tolist() == found.ids.tolist()
