"""Convert a Hugging Face tokenizer to GGUF.

llama.cpp does not read tokenizer.json; it has its own tokenizers and reads their data from the GGUF file. Two kinds
cover the models here:

    gpt2    byte-level BPE (GPT-2, Llama 3, Qwen): tokens and merges. The rule that splits a text into words before
            merging is compiled into llama.cpp; the file only has its name, `pre`.
    llama   SentencePiece BPE (Llama 2, Mistral): tokens and scores. The two neighbors that form the token with the
            highest score are merged first; characters without a token are spelled in bytes.

With a wrong name, the model would receive ids that it has never seen. So the name is derived from the steps in
tokenizer.json, and a tokenizer without a matching rule is refused.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from nanoft import UserError
from nanoft.data.chat_tokenizer import ChatTokenizer, TemplateRefusal

# Token types, `tokenizer.ggml.token_type` of the GGUF specification.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "▁"  # SentencePiece's
# Rules that split a text into words, from the models' tokenizer.json; llama.cpp's names are in src/llama-vocab.cpp.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The rule of o200k: like TEKKEN, but a word includes its contraction, and up to three digits form one word.
GPT4O = TEKKEN.replace("|[^\\r", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r").replace(
    r"|\p{N}|", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
)
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}", r"[^\s\p{L}\p{M}")
SEED = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}{1}").replace(r"\p{N}]+[\r\n]*|", r"\p{N}\r\n]+|")
Steps = tuple[tuple[str, ...], ...]
GPT2_WORDS, BYTES_ONLY = ("ByteLevel", "words"), ("ByteLevel",)
# (steps, ignore_merges: whether a word that is a token is not split) -> llama.cpp's name
PRE_TOKENIZERS: dict[tuple[Steps, bool], str] = {
    ((GPT2_WORDS,), False): "gpt-2",
    ((("Digits",), GPT2_WORDS), False): "smollm",
    ((("Split", LLAMA3), BYTES_ONLY), True): "llama-bpe",
    ((("Split", LLAMA3), BYTES_ONLY), False): "dbrx",
    ((("Split", QWEN2), BYTES_ONLY), False): "qwen2",
    ((("Split", QWEN35), BYTES_ONLY), False): "qwen35",
    ((("Split", TEKKEN), BYTES_ONLY), True): "tekken",
    ((("Split", GPT4O), BYTES_ONLY), False): "gpt-4o",
    ((("Split", SEED), BYTES_ONLY), False): "seed-coder",
}


# In models with this name, llama.cpp strips the spaces after each control token except these.
PHI3, PHI3_KEEPS = "phi-3", {"<unk>", "<s>", "<|endoftext|>"}


def add_tokenizer(writer: Any, chat: ChatTokenizer, vocab_size: int, name: str) -> list[str]:
    """Add to a GGUFWriter what makes llama.cpp produce the same ids, and the model's name; return notes for the user.

    Ids below vocab_size without a token become unused.
    """
    tokenizer = json.loads(chat.tokenizer.to_str())
    model, added = tokenizer["model"], {token["id"]: token for token in tokenizer["added_tokens"]}
    control = {token["content"] for token in added.values()}
    strips = {token["content"] for token in added.values() if token["rstrip"]}
    is_phi3 = "</s>" in strips and control >= PHI3_KEEPS and strips == control - PHI3_KEEPS
    for token in added.values():
        if token["lstrip"] or token["single_word"] or (token["rstrip"] and not is_phi3):
            _refuse(f"the token {token['content']!r} strips the spaces around it")
    if model["type"] != "BPE" or model["continuing_subword_prefix"] or model["end_of_word_suffix"]:
        _refuse(f"its model is {model['type']}, not the BPE of GPT-2 or SentencePiece")
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    texts = {number: token for token, number in chat.tokenizer.get_vocab(with_added_tokens=True).items()}
    if max(texts) >= vocab_size:
        fix = "use the tokenizer of this model"
        raise UserError(f"tokenizer.json: the id {max(texts)} is beyond the model's {vocab_size} embeddings: {fix}")
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(vocab_size)]
    types = [_kind(number, texts, added, model) for number in range(vocab_size)]
    if model["byte_fallback"]:  # llama.cpp searches added tokens in the raw text, with plain spaces
        tokens = [text.replace(SPACE, " ") if number in added else text for number, text in enumerate(tokens)]
    if len(set(tokens)) < vocab_size:
        _refuse("two tokens have the same text")
    if model["byte_fallback"]:
        # The pairs that BPE merges first must score highest: minus the index of the first merge that forms the token.
        scores = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(merges)))}
        kind, pre, prefix = "llama", "default", _space_prefix(tokenizer, chat)
        writer.add_token_scores([scores.get(token, -1e9) for token in tokens])  # -1e9: no merge forms it
        notes = [f"keep {PHI3} in the model's name, by which llama.cpp decides to strip spaces after tokens"] * is_phi3
    else:
        kind, pre, prefix = "gpt2", _pre(tokenizer), False
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
        notes = ["llama.cpp splits words of scripts with combining marks (Khmer, Hindi) differently"] * (
            pre in ("tekken", "gpt-4o")
        )
        notes += ["llama.cpp does not normalize texts to NFC: send normalized texts"] * bool(tokenizer["normalizer"])
    writer.add_name(f"{name} {PHI3}" if is_phi3 else name)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_add_space_prefix(prefix)
    return notes + _add_chat(writer, chat)


def _add_chat(writer: Any, chat: ChatTokenizer) -> list[str]:
    """Add the special tokens and the chat template; return notes."""
    writer.add_add_bos_token(chat.wants_bos)
    writer.add_add_eos_token(False)
    unknown, padding = (chat.tokenizer.token_to_id(chat.special.get(key, "")) for key in ("unk_token", "pad_token"))
    turn_end = chat.tokenizer.token_to_id(chat.turn_end[0]) if chat.turn_end else None
    others = [stop for stop in chat.stop_ids if stop not in (chat.eos_id, turn_end)]
    # llama.cpp stops on three ids (end of text, of turn, of message), and on a few texts that it knows.
    stops = {"eos": chat.eos_id, "eot": turn_end, "eom": next(iter(others), None)}
    for key, number in {"bos": chat.bos_id, **stops, "padding": padding, "unknown": unknown}.items():
        if number is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", number)
    writer.add_chat_template(chat.template)
    notes = list[str]()
    if others[1:]:
        notes.append(f"llama.cpp may not stop on the ids {others[1:]}: pass their texts as stop strings")
    if chat.template_args:
        notes.append(f"the chat template was used with {chat.template_args}: set llama-server --chat-template-kwargs")
    return notes


def _refuse(reason: str) -> None:
    raise UserError(f"--format gguf: tokenizer.json is not supported by llama.cpp: {reason}: use --format hf")


def _kind(number: int, texts: dict[int, str], added: dict[int, Any], model: dict[str, Any]) -> int:
    if number not in texts:
        return UNUSED
    if model["byte_fallback"] and texts[number] == model["unk_token"]:
        return UNKNOWN
    if model["byte_fallback"] and re.fullmatch(r"<0x[0-9A-F]{2}>", texts[number]):
        return BYTE
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    return NORMAL


def _pre(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name of the rule by which a byte-level BPE splits a text into words."""
    if (normalizer := tokenizer["normalizer"]) and normalizer["type"] != "NFC":  # Qwen's, which llama.cpp omits
        _refuse(f"its normalizer is {normalizer['type']}")
    rule = _steps(tokenizer["pre_tokenizer"] or {"type": "none"}), bool(tokenizer["model"].get("ignore_merges"))
    if rule not in PRE_TOKENIZERS:
        _refuse(f"it splits texts into words by an unknown rule (known: {', '.join(PRE_TOKENIZERS.values())})")
    return PRE_TOKENIZERS[rule]


