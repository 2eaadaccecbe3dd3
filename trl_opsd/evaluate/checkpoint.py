"""What a checkpoint is before a backend loads it: whole or damaged, which one exactly, and how large."""

import hashlib
import json
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch.nn import ModuleList
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file, extract_commit_hash, find_adapter_config_file

from ..cli import UserError, check_checkpoint
from ..positions import positions_of
from .config import EvaluateConfig


# What transformers and torch raise on a configuration that is not one
_DAMAGE = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
_DAMAGE += (StrictDataclassError,)
# Weights by the names that transformers and PEFT load; pickled ones only where there are no others
_WEIGHTS = (("model*.safetensors", "adapter_model*.safetensors"), ("pytorch_model*.bin", "adapter_model*.bin"))
_CONFIGS = ("config.json", "generation_config.json", "adapter_config.json", "hf_quant_config.json", "*.py")
_FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BLOCK = 1 << 24  # bytes, whole numbers of each type


@dataclass
class Checkpoint:
    """
    What is evaluated: a folder, an id on the Hub, or a model in memory.

    Args:
        path (`str`, *optional*):
            Folder, or id on the Hub.
        generation_config ([`~transformers.GenerationConfig`]):
            As loading the model would read it.
        positions (`int`, *optional*):
            Positions that the model has; `None` where its architecture sets no limit.
        parameters (`int`):
            Number of its parameters, of an adapter with its base.
        non_embedding_parameters (`int`):
            Those of them that are neither the table of input embeddings nor the output layer.
        active_parameters (`int`):
            Those of the latter that a token passes: of a mixture of experts without the experts that it is not sent to.
        weights_bytes (`int`, *optional*):
            Size of the weight files, of an adapter with its base; `None` where they are on the Hub, or there are none.
        base ([`Checkpoint`], *optional*):
            What it is an adapter of.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether it may bring code of its own.
        model ([`~transformers.PreTrainedModel`], *optional*):
            The model, if it is in memory already. Nothing then says which one exactly it is.
    """

    path: str | None
    generation_config: GenerationConfig
    positions: int | None
    parameters: int
    non_embedding_parameters: int
    active_parameters: int
    weights_bytes: int | None = None
    base: "Checkpoint | None" = None
    trust_remote_code: bool = False
    model: PreTrainedModel | None = None

    @cached_property
    def hash(self) -> str | None:
        """
        What decides its outputs, as 64 hexadecimal digits: weights and configurations, of an adapter with its base. A
        folder is read whole, once, and its weights are checked on the way; on the Hub the commit says it.

        Raises:
            UserError: If a weight cannot be read, or is not finite.
        """
        if self.model is not None:
            return None
        digest = hashlib.sha256()
        if self.base is not None:
            digest.update(self.base.hash.encode())
        if Path(self.path).is_dir():
            read_folder(Path(self.path), self.path, digest)
        else:
            # an adapter's own commit, which is not that of the configuration that its base has
            file = find_adapter_config_file(self.path) or cached_file(self.path, "config.json")
            digest.update(f"{self.path}@{extract_commit_hash(file, None)}".encode())
        return digest.hexdigest()

    @property
    def passed_parameters(self) -> int:
        """Parameters that a token passes: of a mixture of experts without the experts that it is not sent to."""
        return self.parameters - self.non_embedding_parameters + self.active_parameters

    def weight_bits(self, config: EvaluateConfig) -> float | None:
        """
        Returns the bits of a parameter as it is served.

        Args:
            config ([`EvaluateConfig`]):
                What serves, in which precision.

        Returns:
            `float` or `None`: Of quantised weights those of the files, scales and what was left alone included; `None` of a
            server that somebody else has started, and of weights that vLLM quantises itself.
        """
        if config.server_url is not None or "quantization" in (config.vllm_kwargs or {}):
            return None
        if self.model is not None:
            return 8.0 * self.model.dtype.itemsize
        architecture = AutoConfig.from_pretrained(base_of(self.path), trust_remote_code=self.trust_remote_code)
        if "quantization_config" in architecture.to_dict():
            return None if self.weights_bytes is None else 8 * self.weights_bytes / self.parameters
        if config.dtype != "auto":
            return 8.0 * getattr(torch, config.dtype).itemsize
        own = 8.0 * (architecture.dtype or torch.float32).itemsize
        # vLLM takes float32 weights in half precision, if it is not told otherwise
        return own if config.backend == "transformers" else min(own, 16.0)

    def check_loadable(self) -> None:
        """
        Checks, for whichever backend loads them next, that the weights, and those of an adapter's base, are those of the
        model and hold numbers: loading an adapter says nothing of the weights below it.

        Raises:
            UserError: If a weight cannot be read, is missing, left over, of another shape, or not finite.
        """
        for part in (self.base, self):
            if part is None:
                continue
            config = AutoConfig.from_pretrained(base_of(part.path), trust_remote_code=self.trust_remote_code)
            if "quantization_config" not in config.to_dict():  # its weights have other names, known to its quantiser
                load_weights(part.path, device_map={"": "meta"}, trust_remote_code=self.trust_remote_code)
            if Path(part.path).is_dir():
                _ = part.hash  # which reads it, if nothing has yet
            else:
                file = find_adapter_config_file(part.path) or cached_file(part.path, "config.json")
                read_folder(Path(file).parent, part.path, hashlib.sha256())


