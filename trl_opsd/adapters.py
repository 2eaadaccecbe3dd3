"""What the trainers of all stages need to know of PEFT adapters."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from peft import AutoPeftModelForCausalLM
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled


def merged(name_or_path: str, folder: str) -> str:
    """
    An ordinary checkpoint of what an earlier stage has left, which may be an adapter.

    Args:
        name_or_path (`str`):
            Folder of a checkpoint or of an adapter, or a model id on the Hub.
        folder (`str`):
            Where an adapter and its base are written to as one, in float32, whole or not at all.

    Returns:
        `str`: `folder` for an adapter, else `name_or_path`.
    """
    if not (Path(name_or_path) / "adapter_config.json").is_file():
        return name_or_path
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            staging = Path(f"{folder}.tmp")
            shutil.rmtree(staging, ignore_errors=True)
            model = AutoPeftModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32, device_map="cpu")
            # An adapter need not have a tokenizer of its own
            has_tokenizer = (Path(name_or_path) / "tokenizer_config.json").is_file()
            tokenizer = name_or_path if has_tokenizer else model.active_peft_config.base_model_name_or_path
            model.merge_and_unload().save_pretrained(staging)
            AutoTokenizer.from_pretrained(tokenizer).save_pretrained(staging)
            shutil.rmtree(folder, ignore_errors=True)
            staging.rename(folder)
    return folder


class FrozenBase:
    """
    Keeps the base weights under a LoRA adapter as they are, bit for bit.

    To hand its weights to an engine, TRL merges the adapter into the base and takes it out again. In half precision the
    two roundings do not cancel: after 100 times a quarter of the "frozen" weights have changed, and with them a teacher
    that is the base model. A copy in host memory, of the layers that have an adapter, is written back afterwards.

    Args:
        model ([`~peft.PeftModel`]):
            Model.
    """

    def __init__(self, model):
        self._model = model
        self._saved: dict[str, torch.Tensor] | None = None

    def _parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._model.named_parameters():
            if ".base_layer." in name and parameter.dtype in (torch.bfloat16, torch.float16):
                local = parameter.detach()
                yield name, local.to_local() if isinstance(local, DTensor) else local

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the adapter may be merged and taken out again."""
        if is_deepspeed_zero3_enabled():
            yield  # there, it is merged into gathered copies, which nothing writes back
            return
        if self._saved is None:
            self._saved = {name: value.to("cpu", copy=True) for name, value in self._parameters()}
        try:
            yield
        finally:
            for name, value in self._parameters():
                value.copy_(self._saved[name])
