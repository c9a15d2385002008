"""Samples longer than model.max_seq_length: plain text in chunks, others dropped, or cut where it does the least harm.

Cutting token ids blindly loses the answer, the question or the system message, and an end-of-sequence token behind the
cut teaches the model to stop in the middle. Here a prompt is shortened as a conversation and rendered again: the system
message and the last turns are kept, and of a single long message its beginning and end. An answer loses its tail, and
the token that ends the turn. A sample without target tokens is never kept.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

import numpy as np

from nanoft import UserError
from nanoft.batches import Sample
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.formats import Conversation, Message

OMITTED = " [...] "  # replaces the middle of a message


def fit(
    sample: Sample, conversation: Conversation, tokenizer: ChatTokenizer, limit: int, policy: str, train_on: str
) -> Sample | None:
    """The sample with at most `limit` tokens; None if it is dropped.

    Args:
        policy: `drop`; `prompt` (shorten the prompt, keep all targets of what is kept); `response` (cut the tail);
            `proportional` (both, in proportion to their lengths); `reject` (raise a UserError).
    """
    if len(sample.ids) <= limit or policy == "drop":
        return sample if len(sample.ids) <= limit else None
    if policy == "reject":
        where = f"{conversation.file}:{conversation.line}: {len(sample.ids):,} tokens"
        fix = "raise it, or choose another data.truncation"
        raise UserError(f"{where} are more than model.max_seq_length={limit}: {fix}")
    if policy == "response":
        return _cut_response(sample, limit)
    if policy == "prompt":
        return _shorten_prompt(sample, conversation, tokenizer, limit, train_on)
    targets = int(sample.is_target.sum())
    kept_targets = max(1, limit * targets // len(sample.ids))
    shorter = _shorten_prompt(sample, conversation, tokenizer, limit + targets - kept_targets, train_on)
    return _cut_response(shorter or sample, limit)


def chunk(sample: Sample, limit: int, bos_id: int | None) -> list[Sample]:
    """A plain text as samples of at most `limit` tokens, in which every token is a target exactly once.

    Each begins where inference would: with the BOS, if there is one, and the last token of the sample before, which is
    what its first target is predicted from. BOS a b c d e f, limit 4: BOS a b c | BOS c d e | BOS e f
    """
    ids, head = sample.ids, int(sample.ids[0] == bos_id)
    pieces = [Sample(ids[:limit], sample.is_target[:limit], sample.record)]
    for start in range(limit - 1, len(ids) - 1, limit - head - 1):
        own = slice(start + 1, start + limit - head)
        given = np.append(ids[:head], ids[start])
        is_target = np.append(np.zeros(len(given), np.bool_), sample.is_target[own])
        pieces.append(Sample(np.append(given, ids[own]), is_target, sample.record))
    return pieces


def _cut_response(sample: Sample, limit: int) -> Sample | None:
    targets = np.flatnonzero(sample.is_target[:limit])
    if not len(targets):
        return None
    end = int(targets[-1]) + 1
    return Sample(sample.ids[:end], sample.is_target[:end], sample.record, sample.turn)


def _shorten_prompt(
    sample: Sample, conversation: Conversation, tokenizer: ChatTokenizer, limit: int, train_on: str
) -> Sample | None:
    """Drop the oldest exchanges; if the last one alone is too long, the middle of its longest message."""
    if len(sample.ids) <= limit:
        return sample
    messages = conversation.messages
    if messages and sample.turn is not None:  # a sample of its own: the conversation up to it, with no other target
        earlier = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages[: sample.turn]]
        messages = [*earlier, messages[sample.turn]]
    asked = [index for index, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        return None  # plain text has no exchanges

    def encode(shorter: list[Message]) -> Sample:
        given = conversation.tools, train_on, conversation.template_args
        return tokenizer.encode_now(tokenizer.render_samples(shorter, sample.record, *given))[-1]

    def fits(first: int) -> bool:
        return len(encode([*head, *messages[first:]]).ids) <= limit

    head, last = messages[:1] if messages[0]["role"] == "system" else [], len(asked) - 1
    first = asked[bisect.bisect_left(asked, True, min(1, last), last, key=fits)]  # drops the fewest exchanges
    shorter = _cut_longest([*head, *messages[first:]], encode, limit)
    return shorter if shorter is not None and shorter.is_target.any() else None


def _cut_longest(messages: list[Message], encode: Callable[[list[Message]], Sample], limit: int) -> Sample | None:
    """Cut more and more out of the middle of the longest user or tool message until the sample fits."""
    given = [index for index, message in enumerate(messages) if message["role"] in ("user", "tool")]
    longest = max(given, key=lambda index: len(messages[index]["content"]))
    content = messages[longest]["content"]
    keep = len(content)
    for _ in range(24):
        sample: Sample = encode(messages)
        excess = len(sample.ids) - limit
        if excess <= 0:
            return sample
        if keep <= 1:
            return None
        characters_per_token = sum(len(message["content"]) for message in messages) / len(sample.ids)
        keep = max(1, keep - max(1, math.ceil(1.05 * excess * characters_per_token)))
        cut = content[: (keep + 1) // 2] + OMITTED + (content[-(keep // 2) :] if keep > 1 else "")
        messages = [*messages[:longest], {**messages[longest], "content": cut}, *messages[longest + 1 :]]
    return None