def open_checkpoint(
    path: str | None, trust_remote_code: bool = False, opened: "dict[str, Checkpoint] | None" = None
) -> Checkpoint:
    """
    Checks that a checkpoint, or an adapter with its base, is there and whole, and measures it, without reading weights.

    Args:
        path (`str`):
            Folder, or id on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the configuration may run code of its own.
        opened (`dict[str, Checkpoint]`, *optional*):
            Those that are open already, by path, to which this one is added: the base of two adapters is one.

    Returns:
        [`Checkpoint`]: Checkpoint, not loaded.

    Raises:
        UserError: If something is missing, cut or unreadable.
    """
    if path is None:
        raise UserError("`model_name_or_path` is missing: give the folder of a checkpoint or a model id on the Hub.")
    opened = {} if opened is None else opened
    if path in opened:
        return opened[path]
    base = base_of(path)
    below = None if base == path else open_checkpoint(base, trust_remote_code, opened)
    folder = Path(path)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"):
        file = folder / name
        try:
            whole = not file.is_file() or isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
        except (ValueError, RecursionError):
            whole = False
        if not whole:
            raise UserError(f"`{file}` is damaged: it is not a JSON object.")
    check_files(folder)
    try:
        if below is None:
            check_checkpoint(path, "model_name_or_path", trust_remote_code)
        architecture = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        opened[path] = Checkpoint(
            path,
            load_generation_config(base, trust_remote_code),
            positions_of(architecture),
            **count_checkpoint(path, trust_remote_code),
            weights_bytes=weights_bytes(path),
            base=below,
            trust_remote_code=trust_remote_code,
        )
    except UserError:
        raise
    except _DAMAGE as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(
            f"The configuration of `{base}` is damaged: no model can be made from it ({reason:.300})."
        ) from None
    return opened[path]


def wrap_model(model: PreTrainedModel, path: str | None) -> Checkpoint:
    """Returns a model in memory as a checkpoint; `path` is its label."""
    return Checkpoint(
        path, model.generation_config, positions_of(model.config), **count_parameters(model), model=model
    )


def base_of(path: str) -> str:
    """Returns the checkpoint that an adapter belongs to, or the checkpoint itself where it is no adapter."""
    try:
        file = find_adapter_config_file(path)
    except OSError:  # no such thing, which whoever loads it says better
        file = None
    if file is None:
        return path
    try:
        base = json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        base = None
    if not isinstance(base, str):
        raise UserError(f"The adapter_config.json of `{path}` names no `base_model_name_or_path`: it is damaged.")
    return base


def load_generation_config(path: str, trust_remote_code: bool = False) -> GenerationConfig:
    """Reads the generation config of a checkpoint without its weights, as loading the model would."""
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:
        return GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        )


def check_files(folder: Path) -> None:
    """
    Checks by their headers that the weights in a folder are all there, and none of the files is cut.

    Args:
        folder (`Path`):
            Folder of a checkpoint or an adapter; anything else is not looked at.

    Raises:
        UserError: If one is missing or damaged, naming it.
    """
    shards = sorted(folder.glob("*.safetensors"))
    for file in shards:
        try:
            with safe_open(file, framework="pt"):
                pass  # it reads the header, and compares the file's size with it
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"`{file}` is cut or damaged ({' '.join(str(error).split()):.200}): get it again."
            ) from None
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            wanted = set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            wanted = set()
        if not wanted:
            raise UserError(f"`{index}` is damaged: it has no readable `weight_map`.")
        missing = sorted(wanted - {file.name for file in shards})
        if missing:
            raise UserError(f"`{folder}` lacks the shard {missing[0]}, which {index.name} lists: get it again.")


