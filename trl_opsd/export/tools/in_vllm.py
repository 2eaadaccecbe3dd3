"""
vLLM, in an environment of its own: writes by a checkpoint, quantised or not.

    python in_vllm.py generate REQUEST.json

See [`trl_opsd.export.tools`] for what a request holds.
"""

import json
import os
import sys
import time
from pathlib import Path


def generate(request: dict) -> dict:
    """Greedy completions, and what the folder says of its tokenizer."""
    # Its core in this process: no second one to lose track of
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    room = max(len(ids) + limit for ids, limit in request["prompts"])
    engine = LLM(
        model=request["artefact"],
        dtype="float32" if request["is_exact"] else "auto",
        max_model_len=room,
        enforce_eager=True,  # to compile takes longer than to write what is asked for here
        enable_prefix_caching=False,
    )
    tokenizer = engine.get_tokenizer()
    declared = engine.llm_engine.model_config.try_get_generation_config().get("eos_token_id")
    ends = sorted({tokenizer.eos_token_id, *(declared if isinstance(declared, list) else [declared])} - {None})
    template = tokenizer.chat_template
    rendered = None
    if template is not None:
        rendered = [
            tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
            for conversation in request["conversations"]
        ]
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in request["texts"]]
    params = [SamplingParams(temperature=0, max_tokens=limit, detokenize=False) for _, limit in request["prompts"]]
    prompts = [{"prompt_token_ids": ids} for ids, _ in request["prompts"]]
    start = time.perf_counter()
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return {
        "tokens": tokens,
        "eos_ids": ends,
        "end_ids": ends,
        "chat_template": template,
        "rendered": rendered,
        "completions": [list(output.outputs[0].token_ids) for output in outputs],
        "seconds": time.perf_counter() - start,
    }


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    answer = generate(request)
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