def _steps(part: dict[str, Any]) -> Steps:
    """A pre-tokenizer as a key of PRE_TOKENIZERS; unsupported settings give an unknown key."""
    kind = part["type"]
    if kind == "Sequence":
        return tuple(step for inner in part["pretokenizers"] for step in _steps(inner))
    if kind == "Split" and (part["behavior"], part["invert"]) in (("Isolated", False), ("Removed", True)):
        return ((kind, part["pattern"].get("Regex", "")),)
    if kind == "Digits" and part["individual_digits"]:
        return ((kind,),)
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return (GPT2_WORDS if part.get("use_regex", True) else BYTES_ONLY,)
    return ((f"{kind} with settings",),)


NO_WORDS = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}


def _space_prefix(tokenizer: dict[str, Any], chat: ChatTokenizer) -> bool:
    """Whether a space is added before a text and after each control token; llama.cpp does both or neither."""
    normalizer, words = tokenizer["normalizer"], tokenizer["pre_tokenizer"]
    if words == NO_WORDS:  # Gemma's; its normalizer leaves no spaces
        words = None
    parts = (normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]) if normalizer else []
    prepended = {"type": "Prepend", "prepend": SPACE}
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if any(part not in (prepended, replaced) for part in parts) or bool(words) == (replaced in parts):
        _refuse("its normalizer is not SentencePiece's")
    if not words:
        return prepended in parts
    if words["type"] != "Metaspace" or words["split"]:
        _refuse(f"its pre-tokenizer is {words['type']}, not SentencePiece's")
    if words["prepend_scheme"] == "first":  # never applies to chats that begin with a control token
        prompt = ""
        with suppress(TemplateRefusal):
            prompt = chat.render_prompt([{"role": "user", "content": "a"}])
        if not prompt.startswith(tuple(chat.control.texts)):
            _refuse("it adds a space before the first word only, but its chats begin with text")
    return bool(words["prepend_scheme"] == "always")
