"""A real model on real problems: SmolLM2-135M-Instruct on the first four of GSM8K, of which the report has all 1,319."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.data import load_prompts
from trl_opsd.evaluate import EvaluateConfig, evaluate


ROOT = Path(__file__).parents[1]
GSM8K = f"gsm8k:{ROOT.parent / 'shared' / 'data' / 'gsm8k' / 'test.jsonl'}"


def test_what_is_measured_is_what_the_model_writes(tmp_path):
    folder = tmp_path / "smollm2"
    command = [sys.executable, "scripts/smollm2.py", "--output_dir", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    config = EvaluateConfig(
        model_name_or_path=str(folder),
        tasks=[f"{GSM8K}[:4]"],
        decoding=["greedy"],
        max_completion_length=48,
        batch_size=4,
        dtype="float32",
        output=str(tmp_path / "results.json"),
    )
    (row,) = evaluate(config)
    completions = map(json.loads, (tmp_path / "results.completions.jsonl").read_text().splitlines())
    # One at a time and without padding, by the model's own template
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    lengths = []
    for example, completion in zip(load_prompts(GSM8K, "test").select(range(4)), completions, strict=True):
        inputs = tokenizer.apply_chat_template(
            example["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=48, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert completion["completion"] == tokenizer.decode(output, skip_special_tokens=True)
        lengths.append(len(output))
    assert row["mean_tokens"] == sum(lengths) / 4 and row["n"] == 4
    assert row["parameters"] == 134_515_008
