"""A peer: the same optimizer step by unsloth, in an environment of its own (bench/environments.py).

    python bench/peer_unsloth.py --nf4 1       prints one line of JSON

unsloth reads models from directories and replaces parts of transformers when it is imported. So another process writes
the base of bench/peer.py first; the steps are the loop of bench/peer.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"UNSLOTH_SKIP_TORCHVISION_CHECK": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}
WRITE = "--write"  # the base into a directory


def write(args: argparse.Namespace, directory: str) -> None:
    import torch
    from peer import build_base
    from peer_trl import word_tokenizer

    args.nf4 = args.ckpt = 0
    build_base(args, torch.device("cpu")).save_pretrained(directory)
    word_tokenizer(args.vocab).save_pretrained(directory)


def run(args: argparse.Namespace, directory: str) -> dict[str, Any]:
    from unsloth import FastLanguageModel  # isort: split

    import torch
    from contender import ALL_LINEAR, ALPHA
    from peer import draw_weights, train_steps

    if args.threads:
        torch.set_num_threads(args.threads)
    base, _ = FastLanguageModel.from_pretrained(
        directory, max_seq_length=args.seq, dtype=getattr(torch, args.dtype), load_in_4bit=bool(args.nf4)
    )
    model = FastLanguageModel.get_peft_model(
        base,
        r=args.r,
        lora_alpha=ALPHA,
        lora_dropout=0,
        target_modules=list(ALL_LINEAR),
        use_gradient_checkpointing=bool(args.ckpt),
    )
    draw_weights(args, {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return train_steps(args, model.train(), device)


def main(argv: list[str]) -> None:
    from contender import add_step_options

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_options(parser)
    parser.add_argument(WRITE, metavar="DIRECTORY", help="write the base, which the other process reads")
    args = parser.parse_args(argv)
    if args.write:
        write(args, args.write)
        return
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([sys.executable, str(Path(__file__)), *argv, WRITE, directory], check=True, stdout=sys.stderr)
        print(json.dumps(run(args, directory)))


if __name__ == "__main__":
    main(sys.argv[1:])
