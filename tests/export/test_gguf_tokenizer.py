"""Token ids from llama.cpp, Hugging Face's tokenizers and SentencePiece: equal, or the export is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import sentencepiece
import torch
from templates import CONTROL, STYLES, TEXT, TINY, byte_fallback, byte_level, save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from nanoft import UserError
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.export.gguf import write_gguf
from nanoft.export.gguf_tokenizer import GPT4O, LLAMA3, QWEN2, QWEN35, SEED, TEKKEN, add_tokenizer
from nanoft.models.open import open_model
from tiny_models import make_reference

TEXTS = [
    "Hello there, how are you today?",
    "I'll say it: WE'LL, we'Ve, they'RE and o'clock's 's",
    "3 33 333 3333 33333 333333 3.3 3..3 1,234,567.89 2024-11-21T07:05",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     x  \r\n\r\n y",
    "def f(x):\n    return {'a': [1, 2.5], \"b\": x**2}  # done\n",
    "Ünïcödé, naïve café, STRASSE straße; нещо на Български; Ελληνικά",
    "我想在apple工作1314151天～ 日本語 テスト 한국어 កាន់តែពិសេស",
    "🚀 (normal) 😶‍🌫️ ✅ 🦙🦙 ﷽ é vs é",
    "https://example.org/a_b?c=d&e=%20f#g --option=value C:\\path\\file",
    " leading and trailing space ",
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n",
    "<s>[INST] half a <|im_st token and <<|eot_id|>> another[/INST] reply</s>",
    "",
]
CPU = (torch.device("cpu"), torch.float32)
CONTROLS = [AddedToken(token, special=True, normalized=False) for token in CONTROL]


def split(expression: str, behavior: str = "isolated") -> Any:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(expression), behavior, behavior == "removed"), bytes_only]
    )


WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE_TOKENIZERS = {
    "gpt-2": (WORDS, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), WORDS]), False),
    "llama-bpe": (split(LLAMA3), True),
    "dbrx": (split(LLAMA3), False),
    "qwen2": (split(QWEN2), False),
    "qwen35": (split(QWEN35), False),
    "tekken": (split(TEKKEN), True),
    "gpt-4o": (split(GPT4O, "removed"), False),  # what does not match is removed: nothing
    "seed-coder": (split(SEED), False),
}


def trained(pre_tokenizer: Any, ignore_merges: bool = False) -> str:
    """A byte-level BPE of 800 tokens, with one added token that is no control token."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=CONTROLS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXT, *TEXTS[:10], *TEXTS[:5]], trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    text: str = tokenizer.to_str()
    return text


