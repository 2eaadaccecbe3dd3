"""
ONNX Runtime GenAI, in an environment of its own: builds its model from a checkpoint, and writes by it.

    python in_onnx.py convert|generate REQUEST.json

See [`trl_opsd.export.tools`] for what a request holds.
"""

import json
import runpy
import sys
import tempfile
import time
from pathlib import Path


def convert(request: dict) -> dict:
    """From a checkpoint in float32."""
    # Its command, because the function behind it wants what the command has parsed
    with tempfile.TemporaryDirectory() as cache:
        sys.argv = ["builder", "-i", request["checkpoint"], "-o", request["output"], "-p", request["precision"]]
        sys.argv += ["-e", "cpu", "-c", cache, "--extra_options", "hf_token=false"]
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)
    return {}


def generate(request: dict) -> dict:
    """Greedy completions, and what the folder says of its tokenizer."""
    import onnxruntime_genai as genai

    model = genai.Model(request["artefact"])
    tokenizer = genai.Tokenizer(model)
    declared = json.loads((Path(request["artefact"]) / "genai_config.json").read_text(encoding="utf-8"))["model"]
    ends = declared["eos_token_id"] if isinstance(declared["eos_token_id"], list) else [declared["eos_token_id"]]
    has_template = any(Path(request["artefact"]).glob("chat_template*")) or (
        "chat_template"
        in json.loads((Path(request["artefact"]) / "tokenizer_config.json").read_text(encoding="utf-8"))
    )
    rendered = None
    if has_template:
        rendered = [
            tokenizer.apply_chat_template(json.dumps(conversation), add_generation_prompt=True)
            for conversation in request["conversations"]
        ]
    tokens = [tokenizer.encode(text).tolist() for text in request["texts"]]
    completions, start = [], time.perf_counter()
    for ids, limit in request["prompts"]:
        params = genai.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(ids) + limit)
        generator = genai.Generator(model, params)
        generator.append_tokens(ids)
        written = []
        while not generator.is_done() and len(written) < limit:
            generator.generate_next_token()
            written.append(int(generator.get_next_tokens()[0]))
        completions.append(written)
    return {
        "tokens": tokens,
        "eos_ids": ends,
        "end_ids": ends,
        "chat_template": "" if has_template else None,
        "rendered": rendered,
        "completions": completions,
        "seconds": time.perf_counter() - start,
    }


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    answer = {"convert": convert, "generate": generate}[sys.argv[1]](request)
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
