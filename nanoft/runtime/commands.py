"""The subcommands besides the three scripts: `python -m nanoft chat|doctor|compare|plot`.

All options are defined here, so that --help does not import torch; a command is implemented by `run` in its module.
"""

from __future__ import annotations

import argparse
import importlib

from nanoft.runtime import cores
from nanoft.runtime.command import Arguments, command

CHAT = """examples:
  python -m nanoft chat runs/tiny --prompt "What is the weather in Oslo on Monday?"
  python -m nanoft chat runs/tiny --compare                               a chat that also shows the base's answers
  python -m nanoft chat runs/tiny --temperature 0.7 --top-p 0.9 --seed 1  sampled, reproducibly
  python -m nanoft chat runs/tiny < questions.txt                         each line is answered on its own
  python -m nanoft chat runs/tiny --json < chats.jsonl > answers.jsonl    JSON lines: prompt or messages -> answer"""
DOCTOR = "examples: python -m nanoft doctor; python -m nanoft doctor configs/tiny.py quantization.bits=4"
COMPARE = "examples: python -m nanoft compare runs/a runs/b --plot both.svg; python -m nanoft compare runs/a --follow"

PARSER = Arguments(prog="python -m nanoft", description="Chat with a run, check the machine, compare and plot runs.")
COMMANDS = PARSER.add_subparsers(dest="command", required=True, metavar="chat|doctor|compare|plot")


def new_command(name: str, module: str, about: str, epilog: str = "") -> Arguments:
    """A subcommand that is run by `module.run(args)`."""
    raw = argparse.RawDescriptionHelpFormatter if "\n" in epilog else argparse.HelpFormatter
    parser = COMMANDS.add_parser(name, help=about, description=f"{about}.", epilog=epilog, formatter_class=raw)
    parser.set_defaults(module=f"nanoft.{module}")
    return parser


add = new_command("chat", "generation.chat", "Chat with a run or a model, rendered as in training", CHAT).add_argument
add("source", metavar="RUN|MODEL", help="run directory, adapter, model directory or Hub name")
add("--prompt", metavar="TEXT", help="answer this and exit; without it, chat: one question per line, /help for more")
add("--system", metavar="TEXT", help="a system message")
add("--json", action="store_true", help="JSON lines in and out: a string, messages, or an object with one of them")
add("--compare", "--base", action="store_true", help="also show the base model's answer, without the adapter")
add("--max-new-tokens", type=int, default=256, metavar="N", help="most tokens of an answer; default: 256")
add("--temperature", type=float, default=0.0, metavar="T", help="0 (the default): greedy")
add("--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens")
add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens with total probability P")
add("--min-p", type=float, default=0.0, metavar="P", help="sample from tokens at least P times as likely as the top")
add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: repeated tokens become less likely")
add("--seed", type=int, metavar="N", help="seed for sampling; default: a new one every time")

add = new_command(
    "doctor", "training.doctor", "Check this machine, and whether a config can run on it", DOCTOR
).add_argument
add("config", nargs="?", help="Python, YAML or JSON file")
add("overrides", nargs="*", metavar="section.field=value", help="change a setting")

add = new_command("compare", "tracking.compare", "Compare runs, or follow one", COMPARE).add_argument
add("runs", nargs="+", metavar="RUN", help="run directories")
add("--plot", metavar="FILE", help="plot their eval losses (.png, .svg, .pdf)")
add("--html", metavar="FILE", help="write a page with settings, figures, losses, and each run's report")
add("--follow", action="store_true", help="watch one run until it ends; it need not have started yet")
add("--every", type=float, default=2.0, metavar="S", help="seconds between updates with --follow; default: 2")

add = new_command("plot", "tracking.plots", "Plot the curves of a run into RUN/plots/").add_argument
add("run", metavar="RUN", help="run directory")


@command
def main(argv: list[str]) -> int:
    args = PARSER.parse(argv)
    if args.command in ("chat", "doctor"):  # the others compute nothing
        cores.prepare()
    return importlib.import_module(args.module).run(args)
