"""Answers: one token after another, with a cache, many prompts at once.

Without a cache, the n-th token costs a forward pass over n tokens. With it, keys and values of earlier positions are
kept and each new token costs one position. Prompts of different lengths are padded on the LEFT, so that all of them end
where the answers begin; the padding is a document of its own that nobody attends to, and positions count from each
prompt's first real token.

    python -m nanoft.generate runs/tiny --prompt "Please book a table ..."
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanoft import UserError
from nanoft.chat import ChatTokenizer, Message
from nanoft.model import Decoder, KVCache
from nanoft.runtime import Arguments, choose_device, choose_dtype, command, quiet_libraries


@dataclass(frozen=True)
class Answer:
    """Generated ids without the stop token, and whether the model ended the turn itself."""

    ids: list[int]
    stopped: bool


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    pad_id: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[Answer]:
    """Continue every prompt until a stop id or `max_new_tokens`.

    Args:
        prompts: token ids, none empty.
        temperature: 0 takes the most likely token; otherwise logits are divided by it and sampled.
        top_p: sample among the most likely tokens that together have this probability, above 0 (Holtzman et al. 2020).
    """
    device = model.head.device
    feed, positions, segments = _left_padded(prompts, pad_id, device)
    batch, width = feed.shape
    cache = KVCache(model.config, batch, width + max_new_tokens, device, model.head.dtype)
    stops = torch.tensor(list(stop_ids), device=device, dtype=torch.int64)
    finished = torch.zeros(batch, dtype=torch.bool, device=device)
    produced: list[Tensor] = []
    for _ in range(max_new_tokens):
        hidden = model(feed, positions, segments=segments, cache=cache)  # (b, q, hidden); q is 1 after the first pass
        newest = _choose(model.logits(hidden[:, -1]), temperature, top_p, generator)  # (b,)
        produced.append(newest)
        finished |= torch.isin(newest, stops)
        if bool(finished.all()):
            break
        feed, positions, segments = newest[:, None], positions[:, -1:] + 1, torch.ones_like(newest[:, None])
    rows = torch.stack(produced, dim=1).tolist() if produced else [[] for _ in prompts]
    return [_cut(row, set(stop_ids)) for row in rows]


def _left_padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """ids, positions and segments, each (b, longest prompt)."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    segments = torch.zeros((len(prompts), width), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.int64)
        segments[row, width - len(prompt) :] = 1
    positions = (segments.cumsum(dim=1) - 1).clamp(min=0)
    return ids.to(device), positions.to(device), segments.to(device)


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    """The next token of each row, (b,), from logits (b, vocab)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities, order = (logits / temperature).softmax(-1).sort(-1, descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= top_p  # what comes before already has top_p
    drawn = torch.multinomial(probabilities.masked_fill(outside, 0.0), 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)


def _cut(ids: list[int], stops: set[int]) -> Answer:
    for place, token in enumerate(ids):
        if token in stops:
            return Answer(ids[:place], True)
    return Answer(ids, False)


def answer(model: Decoder, chat: ChatTokenizer, messages: Sequence[Message], max_new_tokens: int) -> str:
    """The model's greedy answer to a conversation, rendered as it was in training."""
    reply = generate(model, [chat.encode_prompt(messages)], chat.stop_ids, max_new_tokens, chat.pad_id)[0]
    return chat.decode(reply.ids)


@command
def main(argv: list[str]) -> int:
    """`python -m nanoft.generate RUN|MODEL [--prompt TEXT]`: one answer, or a chat when no prompt is given."""
    from nanoft.weights import open_chat, open_model

    parser = Arguments(
        prog="python -m nanoft.generate",
        description="Talk to a fine-tuned run or to a model, rendered exactly as in training.",
        epilog='examples: python -m nanoft.generate runs/tiny --prompt "What is the weather in Oslo on Monday?"; '
        "python -m nanoft.generate runs/tiny",
    )
    parser.add_argument("source", metavar="RUN|MODEL", help="run directory, model directory or Hub name")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and stop; without it, chat (an empty line ends)")
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    args = parser.parse_args(argv)
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens: {args.max_new_tokens} is out of range: it must be >= 1")
    quiet_libraries()
    device = choose_device("auto")
    opened = open_model(args.source, device, choose_dtype("auto", device))
    chat = open_chat(args.source, opened)
    _talk(opened.model, chat, args.prompt, args.system, args.max_new_tokens)
    return 0


def _talk(model: Decoder, chat: ChatTokenizer, prompt: str | None, system: str | None, max_new_tokens: int) -> None:
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    if prompt is not None:
        print(answer(model, chat, [*opening, {"role": "user", "content": prompt}], max_new_tokens))
        return
    messages = opening
    shown = "> " if sys.stdin.isatty() else ""
    while line := _read_line(shown):
        messages.append({"role": "user", "content": line})
        messages.append({"role": "assistant", "content": answer(model, chat, messages, max_new_tokens)})
        print(messages[-1]["content"], flush=True)


def _read_line(shown: str) -> str:
    try:
        return input(shown).strip()
    except (EOFError, KeyboardInterrupt):
        return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
