import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..opsd.teacher import TEACHER_PROMPT_TEMPLATES, TeacherContext


_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class EvaluateConfig:
    r"""
    Configuration class for [`~trl_opsd.evaluate.evaluate`].

    Parameters:
        > Parameters that control what is measured

        model_name_or_path (`str`, *optional*):
            Folder of the checkpoint, or a model id on the Hub.
        dataset_name (`str`, *optional*):
            Problems: a file, a folder, a named source or a data set on the Hub (see
            [`~trl_opsd.data.load_prompts`]).
        dataset_split (`str`, *optional*, defaults to `"test"`):
            Split of the data set.
        max_samples (`int`, *optional*):
            Number of problems, from the first on. All of them if not set.
        reward_funcs (`list[str]`, *optional*, defaults to `["math_reward"]`):
            Verifiers by name, as in [`~trl_opsd.rewards.load_reward_funcs`]. A completion is correct if it ended and
            each of them scores it at least 1.0. Problems that one of them cannot judge (`None`) are not counted.
        prompt_template (`str`, *optional*):
            Context to put each prompt in: one of `"solution"`, `"answer"` and `"concise"` (the teacher contexts of
            [`OPSDConfig`]), or a text with `{prompt}` and any of `{solution}`, `{answer}`; a literal brace is written
            twice. `"concise"` is the prompt-only baseline of compaction.
        chat_template_kwargs (`dict[str, Any]` or `str`, *optional*):
            Keyword arguments for the chat template, for instance `{"enable_thinking": true}`.

        > Parameters that control generation

        decoding (`list[str]`, *optional*, defaults to `["greedy"]`):
            Ways of decoding, each giving one row of results: `"greedy"` and `"sampled"`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature of `"sampled"`.
        top_p (`float`, *optional*, defaults to `1.0`):
            Share of the probability mass that `"sampled"` draws from; `1.0` is all of it.
        top_k (`int`, *optional*, defaults to `0`):
            Number of tokens that `"sampled"` draws from; `0` is the whole vocabulary.
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Maximum number of tokens of a completion. One that has not ended by then is truncated, and never correct.
        batch_size (`int`, *optional*, defaults to `64`):
            Number of completions generated at a time.
        seed (`int`, *optional*, defaults to `42`):
            Seed of `"sampled"`. The same completions need the same batch size too.

        > Parameters that control the model

        dtype (`str`, *optional*, defaults to `"auto"`):
            Precision of the weights: `"auto"` (the checkpoint's own), `"float32"`, `"bfloat16"` or `"float16"`.
        device (`str`, *optional*):
            Device to run on. Defaults to the accelerator of the machine if there is one, and to the CPU if not.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether the checkpoint may bring code of its own.

        > Parameters that control the output

        output (`str`, *optional*):
            JSON file for the results. If not set they are only shown.
        save_completions (`bool`, *optional*, defaults to `False`):
            Whether to save every completion beside `output`, in a `.completions.jsonl` file of the same name.
        stage (`str`, *optional*):
            Label of the checkpoint in the results, for instance `"rlvr"`.
        task (`str`, *optional*):
            Label of the data set in the results. Defaults to `dataset_name`.
    """

    # Parameters that control what is measured
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Folder of the checkpoint, or a model id on the Hub."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Problems: a file, a folder, a named source or a data set on the Hub."}
    )
    dataset_split: str = field(default="test", metadata={"help": "Split of the data set."})
    max_samples: int | None = field(
        default=None, metadata={"help": "Number of problems, from the first on. All of them if not set."}
    )
    reward_funcs: list[str] = field(
        default_factory=lambda: ["math_reward"],
        metadata={
            "help": "Verifiers by name. A completion is correct if it ended and each of them scores it at least 1.0. "
            "Problems that one of them cannot judge are not counted."
        },
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Context to put each prompt in: 'solution', 'answer', 'concise', or a text with {prompt} and any "
            "of {solution}, {answer}; a literal brace is written twice."
        },
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments for the chat template, as JSON on the command line."}
    )

    # Parameters that control generation
    decoding: list[str] = field(
        default_factory=lambda: ["greedy"],
        metadata={"help": "Ways of decoding, each giving one row of results: 'greedy' and 'sampled'."},
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of 'sampled'."})
    top_p: float = field(
        default=1.0, metadata={"help": "Share of the probability mass that 'sampled' draws from; 1.0 is all of it."}
    )
    top_k: int = field(
        default=0, metadata={"help": "Number of tokens that 'sampled' draws from; 0 is the whole vocabulary."}
    )
    max_completion_length: int = field(
        default=1024,
        metadata={
            "help": "Maximum number of tokens of a completion. One that has not ended by then is never correct."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Number of completions generated at a time."})
    seed: int = field(default=42, metadata={"help": "Seed of 'sampled'."})

    # Parameters that control the model
    dtype: str = field(
        default="auto",
        metadata={"help": "Precision of the weights; 'auto' is the checkpoint's own.", "choices": list(_DTYPES)},
    )
    device: str | None = field(
        default=None, metadata={"help": "Device to run on. Defaults to the accelerator if there is one, or the CPU."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether the checkpoint may bring code of its own."}
    )

    # Parameters that control the output
    output: str | None = field(default=None, metadata={"help": "JSON file for the results."})
    save_completions: bool = field(
        default=False, metadata={"help": "Whether to save every completion beside `output`, as JSON Lines."}
    )
    stage: str | None = field(default=None, metadata={"help": "Label of the checkpoint in the results."})
    task: str | None = field(
        default=None, metadata={"help": "Label of the data set in the results. Defaults to `dataset_name`."}
    )

    def __post_init__(self):
        if isinstance(self.chat_template_kwargs, str):
            try:
                self.chat_template_kwargs = json.loads(self.chat_template_kwargs)
            except json.JSONDecodeError as error:
                raise ValueError(f"`chat_template_kwargs` is not valid JSON: {error}.") from None
        if not isinstance(self.chat_template_kwargs, dict | None):
            raise ValueError(f"`chat_template_kwargs` must be a mapping, and is {self.chat_template_kwargs!r}.")
        if not self.dataset_name:
            raise ValueError("`dataset_name` is missing: give a file, a folder, a named source or a Hub data set.")
        for name, value in (("decoding", self.decoding), ("reward_funcs", self.reward_funcs)):
            if not isinstance(value, list):  # YAML makes a word a string, and a string is a list of letters
                raise ValueError(f"`{name}` must be a list, and is {value!r}: write `{name}: [{value}]`.")
        if not self.decoding or not set(self.decoding) <= {"greedy", "sampled"}:
            raise ValueError(f"`decoding` must list 'greedy', 'sampled' or both, and is {self.decoding}.")
        if not self.reward_funcs:
            raise ValueError("`reward_funcs` is empty: name at least one verifier, for instance `math_reward`.")
        for name, value in (
            ("max_samples", 1 if self.max_samples is None else self.max_samples),
            ("max_completion_length", self.max_completion_length),
            ("batch_size", self.batch_size),
        ):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, and is {value}.")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` must be above 0, and is {self.temperature}: for none, use 'greedy'.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be above 0 and at most 1, and is {self.top_p}.")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be at least 0, which is no limit, and is {self.top_k}.")
        if self.dtype not in _DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(_DTYPES)}, and is {self.dtype!r}.")
        if self.device is not None:
            try:
                torch.empty(0, device=self.device)
            except (RuntimeError, AssertionError) as error:  # torch raises the latter where it is built without CUDA
                reason = str(error).splitlines()[0].rstrip(".")
                raise ValueError(f"`device`: this machine has no `{self.device}` ({reason}).") from None
        if self.output is not None and Path(self.output).is_dir():
            raise ValueError(f"`output` must be a JSON file, and `{self.output}` is a folder: add a file name.")
        if self.save_completions and self.output is None:
            raise ValueError("`save_completions` needs `output`, the JSON file to save them beside: set it.")
        self.context()

    def context(self) -> TeacherContext | None:
        """Returns what puts a prompt into the context of `prompt_template`, or `None` for the plain prompt."""
        if self.prompt_template is None:
            return None
        try:
            return TeacherContext(TEACHER_PROMPT_TEMPLATES.get(self.prompt_template, self.prompt_template))
        except ValueError as error:
            raise ValueError(str(error).replace("teacher_prompt_template", "prompt_template")) from None
