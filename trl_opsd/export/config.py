from dataclasses import dataclass, field
from pathlib import Path

from ..evaluate.compare import margins_of
from ..hub import check_hub
from .environments import PINS, parse_environments
from .formats import parse_formats


@dataclass
class ExportConfig:
    r"""
    Configuration class for `python -m trl_opsd.export`. What artefacts are judged on is said by
    [`~trl_opsd.evaluate.EvaluateConfig`]: the checkpoint, tasks, verifiers and lengths; decoding is greedy.

    Parameters:
        > Parameters that control what is made

        formats (`list[str]`, *optional*):
            What to make: `"safetensors"`, `"gguf"`, `"openvino"` and `"onnx"` in all precisions that they have, or in one,
            as in `"gguf:q8_0"`; `"w8a8"`, `"fp8"` and `"w4a16"` for vLLM; `"tensorrt-llm"`, a folder with its build commands.
        output_dir (`str`, *optional*):
            Folder for the artefacts, each of which has a folder of its own there.
        licence (`str`, *optional*):
            Licence of the checkpoint, as the Hub calls it. Defaults to that of the model it was made from, where the card
            of one of its folders says it.

        > Parameters that control quantisation

        bank (`str`, *optional*):
            Rollout bank to calibrate `"w8a8"` and `"w4a16"` on: verified rollouts that the checkpoint itself has written,
            which `python -m trl_opsd.compress.bank` collects.
        calibration_samples (`int`, *optional*, defaults to `256`):
            Number of rollouts to calibrate on.

        > Parameters that control the check

        conversion_prompts (`int`, *optional*, defaults to `20`):
            Number of prompts on which an artefact that is not quantised must write what transformers writes in float32.
        conversion_tokens (`int`, *optional*, defaults to `64`):
            Number of tokens that it writes after each.
        margin (`list[str]`, *optional*):
            Loss of accuracy that still counts as none for an artefact that is quantised, as a share, and that of single
            tasks, as in `0.01 gsm8k=0.005`. Defaults to 0.01 for all.

        > Parameters that control the upload

        push_to_hub (`bool`, *optional*, defaults to `False`):
            Whether to upload each artefact that has its final name, to a repository of its own.
        hub_model_id (`str`, *optional*):
            What those repositories are called, as `NAME` or `OWNER/NAME`, before `-` and the name of the artefact.
        hub_private_repo (`bool`, *optional*):
            Whether they are private. Defaults to the owner's setting.

        > Parameters that control the converters

        environments (`list[str]`, *optional*):
            Environments that are there already, as NAME=FOLDER with the names `gguf`, `openvino`, `onnx`, `llm-compressor`
            and `vllm`. The others are made in `~/.cache/trl_opsd/export` when they are first needed.
    """

    # Parameters that control what is made
    formats: list[str] | None = field(
        default=None,
        metadata={
            "help": "What to make: safetensors, gguf, openvino, onnx (or one precision, as in gguf:q8_0), w8a8, fp8, w4a16, "
            "tensorrt-llm."
        },
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the artefacts."})
    licence: str | None = field(
        default=None,
        metadata={"help": "Licence as the Hub calls it. Defaults to what the card of a model it was made from says."},
    )

    # Parameters that control quantisation
    bank: str | None = field(
        default=None, metadata={"help": "Bank of the checkpoint's own verified rollouts, to calibrate on."}
    )
    calibration_samples: int = field(default=256, metadata={"help": "Number of rollouts to calibrate on."})

    # Parameters that control the check
    conversion_prompts: int = field(
        default=20, metadata={"help": "Number of prompts on which a conversion must write what transformers writes."}
    )
    conversion_tokens: int = field(default=64, metadata={"help": "Number of tokens that it writes after each."})
    margin: list[str] | None = field(
        default=None,
        metadata={
            "help": "Loss of accuracy that still counts as none, and that of single tasks, as in `0.01 gsm8k=0.005`."
        },
    )

    # Parameters that control the upload
    push_to_hub: bool = field(
        default=False, metadata={"help": "Upload each artefact that has its final name, to a repository of its own."}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "NAME or OWNER/NAME of those repositories, before the name of the artefact."}
    )
    hub_private_repo: bool | None = field(
        default=None, metadata={"help": "Whether they are private. Defaults to the owner's setting."}
    )

    # Parameters that control the converters
    environments: list[str] | None = field(
        default=None,
        metadata={"help": "Environments that are there already, NAME=FOLDER; the others are made when needed."},
    )

    def __post_init__(self):
        self.artefacts = parse_formats(self.formats)
        if self.output_dir is None:
            raise ValueError("`output_dir` is missing: give the folder for the artefacts.")
        if Path(self.output_dir).is_file():
            raise ValueError(f"`output_dir` must be a folder, and `{self.output_dir}` is a file.")
        for name in ("calibration_samples", "conversion_prompts", "conversion_tokens"):
            if self.__dict__[name] < 1:
                raise ValueError(f"`{name}` must be at least 1, and is {self.__dict__[name]}.")
        check_hub(self.push_to_hub, self.hub_model_id)
        self.margins = margins_of(self.margin or [])
        self.folders = parse_environments(self.environments, PINS)
        calibrated = [artefact.name for artefact in self.artefacts if artefact.is_calibrated]
        if calibrated and self.bank is None:
            raise ValueError(
                f"`bank` is missing, and {', '.join(calibrated)} must be calibrated: give a bank of the checkpoint's own "
                "verified rollouts, which `python -m trl_opsd.compress.bank` fills."
            )
