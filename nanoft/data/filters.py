"""Duplicates, near duplicates, the choice of validation records, and leaks between the sides of the split.

Exact duplicates have equal hashes. Near duplicates are found by MinHash (Broder 1997, "On the resemblance and
containment of documents"): the probability that two texts agree in a component of their signatures is the Jaccard
similarity of their sets of word 5-grams,

    P(signature_i(A) = signature_i(B)) = |A ∩ B| / |A ∪ B|

and banding (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", section 3.4) finds the pairs worth comparing
without comparing all. A record on both sides of a split turns the validation loss into a test of memorization.

A split depends on a hash of the seed and the record's prompt, never on its place in the file: the same seed holds out
the same records in any order of the file, and a larger share only adds records to those held out.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nanoft.batches import Array, Sample, TokenDataset
from nanoft.data.formats import Conversation

COMPONENTS = 128  # of a MinHash signature
SHINGLE = 5  # words
AT_ONCE = 50_000  # signatures compared
RECALL = 0.95  # share of the pairs at the threshold that banding must find
WORD = re.compile(r"\w+")
# What Windows-1252 has in place of Latin-1's control characters, and these control characters: "€" -> "\x80", ...
TO_LATIN_1 = {ord(bytes([byte]).decode("cp1252", "ignore") or chr(byte)): byte for byte in range(0x80, 0xA0)}
REPEATS, LONGEST_PHRASE = 8, 200  # times in a row; characters
WORD_BEGINS = re.compile(r"(?<!\w)[^\W\d_]")
_random = np.random.default_rng(20)
# Multiply-shift hashing (Dietzfelbinger et al. 1997): h(x) = (a x + b mod 2^64) >> 32, a odd.
_FACTORS = _random.integers(0, 2**63, COMPONENTS, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_OFFSETS = _random.integers(0, 2**63, COMPONENTS, dtype=np.uint64)


def looks_truncated(conversation: Conversation) -> bool:
    """Whether the last answer consists of sentences, but ends with a letter or a comma."""
    answer = conversation.messages[-1]["content"].rstrip() if conversation.messages else ""
    in_sentence = answer[-1:].isalpha() or answer[-1:] == ","
    return in_sentence and any(mark in answer for mark in ".!?") and len(answer.split()) >= 20


def is_garbled(text: str) -> bool:
    """Whether UTF-8 was decoded as Latin-1 or Windows-1252 (é became Ã©), or a character became U+FFFD.

    Undo it: the bytes of a line in that encoding are hardly ever valid UTF-8 by accident.
    """
    for line in text.split("\n") if not text.isascii() else ():
        if not line.isascii():
            with contextlib.suppress(UnicodeError):
                line.translate(TO_LATIN_1).encode("latin-1").decode("utf-8")
                return True
    return "\ufffd" in text


def repeats_itself(text: str) -> bool:
    """Whether a phrase occurs `REPEATS` times in a row, or a single word three times as often.

    Checked at every 64th character: the phrase ends where its first 16 characters occur again. Phrases without words
    (rules of a table, numbers) do not count, nor do refrains, which are separated by other lines.
    """
    text = " ".join(text.split())
    for start in range(0, len(text) - REPEATS, 64):
        end = text.find(text[start : start + 16], start + 1, start + LONGEST_PHRASE + 16)
        words = WORD_BEGINS.findall(text, start, end) if end > 0 else []
        if words and text.startswith(text[start:end] * (REPEATS if len(words) > 1 else 3 * REPEATS), start):
            return True
    return False


def overlap(a: Sample, b: Sample) -> float:
    """The share of target tokens that two samples have in common, counted with multiplicity."""
    counts = [Counter(sample.ids[sample.is_target].tolist()) for sample in (a, b)]
    return (counts[0] & counts[1]).total() / max(counts[0].total(), counts[1].total(), 1)


def normalized(text: str) -> str:
    """The form in which prompts are compared: lower case, single spaces."""
    return " ".join(text.lower().split())


def minhash(text: str) -> Array:
    """(COMPONENTS,) uint32: the smallest hash of the text's word 5-grams under each hash function."""
    words = WORD.findall(text.lower())
    count = max(1, len(words) - SHINGLE + 1)
    shingles = {zlib.crc32(" ".join(words[i : i + SHINGLE]).encode()) for i in range(count)}
    hashes = np.fromiter(shingles, dtype=np.uint64, count=len(shingles))
    return ((hashes[:, None] * _FACTORS + _OFFSETS) >> np.uint64(32)).min(axis=0).astype(np.uint32)


