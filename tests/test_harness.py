"""A merged model in lm-evaluation-harness: the command of docs/evaluation.md, on a custom task."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import merge
from nanoft.batches import Sample
from nanoft.data.chat_tokenizer import ChatTokenizer
from nanoft.evaluation import evaluate
from nanoft.models.weights import load_model

PAIRS = [("The sea is", " blue."), ("One, two,", " three, four, five."), ("Ask", " me!")]
TASK = """
task: own
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: perplexity, aggregation: perplexity, higher_is_better: false}}]
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_a_merged_model_has_the_same_likelihoods_there(runs: Path, tmp_path: Path) -> None:
    """Its perplexity of a task is exp of the mean over documents of -log p(answer | prompt)."""
    assert merge.main([str(runs / "lora"), "--out", str(tmp_path / "merged")]) == 0
    lines = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in PAIRS]
    (tmp_path / "own.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "own.yaml").write_text(TASK.format(file=tmp_path / "own.jsonl"))
    model = f"pretrained={tmp_path / 'merged'},dtype=float32"
    arguments = ["--model", "hf", "--model_args", model, "--tasks", str(tmp_path / "own.yaml"), "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *arguments, "--output_path", str(tmp_path / "out")],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(found.read_text())["results"]["own"]["perplexity,none"]

    decoder = load_model(tmp_path / "merged", torch.device("cpu"), torch.float32)
    chat = ChatTokenizer(tmp_path / "merged")
    samples = []
    for number, (prompt, answer) in enumerate(PAIRS):
        head, whole = (chat.tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, prompt + answer))
        assert whole[: len(head)] == head
        samples.append(Sample(np.array(whole, np.int32), np.arange(len(whole)) >= len(head), number))
    nats = evaluate.likelihoods(decoder, chat, samples, 4, 256).nats[:, 0]
    assert math.log(theirs) == pytest.approx(nats.mean(), rel=1e-4)
