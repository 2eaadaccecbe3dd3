"""What can be made of a checkpoint: artefacts, each for an engine and in a precision."""

import difflib
from dataclasses import dataclass

from ..cli import UserError


@dataclass(frozen=True)
class Artefact:
    """
    What one engine serves, in one precision.

    Args:
        name (`str`):
            Name of its folder, and in results.
        family (`str`):
            What is converted together, and whose unquantised form is checked once: its tool, of [`FAMILIES`].
        precision (`str`):
            What the tool calls the precision.
        bits (`float`):
            Bits of a weight, about, to know how much of the disk it takes.
        is_calibrated (`bool`, *optional*, defaults to `False`):
            Whether it is quantised by what the model computes on rollouts.
        is_exact (`bool`, *optional*, defaults to `False`):
            Whether it holds every number of float32.
    """

    name: str
    family: str
    precision: str
    bits: float
    is_calibrated: bool = False
    is_exact: bool = False


@dataclass(frozen=True)
class Family:
    """
    Artefacts of one engine.

    Args:
        converter (`str`, *optional*):
            Environment that it is converted in; none, if that is this process.
        engine (`str`, *optional*):
            Environment that it is checked in; none, if that is this process.
        unquantised (`str`, *optional*):
            Precision in which the conversion is checked; none, if the engine takes the checkpoint itself.
        backend (`str`):
            What people call the engine.
    """

    converter: str | None
    engine: str | None
    unquantised: str | None
    backend: str


FAMILIES = {
    "safetensors": Family(None, None, None, "transformers"),
    "gguf": Family("gguf", "gguf", "f32", "llama.cpp"),
    "openvino": Family("openvino", "openvino", "f32", "openvino"),
    "onnx": Family("onnx", "onnx", "fp32", "onnxruntime"),
    "vllm": Family("llm-compressor", "vllm", None, "vllm"),
    "tensorrt-llm": Family(None, None, None, "transformers"),
}

ARTEFACTS = (
    Artefact("safetensors-float32", "safetensors", "float32", 32, is_exact=True),
    Artefact("safetensors-bfloat16", "safetensors", "bfloat16", 16),
    Artefact("safetensors-float16", "safetensors", "float16", 16),
    Artefact("gguf-f32", "gguf", "f32", 32, is_exact=True),
    Artefact("gguf-q8_0", "gguf", "q8_0", 8.5),
    Artefact("gguf-q4_k_m", "gguf", "q4_k_m", 6),
    Artefact("openvino-f32", "openvino", "f32", 32, is_exact=True),
    Artefact("openvino-int8", "openvino", "int8", 8.5),
    Artefact("openvino-int4", "openvino", "int4", 6),
    Artefact("onnx-fp32", "onnx", "fp32", 32, is_exact=True),
    Artefact("onnx-int4", "onnx", "int4", 6),
    Artefact("w8a8", "vllm", "w8a8", 9, is_calibrated=True),
    Artefact("fp8", "vllm", "fp8", 9),
    Artefact("w4a16", "vllm", "w4a16", 6, is_calibrated=True),
    Artefact("tensorrt-llm", "tensorrt-llm", "bfloat16", 16),
)

#: Why what people will look for is not there.
POSTPONED = {
    "executorch": "optimum-executorch asks for a release candidate of transformers",
    "optimum-onnx": "it read a rope theta of 10,000 where the checkpoint has 100,000: `onnx` is made by ONNX Runtime GenAI",
    "torchao": "its int4 needs kernels that its wheel has for some GPUs alone: `w4a16` is four bits too",
}


def parse_formats(formats: list[str] | None) -> list[Artefact]:
    """
    Reads what is asked for.

    Args:
        formats (`list[str]`, *optional*):
            Names of families, of a family with a precision, and of artefacts.

    Returns:
        `list[Artefact]`: In the order of [`ARTEFACTS`], so that a family stands together.

    Raises:
        UserError: If there is none, or one is not known, naming the nearest.
    """
    families = list(dict.fromkeys(artefact.family for artefact in ARTEFACTS if artefact.family != "vllm"))
    known = {family: [artefact for artefact in ARTEFACTS if artefact.family == family] for family in families}
    for artefact in ARTEFACTS:
        name = (
            artefact.name if artefact.family in ("vllm", "tensorrt-llm") else f"{artefact.family}:{artefact.precision}"
        )
        known[name] = [artefact]
    if isinstance(formats, str):
        raise UserError(f"`formats` must be a list, and is {formats!r}: write `formats: [{formats}]`.")
    if not formats:
        raise UserError(f"`formats` is missing: name any of {', '.join(known)}.")
    chosen = []
    for name in formats:
        if name in POSTPONED:
            raise UserError(f"`formats`: `{name}` is not made, because {POSTPONED[name]}.")
        if name not in known:
            near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
            ending = f"did you mean `{near[0]}`?" if near else f"there are {', '.join(known)}."
            raise UserError(f"`formats`: there is no format `{name}`: {ending}")
        chosen += known[name]
    return [artefact for artefact in ARTEFACTS if artefact in chosen]
