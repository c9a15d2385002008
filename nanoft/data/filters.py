"""Which records to learn from, and which to hold out: duplicates, near duplicates, cut-off answers, splits, leaks.

A data set is never as large as its number of lines. Records repeat, word for word or nearly so, and one that stands on
both sides of a split turns the validation loss into a memory test. Exact repetition is found by a hash of what is
said. Near repetition is found by MinHash (Broder 1997, "On the resemblance and containment of documents"): two texts
agree in a component of their signatures as often as their sets of word 5-grams overlap,

    P(signature_i(A) = signature_i(B)) = |A ∩ B| / |A ∪ B|

and banding (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4) finds the pairs worth comparing
without comparing all.

A split goes by a hash of the seed and of what a record opens with, never by its place in the file: the same seed holds
out the same records whatever their order, and a larger share holds out more, not others.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from nanoft.data.formats import Conversation

Array = np.ndarray[Any, Any]
SIGNATURE = 128  # components of a MinHash signature
SHINGLE = 5  # words
RECALL = 0.95  # share of the pairs at the threshold that banding must find
WORD = re.compile(r"\w+")
_random = np.random.default_rng(20)
# Multiply-shift hashing (Dietzfelbinger et al. 1997): h(x) = (a x + b mod 2^64) >> 32, a odd.
_FACTORS = _random.integers(0, 2**63, SIGNATURE, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _random.integers(0, 2**63, SIGNATURE, dtype=np.uint64)


def fingerprint(conversation: Conversation) -> int:
    """64 bits of everything that is said and learned: equal for equal records (others: 3 in 10^8, of 10^6 records)."""
    said = json.dumps([conversation.text, conversation.messages, conversation.tools], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "big")


def rank(key: Any, seed: int) -> int:
    """Where a prompt, or a group, stands in the order that a split goes by: 64 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{key}".encode()).digest()[:8], "big")


def looks_cut_off(conversation: Conversation) -> bool:
    """Whether the last answer has sentences and yet ends in the middle of one: a letter or a comma, no full stop."""
    answer = conversation.messages[-1]["content"].rstrip() if conversation.messages else ""
    in_sentence = answer[-1:].isalpha() or answer[-1:] == ","
    return in_sentence and any(mark in answer for mark in ".!?") and len(answer.split()) >= 20


# ---- Near duplicates


def signature(text: str) -> Array:
    """(SIGNATURE,) uint32: the smallest hash of the text's word 5-grams, under each of the hash functions."""
    words = WORD.findall(text.lower())
    count = max(1, len(words) - SHINGLE + 1)
    shingles = {zlib.crc32(" ".join(words[i : i + SHINGLE]).encode()) for i in range(count)}
    hashes = np.fromiter(shingles, dtype=np.uint64, count=len(shingles))
    return ((hashes[:, None] * _FACTORS + _OFFSETS) >> np.uint64(32)).min(axis=0).astype(np.uint32)