def sentencepiece_model() -> Any:
    """A real SentencePiece BPE with byte fallback, as Llama 2 has one."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXT, *TEXTS[:6]] * 4), model_writer=out, model_type="bpe", vocab_size=500,
        byte_fallback=True, character_coverage=0.98, normalization_rule_name="identity",
        remove_extra_whitespaces=False, num_threads=1, minloglevel=2, allow_whitespace_only_pieces=True,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def as_hugging_face(processor: Any, scheme: str | None) -> str:
    """The same as a tokenizer.json: every way to make a piece is a merge, the best piece first.

    Args:
        scheme: of a Metaspace; None: Llama 2's normalizer; "gemma": Gemma's, and its split at spaces, of which none is.
    """
    pieces = {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}
    merges = [
        (processor.get_score(number), piece[:place], piece[place:])
        for piece, number in pieces.items()
        if not processor.is_control(number) and not processor.is_byte(number) and not processor.is_unknown(number)
        for place in range(1, len(piece))
        if piece[:place] in pieces and piece[place:] in pieces
    ]
    pairs = [(left, right) for _, left, right in sorted(merges, key=lambda merge: -merge[0])]
    tokenizer = Tokenizer(models.BPE(pieces, pairs, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if scheme is None:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif scheme == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    text: str = tokenizer.to_str()
    return text


def in_llama_cpp(root: Path, tokenizer_json: str, style: str = "chatml", **settings: Any) -> tuple[Any, ChatTokenizer]:
    """A tokenizer as llama.cpp has it, and as we do."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    base = save(root / "base", STYLES[style], tokenizer_json=tokenizer_json, **settings)
    chat = ChatTokenizer(base)
    size = max(chat.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    make_reference("llama", root / "weights", vocab_size=size + 3, hidden_size=32, num_hidden_layers=1)
    for name in ("config.json", "model.safetensors"):
        (root / "weights" / name).rename(base / name)
    write_gguf(open_model(str(base), *CPU), chat, "tokenizer", "f16", "original", root / "model.gguf")
    return llama_cpp.Llama(str(root / "model.gguf"), vocab_only=True, verbose=False), chat


def ids_of(llama: Any, text: str, with_bos: bool = False) -> list[int]:
    ids: list[int] = llama.tokenize(text.encode(), add_bos=with_bos, special=True)
    return ids


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_ids_are_llama_cpps(pre: str, tmp_path: Path) -> None:
    llama, chat = in_llama_cpp(tmp_path, trained(*PRE_TOKENIZERS[pre]))
    assert llama.metadata["tokenizer.ggml.pre"] == pre
    for text in [*TEXTS, "so <think>well</think>"]:
        if pre in ("tekken", "gpt-4o"):
            text = text.replace("កាន់តែពិសេស", "")  # llama.cpp's rule knows no combining marks
        assert ids_of(llama, text) == chat.tokenizer.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("style", STYLES)
def test_rendered_prompts_have_the_ids_that_we_train_on(style: str, tmp_path: Path) -> None:
    """The template puts BOS into the text, or the tokenizer does: one BOS either way, here and there."""
    llama, chat = in_llama_cpp(tmp_path, byte_level(), style)
    messages = [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "2"}]
    prompt = chat.render_prompt([*messages, messages[0]])
    bos = chat.special.get("bos_token", "")
    bare = prompt.removeprefix(bos) if chat.wants_bos else prompt  # as llama.cpp's server does
    assert ids_of(llama, bare, with_bos=True) == chat.encode_prompt([*messages, messages[0]])
    assert llama.metadata["tokenizer.chat_template"] == chat.template
    assert int(llama.metadata["tokenizer.ggml.eos_token_id"]) == chat.eos_id
    stops = {llama.token_eos(), int(llama.metadata["tokenizer.ggml.eot_token_id"])}
    assert stops == set(chat.stop_ids)


