"""Calls what converts and what serves: a program in an environment of its own, or transformers in this process."""

import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer

from ..cli import UserError
from ..evaluate.backends import Request, Sampling, TransformersEngine
from ..evaluate.checkpoint import load_generation_config, load_weights
from ..evaluate.plan import eos_token_ids
from .check import Answer, Reference


class ToolError(UserError):
    """A converter or an engine failed: half a sentence that says on what."""


class Engine(Protocol):
    """What an artefact is checked in."""

    def generate(
        self, artefact: Path, reference: Reference, prompts: list[tuple[list[int], int]], is_exact: bool
    ) -> Answer:
        """
        Reads and writes with an artefact.

        Args:
            artefact (`Path`):
                Its folder.
            reference ([`~trl_opsd.export.Reference`]):
                Texts to tokenise and conversations to render.
            prompts (`list[tuple[list[int], int]]`):
                What to complete, and how many tokens may follow.
            is_exact (`bool`):
                Whether to compute in float32, and not as the engine is served.

        Returns:
            [`~trl_opsd.export.Answer`]: What it says.

        Raises:
            ToolError: If it fails.
        """


class Tool:
    """
    A program of [`trl_opsd.export.tools`] in an environment.

    Args:
        name (`str`):
            Name of the environment.
        python (`Path`):
            Its Python.
        logs (`Path`):
            Folder for what it prints.
    """

    def __init__(self, name: str, python: Path, logs: Path):
        self.name, self.python, self.logs = name, python, logs

    def convert(
        self, checkpoint: Path, output: Path, precision: str, unquantised: Path | None = None, **options: Any
    ) -> None:
        """
        Converts a checkpoint.

        Args:
            checkpoint (`Path`):
                Its folder, in float32.
            output (`Path`):
                Empty folder for what comes out.
            precision (`str`):
                What the tool calls the precision.
            unquantised (`Path`, *optional*):
                What an earlier call has made in the precision that keeps everything.
            **options:
                For the tool.

        Raises:
            ToolError: If it fails.
        """
        self._call(
            "convert",
            checkpoint=str(checkpoint.absolute()),
            output=str(output.absolute()),
            precision=precision,
            unquantised=unquantised and str(unquantised.absolute()),
            options=options,
        )

    def generate(
        self, artefact: Path, reference: Reference, prompts: list[tuple[list[int], int]], is_exact: bool
    ) -> Answer:
        answer = self._call(
            "generate",
            artefact=str(artefact.absolute()),
            texts=reference.texts,
            conversations=reference.conversations,
            prompts=prompts,
            is_exact=is_exact,
        )
        return Answer(**answer)

    def _call(self, action: str, **request: Any) -> dict[str, Any]:
        program = Path(__file__).with_name("tools") / f"in_{self.name.replace('-', '_')}.py"
        log = self.logs.absolute() / f"{self.name}-{action}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # Nothing is to be fetched, and nothing of this process's environment to be imported
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with tempfile.TemporaryDirectory() as folder, log.open("w") as output:
            asked, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
            asked.write_text(json.dumps({**request, "answer": str(answer)}), encoding="utf-8")
            command = [str(self.python), "-I", str(program), action, str(asked)]
            ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, env=environment)
            output.flush()
            if ended.returncode == 0 and answer.is_file():
                return json.loads(answer.read_text(encoding="utf-8"))
        raise ToolError(f"{last_words(log) or f'it ended with status {ended.returncode}'} (all it said is in {log})")


def last_words(log: Path) -> str:
    """Returns the line that says what went wrong: the last error, or else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if any(word in line.lower() for word in ("error", "exception", "not supported"))]
    return (said or lines or [""])[-1][:300].rstrip(".")


class Transformers:
    """
    transformers in this process, as an engine.

    Args:
        dtype (`str`):
            Precision to compute in, if not in float32.
        batch_size (`int`):
            Number of completions at a time.
    """

    def __init__(self, dtype: str = "auto", batch_size: int = 64):
        self.dtype, self.batch_size = dtype, batch_size

    def generate(
        self, artefact: Path, reference: Reference, prompts: list[tuple[list[int], int]], is_exact: bool
    ) -> Answer:
        path = str(artefact)
        tokenizer = AutoTokenizer.from_pretrained(path)
        declared = eos_token_ids(load_generation_config(path), tokenizer)
        model = load_weights(path, dtype=torch.float32 if is_exact else self.dtype, device_map={"": "cpu"})
        start = time.perf_counter()
        completions = complete(model, tokenizer, prompts, tuple(declared), self.batch_size)
        seconds = time.perf_counter() - start
        template = tokenizer.chat_template
        return Answer(
            tokens=[tokenizer(text, add_special_tokens=False)["input_ids"] for text in reference.texts],
            eos_ids=declared,
            end_ids=declared,
            chat_template=template,
            rendered=None if template is None else render(tokenizer, reference.conversations),
            completions=completions,
            seconds=seconds,
        )


def complete(
    model, tokenizer, prompts: list[tuple[list[int], int]], eos_ids: tuple[int, ...], batch_size: int
) -> list[list[int]]:
    """Greedy completions of prompts, each at most as long as it may be."""
    engine = TransformersEngine(model, tokenizer.pad_token_id, batch_size, tokenizer)
    sampling = Sampling(0.0, 1.0, 0, max(limit for _, limit in prompts), eos_ids)
    requests = [Request(ids, 0, limit) for ids, limit in prompts]
    return [ids for _, ids in sorted(engine.generate(requests, sampling))]


def render(tokenizer, conversations: list) -> list[str]:
    """Conversations in the chat template of a tokenizer, up to where an answer begins."""
    return [
        tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        for conversation in conversations
    ]
