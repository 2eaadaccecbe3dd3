"""What TensorRT-LLM takes: a checkpoint in half precision, and the commands that make an engine of it on a GPU."""

from pathlib import Path


_COMMANDS = """\
#!/usr/bin/env bash
# TensorRT-LLM on the checkpoint in this folder, on a machine with an NVIDIA GPU. Written, and not run: the weights here
# were judged in transformers, what TensorRT-LLM makes of them was not.
set -euo pipefail
cd "$(dirname "$0")"
tp=${{TP:-1}}

# An OpenAI-compatible server; its engine takes the checkpoint as it is
trtllm-serve . --tp_size "$tp" --host 0.0.0.0 --port 8000

# Whether what it serves is as good, from a checkout of trl-opsd and by the tasks of the export (provenance.json):
#   python -m trl_opsd.evaluate --model_name_or_path . --backend server --server_url http://localhost:8000 \\
#       --server_api chat --tasks ... --output served.json
"""


def write_commands(folder: Path) -> None:
    """
    Writes the build commands into the folder of a checkpoint.

    Args:
        folder (`Path`):
            Folder.
    """
    file = folder / "build.sh"
    file.write_text(_COMMANDS.format(), encoding="utf-8")
    file.chmod(0o755)
