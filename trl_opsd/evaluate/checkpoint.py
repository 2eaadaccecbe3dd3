"""What a checkpoint is before it is loaded: whole or damaged, which one exactly, and how large."""

import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file

from ..cli import UserError, check_checkpoint


# What transformers and torch raise on a configuration that is not one
_DAMAGE = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
_DAMAGE += (StrictDataclassError,)
_WEIGHTS = ("*.safetensors", "*.bin")


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


def check_evaluated(path: str | None, trust_remote_code: bool = False) -> None:
    """
    Checks that a checkpoint, or an adapter with its base, is there and whole, without loading weights.

    Args:
        path (`str`):
            Folder, or id on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the configuration may run code of its own.

    Raises:
        UserError: If something is missing, cut or unreadable.
    """
    if path is None:
        raise UserError("`model_name_or_path` is missing: give the folder of a checkpoint or a model id on the Hub.")
    base = base_of(path)
    for folder in {Path(path), Path(base)}:
        for name in ("config.json", "generation_config.json", "tokenizer_config.json", "adapter_config.json"):
            file = folder / name
            try:
                whole = not file.is_file() or isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
            except (ValueError, RecursionError):
                whole = False
            if not whole:
                raise UserError(f"`{file}` is damaged: it is not a JSON object.")
        check_weights(folder)
    try:
        check_checkpoint(base, "model_name_or_path", trust_remote_code)
        count_checkpoint(path, trust_remote_code)
        load_generation_config(path, trust_remote_code)
    except UserError:
        raise
    except _DAMAGE as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise UserError(
            f"The configuration of `{base}` is damaged: no model can be made from it ({reason:.300})."
        ) from None


def load_generation_config(path: str, trust_remote_code: bool = False) -> GenerationConfig:
    """Reads the generation config of a checkpoint without its weights, as loading the model would."""
    base = base_of(path)
    try:
        return GenerationConfig.from_pretrained(base)
    except OSError:
        return GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        )


def check_weights(folder: Path) -> None:
    """
    Checks that the weights in a folder are all there, and none of the files is cut.

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


def check_stored(path: str, trust_remote_code: bool = False) -> None:
    """
    Checks, for whichever backend loads them next, that the weights of a checkpoint, and of an adapter's base, are those
    of its model and hold numbers. They are read one at a time, so that memory is bounded by the largest.

    Args:
        path (`str`):
            Folder, or id on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the configuration may run code of its own.

    Raises:
        UserError: If a weight cannot be read, is missing, left over, of another shape, or not finite.
    """
    for part in dict.fromkeys((base_of(path), path)):  # loading an adapter says nothing of the weights below it
        config = AutoConfig.from_pretrained(base_of(part), trust_remote_code=trust_remote_code)
        if "quantization_config" not in config.to_dict():  # its weights have other names, known to its quantiser alone
            load_weights(part, device_map={"": "meta"}, trust_remote_code=trust_remote_code)
        file = find_adapter_config_file(part) if part != base_of(part) else cached_file(part, "config.json")
        for name, weight in _stored(Path(file).parent):
            if weight.dtype in (torch.float32, torch.bfloat16, torch.float16) and not weight.isfinite().all():
                raise UserError(f"The checkpoint `{part}` has numbers that are not finite in `{name}`: it is damaged.")


def load_weights(path: str, **kwargs) -> PreTrainedModel:
    """
    Loads a checkpoint that has the weights of its model, all of them and nothing else.

    Args:
        path (`str`):
            Folder, or id on the Hub.
        **kwargs:
            For `from_pretrained`.

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


def _stored(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that lie in a folder, with their names."""
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
        for name in names:
            with safe_open(file, framework="pt") as tensors:  # again: what it has mapped stays until it is closed
                weight = tensors.get_tensor(name)
            yield name, weight
    for file in () if files else sorted(folder.glob("*_model*.bin")):
        yield from torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)).items()


def checkpoint_hash(path: str) -> str:
    """
    Returns a hash of what decides a checkpoint's outputs: weights and configurations, of an adapter with its base.

    Args:
        path (`str`):
            Folder, which is read whole, or id on the Hub, whose commit says it.

    Returns:
        `str`: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    base, folder = base_of(path), Path(path)
    if base != path:
        digest.update(checkpoint_hash(base).encode())
    if not folder.is_dir():
        digest.update(f"{path}@{AutoConfig.from_pretrained(path)._commit_hash}".encode())
        return digest.hexdigest()
    names = ("config.json", "generation_config.json", "adapter_config.json")
    files = [folder / name for name in names] + [file for kind in _WEIGHTS for file in folder.glob(kind)]
    for file in sorted(file for file in files if file.is_file()):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def weights_bytes(path: str) -> int | None:
    """Returns the size of a checkpoint's weight files, of an adapter with its base; `None` where they are on the Hub."""
    base, folder = base_of(path), Path(path)
    if not folder.is_dir():
        return None
    own = sum(file.stat().st_size for kind in _WEIGHTS for file in folder.glob(kind))
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
        `dict[str, int]`: `parameters`, and `non_embedding_parameters` of them: those that are neither the table of
        input embeddings nor the output layer.
    """
    outer = {
        id(parameter)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        if layer is not None
        for parameter in layer.parameters()
    }
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    return {
        "parameters": sum(sizes.values()),
        "non_embedding_parameters": sum(size for key, size in sizes.items() if key not in outer),
    }


def count_checkpoint(path: str, trust_remote_code: bool = False) -> dict[str, int]:
    """Counts the parameters of a checkpoint from its configuration, as [`count_parameters`]; an adapter's on top."""
    config = AutoConfig.from_pretrained(base_of(path), trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        counts = count_parameters(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    if base_of(path) != path:
        for file in Path(path).glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                added = sum(torch.Size(tensors.get_slice(name).get_shape()).numel() for name in tensors.keys())
            counts = {name: count + added for name, count in counts.items()}
    return counts