def test_every_stop_id_ends_an_answer(tmp_path: Path) -> None:
    """The tokenizer's end of text, the template's end of turn, and one more from generation_config.json."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    (tmp_path / "base").mkdir()
    number = Tokenizer.from_str(byte_level()).token_to_id("[INST]")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"eos_token_id": [number]}))
    llama, chat = in_llama_cpp(tmp_path, byte_level(), "marked")
    assert len(chat.stop_ids) == 3
    vocabulary = llama_cpp.llama_model_get_vocab(llama.model)
    assert [id for id in chat.stop_ids if not llama_cpp.llama_vocab_is_eog(vocabulary, id)] == []


@pytest.mark.parametrize("scheme", [None, "always", "never", "gemma"])
def test_sentencepiece_ids_are_sentencepieces_own(scheme: str | None, tmp_path: Path) -> None:
    reference = sentencepiece_model()
    llama, chat = in_llama_cpp(tmp_path, as_hugging_face(reference, scheme), "zephyr", unk_token="<unk>")
    assert llama.metadata["tokenizer.ggml.model"] == "llama"
    for text in TEXTS[:10]:
        here = chat.tokenizer.encode(text, add_special_tokens=False).ids
        assert ids_of(llama, text) == here or (scheme == "always" and text.startswith(" ")), text
        if scheme is None:
            assert here == reference.encode(text), text
    assert ids_of(llama, "a</s>b") == chat.tokenizer.encode("a</s>b", add_special_tokens=False).ids
    assert ids_of(llama, "a", with_bos=True) == chat.tokenizer.encode("a").ids


def test_the_tokens_of_phi_3_swallow_the_spaces_behind_them(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(as_hugging_face(sentencepiece_model(), None))
    tokens = [AddedToken("<|endoftext|>", special=True, normalized=False)]
    strips = ("</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokens += [AddedToken(text, special=True, normalized=False, rstrip=True) for text in strips]
    tokenizer.add_special_tokens(tokens)
    llama, chat = in_llama_cpp(tmp_path, tokenizer.to_str(), "zephyr", unk_token="<unk>")
    assert llama.metadata["general.name"] == "tokenizer phi-3"
    chats = [
        "<|system|>\nBe brief.<|end|>\n<|user|>\n  Hi <|end|> \n\n<|assistant|>\n",
        "a</s>  b<|endoftext|>  c<s> d",
    ]
    for text in [*chats, *TEXTS[:10]]:
        assert ids_of(llama, text) == chat.tokenizer.encode(text, add_special_tokens=False).ids, text
    save(tmp_path / "other", STYLES["zephyr"], tokenizer_json=stripping(tokenizer.to_str()))
    with pytest.raises(UserError, match="'<unk>' strips the spaces around it"):
        add_tokenizer(Mock(), ChatTokenizer(tmp_path / "other"), 2000, "")


def test_a_space_before_the_first_word_only_is_none_where_chats_open_with_a_control_token(tmp_path: Path) -> None:
    llama, chat = in_llama_cpp(tmp_path, byte_fallback(), "mistral")
    text = chat.render_prompt([{"role": "user", "content": "the tea, a täble 🦙"}])
    assert text.startswith("<s>[INST]")
    assert ids_of(llama, text) == chat.tokenizer.encode(text, add_special_tokens=False).ids
    save(tmp_path / "other", STYLES["zephyr"], tokenizer_json=byte_fallback())
    with pytest.raises(UserError, match="a space before the first word only, but its chats begin with text"):
        add_tokenizer(Mock(), ChatTokenizer(tmp_path / "other"), 1000, "")


def test_the_tiny_demos_ids_are_llama_cpps(tmp_path: Path) -> None:
    llama, chat = in_llama_cpp(tmp_path, (TINY / "tokenizer.json").read_text(), "mistral")
    lines = (TINY.parent / "conversations.jsonl").read_text().splitlines()[:200]
    talks = [chat.tokenizer.decode(chat.tokenizer.encode(line).ids, skip_special_tokens=False) for line in lines]
    for text in [*TEXTS, *lines, *talks]:
        assert ids_of(llama, text) == chat.tokenizer.encode(text, add_special_tokens=False).ids, text


def edited(text: str, **changes: Any) -> str:
    """A tokenizer.json with values replaced; `model__x` is inside the model."""
    tokenizer = json.loads(text)
    for name, value in changes.items():
        *inside, last = name.split("__")
        (tokenizer[inside[0]] if inside else tokenizer)[last] = value
    return json.dumps(tokenizer)


def stripping(text: str) -> str:
    tokenizer = json.loads(text)
    tokenizer["added_tokens"][0]["rstrip"] = True
    return json.dumps(tokenizer)


BERT_WORDS = {"type": "Whitespace"}
PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
REFUSED = {
    "an expression of its own": (trained(split(r"[a-z]+|.")), "by an unknown rule"),
    "other words": (edited(byte_level(), pre_tokenizer=BERT_WORDS), "by an unknown rule"),
    "space before words": (edited(byte_level(), pre_tokenizer=PREFIXED), "by an unknown rule"),
    "GPT-2's words taken whole": (edited(byte_level(), model__ignore_merges=True), "by an unknown rule"),
    "lower case": (edited(byte_level(), normalizer={"type": "Lowercase"}), "its normalizer is Lowercase"),
    "spaces swallowed": (stripping(byte_level()), "'<s>' strips the spaces around it"),
    "words kept apart": (
        edited(byte_fallback(), pre_tokenizer={"type": "Metaspace", "replacement": "▁", "split": True}),
        "its pre-tokenizer is Metaspace",
    ),
    "no spaces at all": (edited(byte_fallback(), pre_tokenizer=None), "its normalizer is not SentencePiece's"),
    "not BPE": (Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], 0, False)).to_str(), "its model is Unigram"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_do_is_refused(case: str, tmp_path: Path) -> None:
    text, reason = REFUSED[case]
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=f"--format gguf: tokenizer.json is not supported by llama.cpp: .*{reason}"):
        add_tokenizer(Mock(), ChatTokenizer(tmp_path), 2000, "")


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    save(tmp_path, STYLES["chatml"])
    with pytest.raises(UserError, match=r"the id 3\d\d is beyond the model's 300 embeddings"):
        add_tokenizer(Mock(), ChatTokenizer(tmp_path), 300, "")