def rows_of_a_band(threshold: float) -> int:
    """r of b = SIGNATURE / r bands of r rows; a pair is found with probability 1 - (1 - s^r)^b; the largest r that
    finds RECALL of the pairs with similarity s = threshold compares the fewest others."""
    found = [r for r in range(1, SIGNATURE + 1) if 1 - (1 - threshold**r) ** (SIGNATURE // r) >= RECALL]
    return max(found, default=1)


def near_duplicates(signatures: Array, threshold: float, kept: Array) -> Array:
    """(n,) bool: which of the rows `kept` resemble an earlier one that stays.

    Args:
        signatures: (n, SIGNATURE) uint32.
        threshold: share of the 5-grams of both texts that they have in common.
    """
    removed = np.zeros(len(signatures), dtype=np.bool_)
    candidates = np.flatnonzero(kept)
    for first, second in sorted(_similar(signatures, candidates, threshold), key=lambda pair: pair[::-1]):
        removed[second] |= not removed[first]
    return removed


def resembling(
    read: Callable[[int, int], Array], threshold: float, kept: Array, others: Array, at_once: int = 50_000
) -> Array:
    """(n,) bool: which of the rows `kept` resemble one of the rows `others` (the other side of the split).

    Args:
        read: rows start to stop of the (n, SIGNATURE) signatures; only those of `others` are held in memory.
        kept, others: (n,) bool.
    """
    found, height = np.zeros(len(kept), dtype=np.bool_), rows_of_a_band(threshold)
    blocks = [(start, min(start + at_once, len(kept))) for start in range(0, len(kept), at_once)]
    held = np.concatenate([np.empty((0, SIGNATURE), np.uint32), *(read(*b)[others[b[0] : b[1]]] for b in blocks)])
    if not len(held):
        return found
    bands = [slice(start, start + height) for start in range(0, SIGNATURE - height + 1, height)]
    orders = [np.argsort(_band_keys(held[:, band]), kind="stable") for band in bands]
    for start, stop in blocks:
        rows = np.flatnonzero(kept[start:stop])
        block = read(start, stop)[rows]
        for band, order in zip(bands, orders, strict=True):
            known, keys = _band_keys(held[:, band])[order], _band_keys(block[:, band])
            place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            alike = np.flatnonzero(known[place] == keys)
            agree = (block[alike] == held[order[place[alike]]]).mean(axis=1)
            found[start + rows[alike[agree >= threshold]]] = True
    return found


def leaks(asked: Sequence[str], trained_on: Iterable[str], threshold: float, at_once: int = 20_000) -> tuple[int, int]:
    """How many of some prompts stand among others, word for word or (not counting those) nearly so.

    Args:
        asked: the prompts of an evaluation.
        trained_on: those of the training data, streamed.
        threshold: share of the 5-grams of both that they have in common.
    """
    words = [" ".join(text.lower().split()) for text in asked]
    own = np.stack([signature(text) for text in asked]) if asked else np.empty((0, SIGNATURE), np.uint32)
    known, near, stream = set(words), np.zeros(len(asked), np.bool_), iter(trained_on)
    exact: set[str] = set()
    while block := list(itertools.islice(stream, at_once)):
        exact |= known & {" ".join(text.lower().split()) for text in block}
        both = np.concatenate([own, *(signature(text)[None] for text in block)])
        is_own = np.arange(len(both)) < len(own)
        near |= resembling(functools.partial(_rows, both), threshold, is_own, ~is_own)[: len(own)]
    is_exact = np.array([text in exact for text in words], np.bool_)
    return int(is_exact.sum()), int((near & ~is_exact).sum())


def _rows(signatures: Array, start: int, stop: int) -> Array:
    return signatures[start:stop]


def _band_keys(band: Array) -> Array:
    """(n,) uint64: equal for equal rows of a band, and for hardly any others."""
    return (band.astype(np.uint64) * _FACTORS[: band.shape[1]]).sum(axis=1, dtype=np.uint64)


def _similar(signatures: Array, rows: Array, threshold: float) -> set[tuple[int, int]]:
    """Pairs of rows, the earlier first, that agree in a whole band and in `threshold` of all components.

    In a group that agrees in a band, each row is compared with the one before it and with the first: a group of many
    copies costs no more than its size.
    """
    pairs: set[tuple[int, int]] = set()
    height = rows_of_a_band(threshold)
    for start in range(0, SIGNATURE - height + 1, height):
        keys = _band_keys(signatures[rows, start : start + height])
        order = np.argsort(keys, kind="stable")
        alike = np.flatnonzero(keys[order][1:] == keys[order][:-1]) + 1  # places in `order` that equal the one before
        first = place = -1
        for at in alike.tolist():
            if at != place + 1:
                first = int(rows[order[at - 1]])
            place = at
            before, here = int(rows[order[at - 1]]), int(rows[order[at]])
            pairs |= {(before, here), (first, here)}
    return {pair for pair in pairs if (signatures[pair[0]] == signatures[pair[1]]).mean() >= threshold}


# ---- Splits


def hold_out(ranks: Array, strata: Array, size: int) -> Array:
    """(n,) bool: about `size` records, those whose rank is among the smallest of their stratum.

    Equal ranks stay together, and a group that is larger than what is still wanted is passed over.

    Args:
        ranks: (n,) uint64, of the prompt or the group.
        strata: (n,) int: each gives its share; a rank belongs to the smallest stratum that it occurs in.
    """
    unique, inverse, counts = np.unique(ranks, return_inverse=True, return_counts=True)
    home = np.full(len(unique), np.iinfo(np.int64).max)
    np.minimum.at(home, inverse, strata)
    chosen = np.zeros(len(unique), dtype=np.bool_)
    members = {stratum: np.flatnonzero(home == stratum) for stratum in np.unique(home).tolist()}  # by rank
    for stratum, wanted in _allot(size, {s: int(counts[m].sum()) for s, m in members.items()}).items():
        left = wanted
        for group in members[stratum].tolist():
            if left and counts[group] <= left:
                chosen[group] = True
                left -= counts[group]
    return chosen[inverse]


def _allot(size: int, available: dict[int, int]) -> dict[int, int]:
    """The whole numbers that add up to `size` and are nearest to each part's share (largest remainder)."""
    total = sum(available.values())
    exact = {part: size * count / total for part, count in available.items()}
    shares = {part: int(share) for part, share in exact.items()}
    by_remainder = sorted(exact, key=lambda part: (shares[part] - exact[part], part))
    for part in by_remainder[: size - sum(shares.values())]:
        shares[part] += 1
    return shares


def hold_out_newest(times: Array, ranks: Array, size: int) -> Array:
    """(n,) bool: the newest records; of those with the same time, the ones with the smaller rank."""
    held = np.zeros(len(times), dtype=np.bool_)
    held[np.lexsort((ranks, -times))[:size]] = True
    return held
