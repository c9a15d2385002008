"""A sample that is longer than the model is to see: left out, or cut where it hurts least.

Cutting token ids blindly ruins samples: it takes the answer, or the question, or the system text, and some tools then
write an end-of-sequence token over the wound, which teaches the model to stop in the middle. Here a prompt is cut as a
conversation and rendered again, so it stays a conversation: the system text and the last turns are kept, and of a
single long message its beginning and its end. An answer is cut at its tail and simply ends there, without a stop token.
Whatever is cut is counted; a sample without a target is never kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from nanoft import UserError
from nanoft.batches import Sample
from nanoft.data.chat_tokenizer import ChatTokenizer, Message
from nanoft.data.formats import Conversation

OMITTED = " [...] "  # stands for the middle of a message that was cut
ATTEMPTS = 24


def fit(
    sample: Sample,
    conversation: Conversation,
    chat: ChatTokenizer,
    limit: int,
    policy: str,
    train_on: str = "assistant",
) -> Sample | None:
    """The sample with at most `limit` tokens, or None if it has to go.

    Args:
        policy: `drop`; `prompt` (cut the prompt, keep every target of what is kept); `response` (cut the tail);
            `proportional` (both, in proportion to their lengths); `reject` (nothing may be too long).
    Raises:
        UserError: the policy is `reject`, and the sample is too long.
    """
    if len(sample.ids) <= limit or policy == "drop":
        return sample if len(sample.ids) <= limit else None
    if policy == "reject":
        raise UserError(
            f"{conversation.file}:{conversation.line}: {len(sample.ids):,} tokens are more than "
            f"model.max_seq_length={limit}: raise it, or choose another data.truncation"
        )
    if policy == "response":
        return cut_response(sample, limit)
    if policy == "prompt":
        return cut_prompt(sample, conversation, chat, limit, train_on)
    targets = int(sample.is_target.sum())
    kept_targets = max(1, limit * targets // len(sample.ids))
    shorter = cut_prompt(sample, conversation, chat, limit + targets - kept_targets, train_on)
    return cut_response(shorter or sample, limit)


def cut_response(sample: Sample, limit: int) -> Sample | None:
    """The first `limit` tokens, up to the last target among them."""
    targets = np.flatnonzero(sample.is_target[:limit])
    if not len(targets):
        return None
    end = int(targets[-1]) + 1
    return Sample(sample.ids[:end], sample.is_target[:end], sample.record, sample.turn)


def cut_prompt(
    sample: Sample, conversation: Conversation, chat: ChatTokenizer, limit: int, train_on: str
) -> Sample | None:
    """Without the oldest exchanges; if the last one alone is too long, without the middle of its longest message."""
    if len(sample.ids) <= limit:
        return sample
    messages = _only_turn(conversation.messages, sample.turn)
    asked = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        return None  # a plain text: everything is a target

    def attempt(shorter: list[Message]) -> Sample:
        rendered = chat.render_samples(shorter, sample.record, conversation.tools, train_on)
        return chat.encode_now(rendered)[-1]

    head = messages[:1] if messages[0]["role"] == "system" else []
    fewest, most = 1, len(asked) - 1  # exchanges dropped: the fewest that are enough, by bisection
    while fewest < most:
        middle = (fewest + most) // 2
        enough = len(attempt([*head, *messages[asked[middle] :]]).ids) <= limit
        fewest, most = (fewest, middle) if enough else (middle + 1, most)
    kept = [*head, *messages[asked[most] :]]
    return _with_targets(_cut_longest(kept, attempt, limit))


def _only_turn(messages: list[Message], turn: int | None) -> list[Message]:
    """The conversation up to a turn that is a sample of its own, and nothing else in it learned."""
    if turn is None:
        return messages
    earlier = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages[:turn]]
    return [*earlier, messages[turn]]


def _cut_longest(messages: list[Message], attempt: Callable[[list[Message]], Sample], limit: int) -> Sample | None:
    """Cut more and more out of the middle of the longest message that is not an answer, until the sample fits."""
    said = [index for index, message in enumerate(messages) if message["role"] in ("user", "tool")]
    longest = max(said, key=lambda index: len(messages[index]["content"]))
    content = messages[longest]["content"]
    keep = len(content)
    for _ in range(ATTEMPTS):
        sample: Sample = attempt(messages)
        excess = len(sample.ids) - limit
        if excess <= 0:
            return sample
        if keep <= 1:
            return None
        characters = sum(len(message["content"]) for message in messages) / len(sample.ids)  # in a token
        keep = max(1, keep - max(1, math.ceil(1.05 * excess * characters)))
        cut = content[: (keep + 1) // 2] + OMITTED + (content[-(keep // 2) :] if keep > 1 else "")
        messages = [*messages[:longest], {**messages[longest], "content": cut}, *messages[longest + 1 :]]
    return None


def _with_targets(sample: Sample | None) -> Sample | None:
    return sample if sample is not None and sample.is_target.any() else None
