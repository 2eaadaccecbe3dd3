"""
OpenVINO, in an environment of its own: converts a checkpoint by optimum-intel, and writes by OpenVINO GenAI.

    python in_openvino.py convert|generate REQUEST.json

See [`trl_opsd.export.tools`] for what a request holds.
"""

import json
import sys
import time
from pathlib import Path


FORMATS = {"f32": "fp32", "int8": "int8", "int4": "int4"}


def convert(request: dict) -> dict:
    """From a checkpoint in float32, with its tokenizer as a model of OpenVINO's."""
    # Its command and not `main_export`, which takes a precision and leaves the weights as they are
    from optimum.commands.optimum_cli import main

    options = ["--weight-format", FORMATS[request["precision"]]]
    if request["precision"] == "int4":
        config = json.loads((Path(request["checkpoint"]) / "config.json").read_text(encoding="utf-8"))
        width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        columns = (config["hidden_size"], config["intermediate_size"], config["num_attention_heads"] * width)
        # Groups of columns with a scale of their own; where none divides them, a row has one
        group = next((size for size in (128, 64, 32) if all(number % size == 0 for number in columns)), -1)
        options += ["--group-size", str(group)]
    sys.argv = ["optimum-cli", "export", "openvino", "--model", request["checkpoint"], "--library", "transformers"]
    sys.argv += ["--task", "text-generation-with-past", *options, request["output"]]
    main()
    return {}


def generate(request: dict) -> dict:
    """Greedy completions, and what the folder says of its tokenizer."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    hints = {"INFERENCE_PRECISION_HINT": "f32"} if request["is_exact"] else {}
    pipe = genai.LLMPipeline(request["artefact"], "CPU", **hints)
    tokenizer, config = pipe.get_tokenizer(), pipe.get_generation_config()
    ends = sorted({*config.stop_token_ids, *([config.eos_token_id] if config.eos_token_id >= 0 else [])})
    template = tokenizer.chat_template or None
    rendered = None
    if template is not None:
        rendered = [
            tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
            for conversation in request["conversations"]
        ]
    tokens = [tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist() for text in request["texts"]]
    config.do_sample = False
    completions, start = [], time.perf_counter()
    for ids, limit in request["prompts"]:
        config.max_new_tokens = limit
        mask = np.ones((1, len(ids)), dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(np.array([ids], dtype=np.int64)), ov.Tensor(mask))
        written = list(pipe.generate(inputs, config).tokens[0])
        completions.append([int(token) for token in written])
    seconds = time.perf_counter() - start
    # It leaves out the token that ended a completion: of several, the one that ends a turn of its tokenizer's
    end = int(tokenizer.get_eos_token_id())
    end = end if end in ends else ends[0]
    for (_, limit), written in zip(request["prompts"], completions, strict=True):
        if len(written) < limit and (not written or written[-1] not in ends):
            written.append(end)
    return {
        "tokens": tokens,
        "eos_ids": [int(tokenizer.get_eos_token_id())],
        "end_ids": [int(token) for token in ends],
        "chat_template": template,
        "rendered": rendered,
        "completions": completions,
        "seconds": seconds,
    }


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    answer = {"convert": convert, "generate": generate}[sys.argv[1]](request)
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