def bands(threshold: float) -> list[slice]:
    """The b = COMPONENTS / r bands of r components, which find a pair of similarity s with probability 1 - (1 - s^r)^b.

    The largest r that finds RECALL of the pairs at the threshold compares the fewest others.
    """
    found = [r for r in range(1, COMPONENTS + 1) if 1 - (1 - threshold**r) ** (COMPONENTS // r) >= RECALL]
    height = max(found, default=1)
    return [slice(start, start + height) for start in range(0, COMPONENTS - height + 1, height)]


def near_matches(signatures: Array, threshold: float, kept: Array, others: Array | None = None) -> Array:
    """(n,) bool: which of the `kept` records resemble one of the `others`; without others, an earlier one.

    Two records resemble each other if they agree in a whole band and in `threshold` of all components. Of the records
    that agree in a band, each is compared with the first only, so the cost is linear.
    signatures: (n, COMPONENTS) uint32, may be memory-mapped; threshold: Jaccard similarity of the sets of 5-grams.
    """
    found = np.zeros(len(kept), dtype=np.bool_)
    for band in bands(threshold) if others is None or others.any() else ():
        records = np.flatnonzero(kept & ~found)
        rows = records if others is None else np.concatenate([np.flatnonzero(others), records])
        _, first, group = np.unique(_band_keys(signatures[rows, band]), return_index=True, return_inverse=True)
        before = rows[first[group]]
        is_pair = kept[rows] & (rows != before) & (others is None or others[before])
        pairs = np.stack([rows[is_pair], before[is_pair]], axis=1)
        for start in range(0, len(pairs), AT_ONCE):
            own, other = pairs[start : start + AT_ONCE].T
            found[own] |= (signatures[own] == signatures[other]).mean(axis=1) >= threshold
    return found


def count_leaks(
    prompts: Sequence[str], trained_on: Iterable[str], threshold: float, at_once: int = 20_000
) -> tuple[int, int]:
    """The number of evaluation prompts that occur in the (streamed) training data exactly, and of others nearly."""
    texts = [normalized(text) for text in prompts]
    own = np.stack([minhash(text) for text in prompts]) if prompts else np.empty((0, COMPONENTS), np.uint32)
    known, near, stream = set(texts), np.zeros(len(texts), np.bool_), iter(trained_on)
    exact: set[str] = set()
    while block := list(itertools.islice(stream, at_once)):
        exact |= known & {normalized(text) for text in block}
        both = np.concatenate([own, *(minhash(text)[None] for text in block)])
        is_own = np.arange(len(both)) < len(own)
        near |= near_matches(both, threshold, is_own, ~is_own)[: len(own)]
    is_exact = np.array([text in exact for text in texts], np.bool_)
    return int(is_exact.sum()), int((near & ~is_exact).sum())


def _band_keys(band: Array) -> Array:  # (n,) uint64: equal for equal bands, and rarely for others
    return (band.astype(np.uint64) * _FACTORS[: band.shape[1]]).sum(axis=1, dtype=np.uint64)


def split_key(value: Any, seed: int) -> int:
    """A 64-bit key: the rank of a prompt or group in the order in which records are held out."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{value}".encode()).digest()[:8], "big")


def hold_out(keys: Array, strata: Array, size: int) -> Array:
    """(n,) bool: about `size` records, those with the smallest keys of their stratum.

    Records with equal keys stay together; a group larger than the remaining size is skipped.

    Args:
        keys: (n,) uint64, of the prompt or the group.
        strata: (n,) int: each stratum contributes its share; a key belongs to the smallest stratum that it occurs in.
    """
    unique, inverse, counts = np.unique(keys, return_inverse=True, return_counts=True)
    home = np.full(len(unique), np.iinfo(np.int64).max)
    np.minimum.at(home, inverse, strata)
    chosen = np.zeros(len(unique), dtype=np.bool_)
    # Whole numbers that add up to `size`, each the share of its stratum but for rounding.
    members = {stratum: np.flatnonzero(home == stratum) for stratum in np.unique(home).tolist()}  # sorted by key
    ends = np.rint(size * np.cumsum([counts[own].sum() for own in members.values()]) / len(keys)).astype(int)
    shares = dict(zip(members, np.diff(ends, prepend=0).tolist(), strict=True))
    for stratum, left in shares.items():
        for group in members[stratum].tolist():
            if left and counts[group] <= left:
                chosen[group] = True
                left -= counts[group]
    return chosen[inverse]


def is_frequent(prompts: Array, pool: Array, limit: float) -> Array:
    """(n,) bool: records whose prompt occurs in more than `limit` records of the pool, such as "Hi".

    Such a prompt does not identify a record. prompts: (n,) uint64, hashes.
    """
    values, counts = np.unique(prompts[pool], return_counts=True)
    return np.isin(prompts, values[counts > max(limit, 1)])


def is_preferred(samples: TokenDataset) -> Array:
    """(m,) bool: the better answer of each pair; of single answers, the desirable ones."""
    return np.arange(len(samples)) % 2 == 0 if samples.unit_size == 2 else samples.labels > 0


def preferred(samples: TokenDataset) -> TokenDataset:
    """Only the preferred samples."""
    s, chosen = samples, samples.chosen[is_preferred(samples)]
    return TokenDataset(s.tokens, s.starts, s.all_records, chosen, s.all_labels)


def prompt_lengths(samples: TokenDataset) -> Array:
    """The tokens of each sample before its first target, (n,)."""
    targets = np.flatnonzero(samples.tokens < 0)
    return targets[np.searchsorted(targets, samples.begins)] - samples.begins
