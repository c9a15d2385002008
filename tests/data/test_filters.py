"""Duplicates and leaks against brute force and closed forms."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from nanoft.data import filters
from nanoft.data.formats import Conversation, Message

WORDS = [f"w{n}" for n in range(2000)]


def talk(*turns: str, **fields: Any) -> Conversation:
    messages: list[Message] = [
        {"role": ("user", "assistant")[n % 2], "content": text, **fields} for n, text in enumerate(turns)
    ]
    return Conversation(messages, None, "f", 1)


def shingles(text: str) -> set[str]:
    words = text.lower().split()
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def jaccard(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def texts(count: int, length: int = 120, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=length)) for _ in range(count)]


# ---- Exact duplicates


def test_a_fingerprint_tells_everything_that_is_said() -> None:
    call = {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    different = [
        talk("a", "b"), talk("ab", ""), talk("a", "b", "c"), talk("b", "a"), talk("a", "B"), talk("a", "b "),
        talk("a\0b"), talk("a", "b", **call), talk("a", "b", weight=0), talk("a", "b", train=False),
        talk("a", "b", reasoning_content="c"), talk("a", "b", reasoning_content="d"), Conversation([], "a", "f", 1),
        Conversation(talk("a", "b").messages, None, "f", 1, tools=[{"name": "t"}]),
        Conversation([{"role": "system", "content": "a"}, *talk("b").messages], None, "f", 1),
    ]  # fmt: skip
    assert len({c.content_hash for c in different}) == len(different)
    again = Conversation(talk("a", "b").messages, None, "elsewhere", 99, fields={"user": "x"})
    assert again.content_hash == talk("a", "b").content_hash


# ---- Near duplicates


@pytest.mark.parametrize("cut", [0, 3, 10, 20, 40, 80])
def test_signatures_agree_as_often_as_the_texts_overlap(cut: int) -> None:
    """The estimate has the variance of 128 coin flips."""
    errors = []
    for text in texts(60, seed=cut):
        other = " ".join(text.split()[cut:])
        agree = (filters.minhash(text) == filters.minhash(other)).mean()
        errors.append(agree - jaccard(text, other))
    assert abs(np.mean(errors)) < 0.015
    assert np.std(errors) < 0.055  # sqrt(0.25 / 128) = 0.044 at most


def test_case_and_punctuation_do_not_matter_and_short_texts_have_signatures() -> None:
    assert (filters.minhash("A b, c d e f!") == filters.minhash("a B c d, e f")).all()
    assert (filters.minhash("one two") == filters.minhash("one two")).all()
    assert (filters.minhash("one two") != filters.minhash("one three")).any()
    assert filters.minhash("").shape == (filters.COMPONENTS,)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
def test_near_duplicates_against_brute_force(threshold: float) -> None:
    """Of the pairs above the threshold, at least 95 % are found; of those well below, none."""
    originals = texts(150, seed=3)
    chance, copies = random.Random(7), []
    for text in originals:
        words = text.split()
        for _ in range(chance.randrange(0, 25)):  # so many replaced words, each of which breaks five 5-grams
            words[chance.randrange(len(words))] = chance.choice(WORDS)
        copies.append(" ".join(words))
    signatures = np.stack([filters.minhash(text) for text in [*originals, *copies]])
    removed = filters.near_matches(signatures, threshold, np.ones(300, dtype=np.bool_))
    assert not removed[:150].any()  # the first of two stays
    similarity = np.array([jaccard(a, b) for a, b in zip(originals, copies, strict=True)])
    above, below = similarity > threshold + 0.05, similarity < threshold - 0.12
    assert above.sum() >= 5
    assert below.sum() >= 5
    assert removed[150:][above].mean() >= 0.95
    assert not removed[150:][below].any()


def test_rows_of_a_band_find_95_percent_at_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.8, 0.95, 1.0):
        rows = filters.bands(threshold)[0].stop
        found = [1 - (1 - threshold**r) ** (filters.COMPONENTS // r) for r in (rows, rows + 1)]
        assert found[0] >= 0.95
        assert found[1] < 0.95 or rows == filters.COMPONENTS


def test_a_chain_of_copies_keeps_its_first_and_what_is_not_like_it() -> None:
    same = texts(1)[0]
    signatures = np.stack([filters.minhash(text) for text in [*texts(3, seed=9), same, same, same, same]])
    kept = np.ones(7, dtype=np.bool_)
    assert filters.near_matches(signatures, 0.8, kept).tolist() == [False] * 4 + [True] * 3
    kept[3] = False  # it was left out before
    assert filters.near_matches(signatures, 0.8, kept).tolist() == [False] * 5 + [True] * 2


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_resemblance_between_two_sides_only(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "AT_ONCE", at_once)
    same, other = texts(2)
    signatures = np.stack([filters.minhash(text) for text in [same, same, other, same, other]])
    training, validation = np.array([1, 1, 1, 0, 0], dtype=np.bool_), np.array([0, 0, 0, 1, 0], dtype=np.bool_)

    def found(others: Any) -> list[bool]:
        return filters.near_matches(signatures, 0.8, training, others).tolist()

    assert found(validation) == [True, True, False, False, False]
    assert found(np.zeros(5, dtype=np.bool_)) == [False] * 5
    assert found(np.array([0, 0, 0, 1, 1], dtype=np.bool_)) == [True, True, True, False, False]


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_near_leaks_against_brute_force(threshold: float) -> None:
    held = texts(80, seed=11)
    chance, training = random.Random(5), []
    for text in held:
        words = text.split()
        for _ in range(chance.randrange(0, 25)):
            words[chance.randrange(len(words))] = chance.choice(WORDS)
        training.append(" ".join(words))
    signatures = np.stack([filters.minhash(text) for text in [*training, *held]])
    kept = np.arange(160) < 80
    found = filters.near_matches(signatures, threshold, kept, ~kept)
    similarity = np.array([jaccard(a, b) for a, b in zip(training, held, strict=True)])
    above, below = similarity > threshold + 0.05, similarity < threshold - 0.12
    assert above.sum() >= 4
    assert below.sum() >= 4
    assert found[:80][above].mean() >= 0.95
    assert not found[:80][below].any()
    assert not found[80:].any()


# ---- Cut-off replies

ENOUGH = "This answer has a first sentence. And here it goes on with more words than twenty so that"
CUT_OFF = {
    "in mid-sentence": (ENOUGH + " somebody could", True),
    "at a comma": (ENOUGH + " somebody could,", True),
    "full stop": (ENOUGH + " somebody could.", False),
    "quote": (ENOUGH + ' somebody "could."', False),
    "number": (ENOUGH + " it is = 72", False),
    "code": (ENOUGH + " print(x)\n```", False),
    "short": ("Yes. No", False),
    "no sentences": ("apples, pears, " * 12 + "plums", False),
}


@pytest.mark.parametrize(("reply", "expected"), CUT_OFF.values(), ids=list(CUT_OFF))
def test_replies_that_stop_in_mid_sentence(reply: str, expected: bool) -> None:
    assert filters.looks_truncated(talk("q", reply)) is expected


# ---- Prompts of an evaluation among the training data


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_leaked_prompts_are_counted_word_for_word_and_nearly(at_once: int) -> None:
    asked = texts(40, seed=1)
    exact = [text.upper().replace(" ", "  ") for text in asked[:6]]
    near = [f"{text} and more" for text in asked[4:15]]  # two of these stand there word for word, too
    half = [" ".join(text.split()[:60]) + " " + other for text, other in zip(asked[20:], texts(20, 60, 5), strict=True)]
    trained_on = [*texts(50, seed=2), *near, *exact, *half]
    resembling = {a for a in asked for t in trained_on if jaccard(a, t.lower()) >= 0.8}
    assert resembling == set(asked[:15])
    assert filters.count_leaks(asked, iter(trained_on), 0.8, at_once) == (6, 9)


def test_nothing_leaks_from_nothing() -> None:
    assert filters.count_leaks([], iter(texts(3)), 0.8) == (0, 0)
    assert filters.count_leaks(texts(3), iter([]), 0.8) == (0, 0)


# --- garbled text and repetition

WRITTEN = [
    "café au lait", "Élan vital", "été", "voilà !", "naïve", "Müller grüßt", "École", "don’t", "“quoted”", "a – b",
    "wait…", "привет", "γλώσσα", "שלום", "مرحبا", "你好世界", "日本語", "한국어", "नमस्ते", "Việt Nam",
    "zażółć gęślą jaźń", "😀", "£5, 20°C", "5 € each", "São Paulo, não", "mañana", "\ufeffhi", "a\xa0word",
]  # fmt: skip
UPPER = [  # capital letters that also begin garbled ones, before signs that also follow in them
    "NÃO, SÃO PAULO, AMANHÃ", "“AMANHÃ”", "MAÇÃ – fruta", "«AMANHû",
    "ÂGE d’or", "HÂTE…",
    "Ångström: 5 Å² and 3 Å³, Å–like", "à « la » carte", "à\xa0«\xa0la\xa0»", "ĐÃ HỌC… ĐÃ”", "GRÖẞE, “groß”", "ÑANDÚ»",
    "«está»…", "mamá» dijo", "Nº 5ª, 3º, 20 °C, © 2020", "Ð and ð: Ísland, það",
]  # fmt: skip


def as_read(text: str, encoding: str) -> str:
    """UTF-8 decoded byte by byte in another encoding; bytes without a character there are kept as browsers do."""
    characters = (bytes([byte]) for byte in text.encode())
    return "".join(byte.decode(encoding if byte.decode(encoding, "ignore") else "latin-1") for byte in characters)


@pytest.mark.parametrize("text", WRITTEN)
def test_utf_8_in_another_encoding_is_noticed_and_the_text_itself_is_not(text: str) -> None:
    assert not filters.is_garbled(text)
    for encoding in ("cp1252", "latin-1"):
        assert filters.is_garbled(as_read(text, encoding)), as_read(text, encoding)
    assert filters.is_garbled(as_read(as_read(text, "cp1252"), "cp1252"))  # twice
    assert filters.is_garbled(f"{text[:3]}\ufffd")


@pytest.mark.parametrize("text", UPPER)
def test_capital_letters_before_signs_are_not_garbled(text: str) -> None:
    assert not filters.is_garbled(text)


RULE = "|---|---|---|---|---|---|---|---|---|---|---|\n"
REFRAIN = "".join(
    f"Verse {'abcdefghij'[n]} tells of the sea\nBlow the man down, blow the man down\n" for n in range(10)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I am sorry. " * 20, True),
        ("First, a sentence. Then it is stuck: the cat sat on the mat and" + " the cat sat on the mat and" * 14, True),
        ("Yes.\n" * 60, True),
        ("the " * 60 + "end of the answer", True),
        ("我不知道该说什么。" * 40, True),
        ("A long sentence, which goes on for quite a while until it ends here, at its very end. " * 12, True),
        ("I am sorry. " * 5, False),
        ("la la la la la la la la", False),
        (REFRAIN, False),
        ("| name | ok | unit |\n" + RULE + "".join(f"| item {n} | yes | kg |\n" for n in range(60)), False),
        (RULE * 9 + "=" * 300 + ". " * 99, False),
        ("0, " * 200 + "0x00, " * 64, False),
        ("NULL, " * 20 + "</div>\n" * 12, False),
        ("", False),
    ],
)
def test_answers_that_are_stuck(text: str, expected: bool) -> None:
    assert filters.repeats_itself(text) == expected
