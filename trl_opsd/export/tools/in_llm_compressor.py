"""
llm-compressor, in an environment of its own: quantises a checkpoint to what vLLM serves.

    python in_llm_compressor.py convert REQUEST.json

See [`trl_opsd.export.tools`] for what a request holds. `options` has `rollouts`, token ids of prompts with completions, where
the precision is calibrated.
"""

import json
import sys
from pathlib import Path


def convert(request: dict) -> dict:
    """From a checkpoint in float32, by rounding to nearest (`fp8`) or by what the model computes on rollouts (GPTQ)."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # In the precision that it is served in beside what is quantised
    model = AutoModelForCausalLM.from_pretrained(request["checkpoint"], dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(request["checkpoint"])
    if request["precision"] == "fp8":
        oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"]))
    else:
        rollouts = request["options"]["rollouts"]
        data = Dataset.from_dict({"input_ids": rollouts, "attention_mask": [[1] * len(ids) for ids in rollouts]})
        if request["precision"] == "w8a8":
            recipe = GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])
        else:
            columns = {
                module.in_features
                for name, module in model.named_modules()
                if isinstance(module, torch.nn.Linear) and name != "lm_head"
            }
            groups = [size for size in (128, 64, 32) if all(width % size == 0 for width in columns)]
            if not groups:
                raise SystemExit(
                    f"error: w4a16 takes columns in groups of 128, 64 or 32, and the model has {sorted(columns)}: prune it with "
                    "--size_multiple 32"
                )
            weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": groups[0]}
            recipe = GPTQModifier(
                config_groups={"group_0": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"]
            )
        oneshot(
            model=model,
            dataset=data,
            recipe=recipe,
            max_seq_length=max(map(len, rollouts)),
            num_calibration_samples=len(rollouts),
        )
    model.save_pretrained(request["output"], save_compressed=True)
    tokenizer.save_pretrained(request["output"])
    return {}


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    answer = convert(request)
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
