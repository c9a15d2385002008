"""Samples longer than model.max_seq_length: split plain text into chunks; drop others, or cut where it harms least.

Cutting token ids blindly loses the answer, the question or the system message, and an end-of-sequence token after the
cut teaches the model to stop in mid-sentence. Here a prompt is shortened as a conversation and rendered again: the
system message and the last turns are kept, and the beginning and end of a single long message. An answer loses its tail
and the token that ends the turn. A sample without target tokens is never kept.
"""

from __future__ import annotations

import bisect
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
    """Drop the fewest oldest exchanges; if the last one is too long, cut the middle of its longest message.

    That message is from a user or a tool, and before the answers, so it is the same in all versions.
    """
    if all(len(sample.ids) <= limit for sample in samples):
        return samples
    first_sample, messages = samples[0], versions[0]
    if len(samples) == 1 and messages and (turn := first_sample.turn) is not None:
        # the turn is a sample of its own: the conversation up to it, without other targets
        earlier = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages[:turn]]
        versions = [[*earlier, messages[turn]]]
    shared = versions[0] if len(versions) == 1 else versions[0][: conversation.answer_at]
    asked = [at for at, message in enumerate(shared) if message["role"] == "user"]
    if not asked:
        return None  # plain text has no exchanges
    head, last = shared[:1] if shared[0]["role"] == "system" else [], len(asked) - 1
    given = [at for at in range(asked[last], len(shared)) if shared[at]["role"] in ("user", "tool")]
    longest = max(given, key=lambda at: len(shared[at]["content"]))
    content = shared[longest]["content"]

    def shortened(by: int) -> list[Sample]:
        """Without `by` exchanges; beyond the last one, without so many characters of its longest message."""
        first, kept = asked[min(by, last)], len(content) - max(by - last, 0)
        text = content[: (kept + 1) // 2] + OMITTED * (by > last) + content[len(content) - kept // 2 :]
        made = [[*head, *m[first:longest], {**m[longest], "content": text}, *m[longest + 1 :]] for m in versions]
        others = conversation.tools, train_on, conversation.template_args
        return tokenizer.encode_now([tokenizer.render_samples(m, first_sample.record, *others)[-1] for m in made])

    def fits(by: int) -> bool:
        return all(len(sample.ids) <= limit for sample in shortened(by))

    by = bisect.bisect_left(range(last), True, min(1, last), key=fits)
    if by == last and not fits(last):  # now by characters, of which one is not enough: OMITTED is longer
        by = bisect.bisect_left(range(last + len(content)), True, last + 1, key=fits)
        if by == last + len(content):
            return None  # not even without the whole message
    found = [replace(new, label=old.label) for new, old in zip(shortened(by), samples, strict=True)]
    return found if all(sample.is_target.any() for sample in found) else None