def read_folder(folder: Path, path: str, digest: "hashlib._Hash") -> None:
    """
    Reads weights and configurations, each file once, into a hash, and checks on the way that the weights are finite.
    Memory is bounded, whatever the size of a weight.

    Args:
        folder (`Path`):
            Folder of a checkpoint or an adapter.
        path (`str`):
            What errors call it.
        digest (`hashlib` hash):
            Is given the name, the size and the bytes of each file.

    Raises:
        UserError: If a weight is not finite, naming it.
    """
    files = [file for kind in _CONFIGS for file in folder.glob(kind)] + weight_files(folder)
    for file in sorted(file for file in files if file.is_file()):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        if file.suffix == ".safetensors":
            weights = _read_safetensors(file, digest)
        else:
            with file.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    digest.update(block)
            # Pickled weights can only be mapped: what is read here is in memory as long as the system keeps it
            weights = _map_pickle(file) if file.suffix == ".bin" else ()
        for name, weight in weights:
            if weight.dtype not in _FLOATS.values() or weight.numel() == 0:
                continue
            if not all(extreme.isfinite() for extreme in weight.aminmax()):  # which are NaN where anything is
                raise UserError(f"The checkpoint `{path}` has numbers that are not finite in `{name}`: it is damaged.")


def _read_safetensors(file: Path, digest: "hashlib._Hash") -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of a file whose header was checked, in the order in which they lie there, in blocks."""
    buffer = bytearray(_BLOCK)
    with file.open("rb") as stream:
        start = stream.read(8)
        header = stream.read(struct.unpack("<Q", start)[0])
        digest.update(start + header)
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            for position in range(begin, end, _BLOCK):
                block = memoryview(buffer)[: min(_BLOCK, end - position)]
                stream.readinto(block)
                digest.update(block)
                if entry["dtype"] in _FLOATS:
                    yield name, torch.frombuffer(block, dtype=_FLOATS[entry["dtype"]])


def _map_pickle(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    yield from torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)).items()


def load_weights(path: str, **kwargs) -> PreTrainedModel:
    """
    Loads a checkpoint that has the weights of its model, all of them and nothing else.

    Args:
        path (`str`):
            Folder, or id on the Hub.
        **kwargs:
            For `from_pretrained`. On the device `meta` only headers are read.

    Returns:
        [`~transformers.PreTrainedModel`]: Model.

    Raises:
        UserError: If a weight cannot be read, is missing (transformers would go on with random numbers in its place),
            left over, or of another shape.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"The checkpoint `{path}` cannot be loaded ({str(error).splitlines()[0]}).") from None
    for kind, what in (
        ("missing_keys", "lacks the weight"),
        ("mismatched_keys", "has another shape than its config.json says for"),
        ("unexpected_keys", "holds a weight that the model of its config.json does not have,"),
    ):
        if info[kind]:
            raise UserError(f"The checkpoint `{path}` {what} `{sorted(map(str, info[kind]))[0]}`: it is damaged.")
    return model


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that the weights of a model or an adapter are loaded from, and nothing a trainer left."""
    for patterns in _WEIGHTS:
        if files := [file for pattern in patterns for file in folder.glob(pattern)]:
            return files
    return []


def weights_bytes(path: str) -> int | None:
    """Returns the size of a checkpoint's weight files, of an adapter with its base; `None` where they are on the Hub."""
    base, folder = base_of(path), Path(path)
    if not folder.is_dir():
        return None
    own = sum(file.stat().st_size for file in weight_files(folder))
    if base == path:
        return own
    below = weights_bytes(base)
    return None if below is None else own + below


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """
    Counts parameters.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.

    Returns:
        `dict[str, int]`: `parameters`; `non_embedding_parameters` of them: those that are neither the table of input
        embeddings nor the output layer; and `active_parameters` of these: those that a token passes, of a mixture of
        experts (whose configuration says `num_experts_per_tok`) without the experts that it is not sent to.
    """
    outer = {
        id(parameter)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        if layer is not None
        for parameter in layer.parameters()
    }
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    inner = sum(size for key, size in sizes.items() if key not in outer)
    chosen = model.config.get_text_config().to_dict().get("num_experts_per_tok")
    idle = 0
    for name, module in model.named_modules():
        if chosen is not None and name.rpartition(".")[2] == "experts":
            # one module for each expert, or all of them in tensors whose first dimension they are
            number = len(module) if isinstance(module, ModuleList) else next(module.parameters()).size(0)
            idle += sum(parameter.numel() for parameter in module.parameters()) * (number - chosen) // number
    return {
        "parameters": sum(sizes.values()),
        "non_embedding_parameters": inner,
        "active_parameters": inner - idle,
    }


def count_checkpoint(path: str, trust_remote_code: bool = False) -> dict[str, int]:
    """Counts the parameters of a checkpoint from its configuration, as [`count_parameters`]; an adapter's on top."""
    config = AutoConfig.from_pretrained(base_of(path), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        counts = count_parameters(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    if base_of(path) != path:
        for file in (file for file in weight_files(Path(path)) if file.suffix == ".safetensors"):
            with safe_open(file, framework="pt") as tensors:
                added = sum(torch.Size(tensors.get_slice(name).get_shape()).numel() for name in tensors.keys())
            counts = {name: count + added for name, count in counts.items()}
    return counts
