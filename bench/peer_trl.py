"""A peer: the same optimizer step by TRL's SFTTrainer with peft, in an environment of its own (bench/environments.py).

    python bench/peer_trl.py --masked 0.7      prints one line of JSON

A step is timed from the Trainer's `on_step_begin` to its `on_step_end`: micro-batches, clipping and optimizer, without
the logging. The base, its weights and the tokens are those of bench/peer.py. Packed shapes are refused: the steps hold
different numbers of conversations, and those of a Trainer equally many.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from typing import Any

import torch
from contender import IGNORE, LEARNING_RATE, MAX_GRAD_NORM, figures, peak_rss_mb, print_result, read_steps
from datasets import Dataset
from peer import build_base, draw_weights, lora_config
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Seconds, loss and gradient norm of each step."""

    def __init__(self) -> None:
        self.seconds, self.losses, self.norms = list[float](), list[float](), list[float]()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self.started)

    def on_log(self, _: Any, __: Any, ___: Any, logs: dict[str, Any], **____: Any) -> None:
        if "grad_norm" in logs:
            self.losses.append(float(logs["loss"]))
            self.norms.append(float(logs["grad_norm"]))


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One word for each id; no text is ever read."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"t{n}": n for n in range(3, vocab)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.packed:
        raise SystemExit("ValueError: SFTTrainer takes equally many texts in every step")
    logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = [text for step in read_steps(args) for text in step]
    rows = [{"input_ids": t.ids.tolist(), "completion_mask": (t.labels != IGNORE).astype(int).tolist()} for t in texts]
    with tempfile.TemporaryDirectory() as directory:
        settings = SFTConfig(
            directory,
            per_device_train_batch_size=args.bs,
            gradient_accumulation_steps=1,
            max_steps=args.warmup + args.steps,
            train_sampling_strategy="sequential",
            bf16=args.dtype == "bfloat16",
            use_cpu=device.type == "cpu",
            gradient_checkpointing=bool(args.ckpt),
            max_length=args.seq,
            completion_only_loss=bool(args.masked),
            optim="adamw_torch_fused",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=MAX_GRAD_NORM,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        clock = Clock()
        trainer = SFTTrainer(
            build_base(args, device),
            settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=word_tokenizer(args.vocab),
            peft_config=lora_config(args),
            callbacks=[clock],
        )
        trained = {name.replace(".default", ""): p for name, p in trainer.model.named_parameters() if p.requires_grad}
        draw_weights(args, trained)
        loaded_mb = peak_rss_mb()
        trainer.train()
    return figures(args, device, (clock.seconds, clock.losses, clock.norms), loaded_mb)


if __name__ == "__main__":
    print_result(run, __doc__)
