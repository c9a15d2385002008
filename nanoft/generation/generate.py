"""Answers: one token after another, with a cache, many prompts at once.

Without a cache, the n-th token costs a forward pass over n tokens. With it, keys and values of earlier positions are
kept and each new token costs one position. Prompts of different lengths are read as training reads packed documents,
one behind another in a single row, so none is padded. From then on every row adds a token a pass; rows whose answer has
ended leave the batch, and the next prompts take their places, so that a long answer does not keep a batch waiting.

    python -m nanoft chat runs/tiny --prompt "Please book a table ..."       one answer
    python -m nanoft chat runs/tiny                                          a chat: nanoft/talk.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from nanoft import UserError
from nanoft.data.chat_tokenizer import ChatTokenizer, Message
from nanoft.generation.chat import ChatSession, check_text
from nanoft.generation.decode import Decoding
from nanoft.generation.sampling import GREEDY, Sampler, Sampling
from nanoft.io.untrusted import read_json
from nanoft.kernels.decode import MEMORY_SHARE
from nanoft.lora import linears_of
from nanoft.model import Decoder
from nanoft.models.dequantize import cache_weights
from nanoft.models.open import open_chat_tokenizer, open_model
from nanoft.runtime.command import Arguments, command
from nanoft.runtime.device import choose_device, choose_dtype, quiet_libraries
from nanoft.runtime.memory import available_host_bytes

EXAMPLES = """examples:
  python -m nanoft chat runs/tiny --prompt "What is the weather in Oslo on Monday?"
  python -m nanoft chat runs/tiny --base                                  a chat, with the base's answers
  python -m nanoft chat runs/tiny --temperature 0.7 --top-p 0.9 --seed 1  drawn, and the same again next time
  python -m nanoft chat runs/tiny < questions.txt                         an answer for each line"""
CROWD = 0.75  # when at most this share of the places goes on, others take theirs: that copies the cache of those


@dataclass(frozen=True)
class Answer:
    """Generated ids without the stop token, and whether the model ended the turn itself."""

    ids: list[int]
    stopped: bool


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
    at_once: int | None = None,
    only: Sequence[int] | None = None,
) -> list[Answer]:
    """Continue every prompt until a stop id or `max_new_tokens`.

    Args:
        prompts: token ids, none empty.
        generator: of the draws, on the CPU; None: torch's own.
        at_once: answers that grow together; None: all.
        only: the numbers of the prompts that are answered; the draws are those of all of them. None: all.
    """
    stops, answers = set(stop_ids), [Answer([], False) for _ in prompts]
    for said in steps(model, prompts, stop_ids, max_new_tokens, sampling, generator, at_once, only):
        for row, token in said:
            if token in stops:
                answers[row] = Answer(answers[row].ids, True)
            else:
                answers[row].ids.append(token)
    return answers


@torch.inference_mode()
def steps(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
    at_once: int | None = None,
    only: Sequence[int] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """(prompt's number, token) of the answers that grow, step by step; the stop id that ends one is its last token."""
    stops, waiting = set(stop_ids), list(range(len(prompts)) if only is None else only) if max_new_tokens else []
    places = at_once or len(waiting)
    sampler = Sampler(sampling, prompts, len(model.head), max_new_tokens, model.head.device, generator)
    decoding = Decoding(model)
    left = [max_new_tokens] * len(prompts)  # of each prompt, tokens that its answer may still have
    rows: list[int] = []  # the prompt of each row of the batch; -1: its answer has ended
    hidden: list[torch.Tensor] = []  # (rows, n), in parts
    while waiting or rows:
        if waiting and len(rows) <= CROWD * places:
            newcomers, waiting = waiting[: places - len(rows)], waiting[places - len(rows) :]
            hidden.append(decoding.join([prompts[row] for row in newcomers], max_new_tokens))
            sampler.join(newcomers)
            rows += newcomers
        newest = sampler.choose(decoding.logits(torch.cat(hidden)))  # (b,)
        said = [(row, token) for row, token in zip(rows, newest.tolist(), strict=True) if row >= 0]
        yield said
        for row, _ in said:
            left[row] -= 1
        ended = {row for row, token in said if token in stops or not left[row]}
        rows = [-1 if row in ended else row for row in rows]
        going = [place for place, row in enumerate(rows) if row >= 0]
        if len(going) <= CROWD * (places if waiting else len(rows)):
            rows, chosen = [rows[place] for place in going], torch.tensor(going, dtype=torch.long, device=newest.device)
            newest = newest[chosen]
            decoding.keep(going)
            sampler.keep(chosen)
        hidden = [decoding.step(newest)] if rows else []


def answer(
    model: Decoder,
    chat: ChatTokenizer,
    messages: Sequence[Message],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> str:
    """The model's answer to a conversation, rendered as it was in training."""
    prompt = chat.encode_prompt(messages)
    return chat.decode(generate(model, [prompt], chat.stop_ids, max_new_tokens, sampling, generator)[0].ids)


@command
def main(argv: list[str]) -> int:
    """`python -m nanoft chat RUN|MODEL [--prompt TEXT]`: one answer, or a chat when no prompt is given."""
    args = build_parser().parse_args(argv)
    sampling = read_sampling(args)
    check_text("--prompt", args.prompt or "")
    check_text("--system", args.system or "")
    quiet_libraries()
    device = choose_device("auto")
    opened = open_model(args.source, device, choose_dtype("auto", device))
    if args.base and not opened.adapters:
        raise UserError(f"--base: {args.source} has no adapter to switch off: talk to its base by the base's own name")
    cache_weights(opened.model, "cached" if device.type == "cpu" and has_room(opened.model) else "auto")
    chat = open_chat_tokenizer(args.source, opened)
    generator = torch.Generator()
    if args.seed is None:
        generator.seed()
    else:
        generator.manual_seed(args.seed)

    def speak(prompt: list[int], limit: int) -> Iterator[int]:
        for said in steps(opened.model, [prompt], chat.stop_ids, limit, sampling, generator):
            if said[0][1] not in chat.stop_ids:
                yield said[0][1]

    context = read_json(opened.base_directory / "config.json").get("max_position_embeddings") or math.inf
    talk = ChatSession(chat, speak, opened.adapters, args.base, context, args.max_new_tokens, args.system)
    if args.prompt is None:
        talk.run()
    else:
        talk.ask(args.prompt)
    return 0


def has_room(model: Decoder) -> bool:
    """Whether the weights of a packed base may lie there unpacked, which makes a token several times as fast."""
    needed = sum(layer.out_features * layer.in_features for layer in linears_of(model).values()) * 4  # bytes, at most
    return needed <= MEMORY_SHARE * available_host_bytes()


def build_parser() -> Arguments:
    parser = Arguments(
        prog="python -m nanoft chat",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Talk to a fine-tuned run or to a model, rendered exactly as in training.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("source", metavar="RUN|MODEL", help="run directory, adapter, model directory or Hub name")
    add("--prompt", metavar="TEXT", help="answer this and stop; without it, chat: a line a question, /help for more")
    add("--system", metavar="TEXT", help="a system message")
    add("--base", action="store_true", help="after each answer, what the base says, without the adapter")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="an answer's limit (256)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (the default): always the likeliest token")
    add("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="... among the likeliest with probability P together")
    add("--min-p", type=float, default=0.0, metavar="P", help="... among those P times as likely as the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: what was said gets less likely")
    add("--seed", type=int, metavar="N", help="of the draws; without it, another one every time")
    return parser


def read_sampling(args: argparse.Namespace) -> Sampling:
    """The command's sampling options.

    Raises:
        UserError: one is out of its range, or has no effect.
    """
    ranges = {
        "max_new_tokens": (args.max_new_tokens >= 1, ">= 1"),
        "temperature": (0 <= args.temperature < math.inf, "a number >= 0"),
        "top_k": (args.top_k >= 0, ">= 0, and 0 means all tokens"),
        "top_p": (0 < args.top_p <= 1, "above 0 and at most 1"),
        "min_p": (0 <= args.min_p <= 1, "between 0 and 1"),
        "repetition_penalty": (0 < args.repetition_penalty < math.inf, "a number above 0"),
        "seed": (args.seed is None or 0 <= args.seed < 2**63, "between 0 and 2^63 - 1"),
    }
    for name, (fits, wanted) in ranges.items():
        if not fits:
            raise UserError(f"--{name.replace('_', '-')}: {getattr(args, name)} is out of range: it must be {wanted}")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    for name in ("top_k", "top_p", "min_p"):
        if sampling.temperature == 0 and getattr(sampling, name) != getattr(GREEDY, name):
            raise UserError(f"--{name.replace('_', '-')}: nothing is drawn at temperature 0: add --temperature 0.7")
    return sampling
