"""Duplicates, near duplicates and leaks between training and validation.

Exact duplicates have equal hashes. Near duplicates are found by MinHash (Broder 1997, "On the resemblance and
containment of documents"): two texts agree in a component of their signatures with the probability that is the Jaccard
similarity of their sets of word 5-grams,

    P(signature_i(A) = signature_i(B)) = |A ∩ B| / |A ∪ B|

and banding (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4) finds the pairs worth comparing
without comparing all. A record that stands on both sides of a split turns the validation loss into a memory test.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from nanoft.batches import Array
from nanoft.data.formats import Conversation

COMPONENTS = 128  # of a MinHash signature
SHINGLE = 5  # words
RECALL = 0.95  # share of the pairs at the threshold that banding must find
WORD = re.compile(r"\w+")
_random = np.random.default_rng(20)
# Multiply-shift hashing (Dietzfelbinger et al. 1997): h(x) = (a x + b mod 2^64) >> 32, a odd.
_FACTORS = _random.integers(0, 2**63, COMPONENTS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _random.integers(0, 2**63, COMPONENTS, dtype=np.uint64)


def content_hash(conversation: Conversation) -> int:
    """64 bits of everything that is said and learned; of 10^6 records, two differ and collide with odds 3 in 10^8."""
    content = json.dumps([conversation.text, conversation.messages, conversation.tools], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "big")


def looks_truncated(conversation: Conversation) -> bool:
    """Whether the last answer has sentences and yet ends in a letter or a comma."""
    answer = conversation.messages[-1]["content"].rstrip() if conversation.messages else ""
    in_sentence = answer[-1:].isalpha() or answer[-1:] == ","
    return in_sentence and any(mark in answer for mark in ".!?") and len(answer.split()) >= 20


def normalized(text: str) -> str:
    """Lower case, single spaces: prompts equal in this are the same prompt."""
    return " ".join(text.lower().split())


def minhash(text: str) -> Array:
    """(COMPONENTS,) uint32: the smallest hash of the text's word 5-grams, under each of the hash functions."""
    words = WORD.findall(text.lower())
    count = max(1, len(words) - SHINGLE + 1)
    shingles = {zlib.crc32(" ".join(words[i : i + SHINGLE]).encode()) for i in range(count)}
    hashes = np.fromiter(shingles, dtype=np.uint64, count=len(shingles))
    return ((hashes[:, None] * _FACTORS + _OFFSETS) >> np.uint64(32)).min(axis=0).astype(np.uint32)


def band_height(threshold: float) -> int:
    """Components in a band: r of COMPONENTS / r bands find a pair of similarity s with probability 1 - (1 - s^r)^b.

    The largest r that finds RECALL of the pairs at the threshold compares the fewest others.
    """
    found = [r for r in range(1, COMPONENTS + 1) if 1 - (1 - threshold**r) ** (COMPONENTS // r) >= RECALL]
    return max(found, default=1)


def near_duplicates(signatures: Array, threshold: float, kept: Array) -> Array:
    """(n,) bool: which of the `kept` records resemble an earlier one that stays.

    Args:
        signatures: (n, COMPONENTS) uint32.
        threshold: Jaccard similarity of the sets of 5-grams.
        kept: (n,) bool.
    """
    removed = np.zeros(len(signatures), dtype=np.bool_)
    candidates = np.flatnonzero(kept)
    for first, second in sorted(_similar(signatures, candidates, threshold), key=lambda pair: pair[::-1]):
        removed[second] |= not removed[first]
    return removed


def near_matches(
    read: Callable[[int, int], Array], threshold: float, kept: Array, others: Array, at_once: int = 50_000
) -> Array:
    """(n,) bool: which of the `kept` records resemble one of the `others` (the other side of the split).

    Args:
        read: (start, stop) -> those of the (n, COMPONENTS) signatures; only those of `others` are held in memory.
        kept, others: (n,) bool.
    """
    found = np.zeros(len(kept), dtype=np.bool_)
    blocks = [(start, min(start + at_once, len(kept))) for start in range(0, len(kept), at_once)]
    held = np.concatenate([np.empty((0, COMPONENTS), np.uint32), *(read(*b)[others[b[0] : b[1]]] for b in blocks)])
    if not len(held):
        return found
    bands = _bands(threshold)
    orders = [np.argsort(_band_keys(held[:, band]), kind="stable") for band in bands]
    for start, stop in blocks:
        records = np.flatnonzero(kept[start:stop])
        block = read(start, stop)[records]
        for band, order in zip(bands, orders, strict=True):
            known, keys = _band_keys(held[:, band])[order], _band_keys(block[:, band])
            place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            equal = np.flatnonzero(known[place] == keys)
            agree = (block[equal] == held[order[place[equal]]]).mean(axis=1)
            found[start + records[equal[agree >= threshold]]] = True
    return found


def count_leaks(
    prompts: Sequence[str], trained_on: Iterable[str], threshold: float, at_once: int = 20_000
) -> tuple[int, int]:
    """How many prompts of an evaluation occur in the training data: exactly, and (besides those) nearly.

    Args:
        trained_on: the prompts of the training data, streamed.
        threshold: Jaccard similarity of the sets of 5-grams.
    """
    texts = [normalized(text) for text in prompts]
    own = np.stack([minhash(text) for text in prompts]) if prompts else np.empty((0, COMPONENTS), np.uint32)
    known, near, stream = set(texts), np.zeros(len(texts), np.bool_), iter(trained_on)
    exact: set[str] = set()
    while block := list(itertools.islice(stream, at_once)):
        exact |= known & {normalized(text) for text in block}
        both = np.concatenate([own, *(minhash(text)[None] for text in block)])
        is_own = np.arange(len(both)) < len(own)
        near |= near_matches(lambda a, b, both=both: both[a:b], threshold, is_own, ~is_own)[: len(own)]  # type: ignore[misc]
    is_exact = np.array([text in exact for text in texts], np.bool_)
    return int(is_exact.sum()), int((near & ~is_exact).sum())


def _bands(threshold: float) -> list[slice]:
    height = band_height(threshold)
    return [slice(start, start + height) for start in range(0, COMPONENTS - height + 1, height)]


def _band_keys(band: Array) -> Array:
    """(n,) uint64: equal for equal bands, and for hardly any others."""
    return (band.astype(np.uint64) * _FACTORS[: band.shape[1]]).sum(axis=1, dtype=np.uint64)


def _similar(signatures: Array, records: Array, threshold: float) -> set[tuple[int, int]]:
    """Pairs of records, the earlier first, that agree in a whole band and in `threshold` of all components.

    Within a group that agrees in a band, each record is compared with its predecessor and with the first one, so that
    a group of many copies costs no more than its size.
    """
    pairs: set[tuple[int, int]] = set()
    for band in _bands(threshold):
        keys = _band_keys(signatures[records, band])
        order = np.argsort(keys, kind="stable")
        equal = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1  # places in `order` that equal the one before
        first = place = -1
        for at in equal.tolist():
            if at != place + 1:
                first = int(records[order[at - 1]])
            place = at
            before, here = int(records[order[at - 1]]), int(records[order[at]])
            pairs |= {(before, here), (first, here)}
    return {pair for pair in pairs if (signatures[pair[0]] == signatures[pair[1]]).mean() >= threshold}
