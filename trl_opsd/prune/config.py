from dataclasses import dataclass, field

import torch


_DTYPES = ("auto", "float32", "bfloat16", "float16")
_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "intermediate_size", "num_experts")
_BLOCKS = (32, 64, 128, 256)


@dataclass
class PruneConfig:
    r"""
    Configuration class for pruning, `python -m trl_opsd.prune`.

    Parameters:
        > Parameters that control how small the student becomes

        target_ratio (`float`, *optional*):
            Share of the parameters to remove, embeddings counted, tied ones once. The sizes that remove it, to within
            0.01, are found by [`ModelShape.search`]. Either this or explicit sizes are needed.
        num_layers (`int`, *optional*):
            Number of layers to keep.
        hidden_size (`int`, *optional*):
            Number of channels of the residual stream to keep.
        num_attention_heads (`int`, *optional*):
            Number of query heads to keep, in whole groups: all query heads that share a key-value head, with it.
        intermediate_size (`int`, *optional*):
            Number of MLP neurons to keep in each layer, of each expert where there are experts.
        num_experts (`int`, *optional*):
            Number of experts to keep in each layer.
        size_multiple (`int`, *optional*, defaults to `32`):
            What the sizes that `target_ratio` finds are multiples of, channels and neurons, where those of the model are:
            32, 64, 128 or 256. Quantisers leave other weights as they are; the K-quants of GGUF want 256.

        > Parameters that control what counts as important

        layer_importance (`str`, *optional*, defaults to `"block_influence"`):
            How the layers to remove are chosen. `"block_influence"` removes those that turn the residual stream least,
            `1 - cos(input, output)`, from https://huggingface.co/papers/2403.03853, and costs one pass over the
            rollouts. `"loss"` removes one after the other, each time the one without which the rollouts become least
            unlikely; it costs about `layers × removed` passes.
        calibration_dataset (`str`, *optional*):
            Rollouts of the model: the rollout bank of [`RLVRTrainer`], or a data set with `prompt` and `completion`.
            Or just prompts, which the model then completes itself.
        calibration_samples (`int`, *optional*, defaults to `128`):
            Number of rollouts to measure importance on.
        max_completion_length (`int`, *optional*, defaults to `512`):
            Maximum number of tokens of a completion that is generated.
        batch_size (`int`, *optional*, defaults to `8`):
            Number of rollouts in a forward pass, and in generation.
        seed (`int`, *optional*, defaults to `42`):
            Seed of the choice of rollouts and of their generation.

        > Parameters that control the checkpoints

        model_name_or_path (`str`, *optional*):
            Folder of the checkpoint to prune, or a model id on the Hub.
        output_dir (`str`, *optional*):
            Folder for the smaller checkpoint.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the weights: `"auto"` (the checkpoint's own), `"float32"`, `"bfloat16"` or `"float16"`.
        device (`str`, *optional*):
            Device to run on. Defaults to the accelerator of the machine if there is one, and to the CPU if not.
    """

    # Parameters that control how small the student becomes
    target_ratio: float | None = field(
        default=None,
        metadata={"help": "Share of the parameters to remove, embeddings counted, tied ones once."},
    )
    num_layers: int | None = field(default=None, metadata={"help": "Number of layers to keep."})
    hidden_size: int | None = field(
        default=None, metadata={"help": "Number of channels of the residual stream to keep."}
    )
    num_attention_heads: int | None = field(
        default=None,
        metadata={"help": "Number of query heads to keep, in whole groups with the key-value head they share."},
    )
    intermediate_size: int | None = field(
        default=None, metadata={"help": "Number of MLP neurons to keep in each layer, or in each expert."}
    )
    num_experts: int | None = field(default=None, metadata={"help": "Number of experts to keep in each layer."})
    size_multiple: int = field(
        default=32,
        metadata={
            "help": "What the channels and neurons that `target_ratio` finds are multiples of, where the model's are: the "
            "K-quants of GGUF want 256.",
            "choices": list(_BLOCKS),
        },
    )

    # Parameters that control what counts as important
    layer_importance: str = field(
        default="block_influence",
        metadata={
            "help": "How the layers to remove are chosen: 'block_influence' (how far each turns the residual stream; "
            "one pass) or 'loss' (without it, one layer after the other; about layers × removed passes).",
            "choices": ["block_influence", "loss"],
        },
    )
    calibration_dataset: str | None = field(
        default=None,
        metadata={"help": "Rollouts of the model (a rollout bank, or `prompt` and `completion`), or prompts."},
    )
    calibration_samples: int = field(default=128, metadata={"help": "Number of rollouts to measure importance on."})
    max_completion_length: int = field(
        default=512, metadata={"help": "Maximum number of tokens of a completion that is generated."}
    )
    batch_size: int = field(default=8, metadata={"help": "Number of rollouts in a forward pass, and in generation."})
    seed: int = field(default=42, metadata={"help": "Seed of the choice of rollouts and of their generation."})

    # Parameters that control the checkpoints
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of the checkpoint to prune, or a model id on the Hub."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the smaller checkpoint."})
    dtype: str = field(
        default="auto",
        metadata={"help": "Precision of the weights; 'auto' is the checkpoint's own.", "choices": list(_DTYPES)},
    )
    device: str | None = field(
        default=None, metadata={"help": "Device to run on. Defaults to the accelerator if there is one, or the CPU."}
    )

    def __post_init__(self):
        if self.output_dir is None:
            raise ValueError("`output_dir` is missing: give the folder for the smaller checkpoint.")
        if self.calibration_dataset is None:
            raise ValueError(
                "`calibration_dataset` is missing: give a rollout bank, or prompts that the model is to complete."
            )
        sizes = self.sizes()
        if self.target_ratio is None and not sizes:
            raise ValueError(f"Nothing to prune: set `target_ratio`, or any of {', '.join(_SIZES)}.")
        if self.target_ratio is not None and sizes:
            raise ValueError(f"`target_ratio` chooses the sizes, so it cannot go with {', '.join(sizes)}: drop one.")
        if self.target_ratio is not None and not 0 < self.target_ratio < 1:
            raise ValueError(
                f"`target_ratio` is the share of the parameters to remove, above 0 and below 1, and is "
                f"{self.target_ratio}."
            )
        for name, value in (
            *sizes.items(),
            ("calibration_samples", self.calibration_samples),
            ("max_completion_length", self.max_completion_length),
            ("batch_size", self.batch_size),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, and is {value}.")
        for name, value, choices in (
            ("layer_importance", self.layer_importance, ("block_influence", "loss")),
            ("dtype", self.dtype, _DTYPES),
            ("size_multiple", self.size_multiple, _BLOCKS),
        ):
            if value not in choices:
                raise ValueError(f"`{name}` must be one of {', '.join(map(str, choices))}, and is {value!r}.")
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError) as error:  # torch raises the latter where it is built without CUDA
                reason = str(error).splitlines()[0].rstrip(".")
                raise ValueError(f"`device`: this machine has no `{self.device}` ({reason}).") from None

    def sizes(self) -> dict[str, int]:
        """Returns the explicit sizes that are set."""
        return {name: self.__dict__[name] for name in _SIZES if self.__dict__[name] is not None}
