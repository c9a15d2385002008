"""Samples longer than model.max_seq_length: split plain text into chunks; drop others, or cut where it harms least.

Cutting token ids blindly loses the answer, the question or the system message, and an end-of-sequence token after the
cut teaches the model to stop in mid-sentence. Here a prompt is shortened as a conversation and rendered again: the
system message and the last turns are kept, and the beginning and end of a single long message. An answer loses its tail
and the token that ends the turn. A sample without target tokens is never kept.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from nanoft import UserError
from nanoft.batches import Sample
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.data.formats import Conversation, Message

OMITTED = " [...] "  # replaces the middle of a message


def fit(
    samples: list[Sample], versions: list[list[Message]], conversation: Conversation,
    tokenizer: ChatTokenizer, limit: int, policy: str, train_on: str,
) -> list[Sample] | None:  # fmt: skip
    """The samples of a unit, each with at most `limit` tokens; None if they are dropped.

    The two answers of a pair keep the same prompt.

    Args:
        versions: the messages of each sample.
        policy: `drop`; `prompt` (shorten the prompt, keep all targets of what is kept); `response` (cut the tail);
            `proportional` (both, in proportion to their lengths); `reject` (raise a UserError).
    """
    longest = max(samples, key=lambda sample: len(sample.ids))
    if len(longest.ids) <= limit or policy == "drop":
        return samples if len(longest.ids) <= limit else None
    if policy == "reject":
        where = f"{conversation.file}:{conversation.line}: {len(longest.ids):,} tokens"
        fix = "raise it, or choose another data.truncation"
        raise UserError(f"{where}, more than model.max_seq_length={limit}: {fix}")
    if policy == "response":
        return _cut_responses(samples, limit)
    if policy == "prompt":
        return _shorten_prompt(samples, versions, conversation, tokenizer, limit, train_on)
    targets = int(longest.is_target.sum())
    kept_targets = max(1, limit * targets // len(longest.ids))
    room = limit + targets - kept_targets
    shorter = _shorten_prompt(samples, versions, conversation, tokenizer, room, train_on)
    return _cut_responses(shorter or samples, limit)


def chunk(sample: Sample, limit: int, bos_id: int | None) -> list[Sample]:
    """Split a plain text into samples of at most `limit` tokens, in which every token is a target exactly once.

    Each begins as at inference, with the BOS if there is one, followed by the last token of the previous sample, from
    which its first target is predicted. BOS a b c d e f, limit 4: BOS a b c | BOS c d e | BOS e f
    """
    ids, head = sample.ids, int(sample.ids[0] == bos_id)
    pieces = [Sample(ids[:limit], sample.is_target[:limit], sample.record)]
    for start in range(limit - 1, len(ids) - 1, limit - head - 1):
        own = slice(start + 1, start + limit - head)
        given = np.append(ids[:head], ids[start])
        is_target = np.append(np.zeros(len(given), np.bool_), sample.is_target[own])
        pieces.append(Sample(np.append(given, ids[own]), is_target, sample.record))
    return pieces


def _cut_responses(samples: list[Sample], limit: int) -> list[Sample] | None:
    cut = []
    for sample in samples:
        targets = np.flatnonzero(sample.is_target[:limit])
        if not len(targets):
            return None
        end = int(targets[-1]) + 1
        cut.append(replace(sample, ids=sample.ids[:end], is_target=sample.is_target[:end]))
    return cut


def _shorten_prompt(
    samples: list[Sample], versions: list[list[Message]], conversation: Conversation,
    tokenizer: ChatTokenizer, limit: int, train_on: str,
) -> list[Sample] | None:  # fmt: skip
    """Drop the oldest exchanges; if the last one alone is too long, cut the middle of its longest message."""
    if all(len(sample.ids) <= limit for sample in samples):
        return samples
    first_sample, messages = samples[0], versions[0]
    if len(samples) == 1 and messages and (turn := first_sample.turn) is not None:
        # the turn is a sample of its own: the conversation up to it, without other targets
        earlier = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages[:turn]]
        versions = [[*earlier, messages[turn]]]
    shared = len(versions[0]) if len(versions) == 1 else conversation.answer_at
    asked = [index for index, message in enumerate(versions[0][:shared]) if message["role"] == "user"]
    if not asked:
        return None  # plain text has no exchanges

    def encode(shorter: list[list[Message]]) -> list[Sample]:
        given = conversation.tools, train_on, conversation.template_args
        rendered = [tokenizer.render_samples(messages, first_sample.record, *given)[-1] for messages in shorter]
        return tokenizer.encode_now(rendered)

    def without(first: int) -> list[list[Message]]:
        return [[*head, *messages[first:]] for messages in versions]

    def fits(first: int) -> bool:
        return all(len(sample.ids) <= limit for sample in encode(without(first)))

    head, last = versions[0][:1] if versions[0][0]["role"] == "system" else [], len(asked) - 1
    first = asked[bisect.bisect_left(asked, True, min(1, last), last, key=fits)]  # drops the fewest exchanges
    shorter = _cut_longest(without(first), len(head) + shared - first, encode, limit)
    if shorter is None or not all(sample.is_target.any() for sample in shorter):
        return None
    return [replace(new, label=old.label) for new, old in zip(shorter, samples, strict=True)]


def _cut_longest(
    versions: list[list[Message]], shared: int, encode: Callable[[list[list[Message]]], list[Sample]], limit: int
) -> list[Sample] | None:
    """Cut as little as possible from the middle of the longest user or tool message, so that all samples fit.

    The message is among the first `shared` ones, which are the same in all versions.
    """
    given = [at for at, message in enumerate(versions[0][:shared]) if message["role"] in ("user", "tool")]
    longest = max(given, key=lambda at: len(versions[0][at]["content"]))
    content = versions[0][longest]["content"]

    def without(cut: int) -> list[Sample]:
        kept = len(content) - cut
        text = content[: (kept + 1) // 2] + OMITTED * (cut > 0) + content[len(content) - kept // 2 :]
        return encode([[*m[:longest], {**m[longest], "content": text}, *m[longest + 1 :]] for m in versions])

    def fits(cut: int) -> bool:
        return all(len(sample.ids) <= limit for sample in without(cut))

    cut = (
        0 if fits(0) else bisect.bisect_left(range(len(content)), True, lo=1, key=fits)
    )  # what replaces it is longer than 1
    return without(cut) if cut < len(content) else None
