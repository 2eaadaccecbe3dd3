"""What TensorRT-LLM takes: a checkpoint in half precision, and the commands that make an engine of it on a GPU."""

from pathlib import Path


# Where its repository has the script that reads a family, whose options are those below
_SCRIPTS = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen",
    "qwen3": "qwen",
    "qwen3_moe": "qwen",
    "phi3": "phi",
}
_SERVE = """\
#!/usr/bin/env bash
# TensorRT-LLM on the checkpoint in this folder, on a machine with an NVIDIA GPU. Written, and not run: the weights here
# were judged in transformers; what TensorRT-LLM makes of them was not.
#
#   bash build.sh                                    serves the checkpoint as it is (PyTorch backend)
{build_line}#
# Then, from a checkout of trl-opsd, on the tasks in provenance.json:
#
#   python -m trl_opsd.evaluate --model_name_or_path FOLDER --backend server --server_url http://localhost:8000 \\
#       --server_api chat --tasks ... --output served.json
set -euo pipefail
cd "$(dirname "$0")"
tp=${{TP:-1}}  # GPUs that share the model
"""
_BUILD_LINE = "#   TENSORRT_LLM=CHECKOUT bash build.sh engine       builds a TensorRT engine, and serves that\n"
_BUILD = """\
if [[ ${{1:-}} == engine ]]; then
    python "${{TENSORRT_LLM:?the folder of a checkout of TensorRT-LLM}}/examples/models/core/{script}/convert_checkpoint.py" \\
        --model_dir . --output_dir engine/checkpoint --dtype bfloat16 --tp_size "$tp"
    trtllm-build --checkpoint_dir engine/checkpoint --output_dir engine/built --gemm_plugin bfloat16 --workers "$tp"
    exec trtllm-serve engine/built --tokenizer . --backend tensorrt --host 0.0.0.0 --port 8000
fi
"""
_LAST = 'exec trtllm-serve . --backend pytorch --tp_size "$tp" --host 0.0.0.0 --port 8000\n'


def write_commands(folder: Path, model_type: str) -> None:
    """
    Writes `build.sh` into the folder of a checkpoint.

    Args:
        folder (`Path`):
            Folder.
        model_type (`str`):
            Family of the model, as its configuration calls it. For one whose script is not known there are the commands to
            serve the checkpoint alone.
    """
    script = _SCRIPTS.get(model_type)
    text = _SERVE.format(build_line="" if script is None else _BUILD_LINE)
    text += "" if script is None else _BUILD.format(script=script)
    (folder / "build.sh").write_text(text + _LAST, encoding="utf-8")
