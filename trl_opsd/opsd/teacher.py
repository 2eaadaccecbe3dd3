"""
The teacher is weights × context.

Its context is a prompt template: what the teacher sees and the student does not. The placeholders say what it needs
from a row: `{prompt}` is the student's own prompt, `{solution}` and `{answer}` are columns of the dataset,
`{privileged_context}` is a column that, wherever a row has it, also stands in for `{solution}` and `{answer}`, and
`{sibling}` is the shortest correct rollout of the same prompt.

Its weights may follow the student's: [`TeacherSyncCallback`] is how.
"""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from string import Formatter
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_canonicalize_names, fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.trainer.utils import create_model_from_path, get_config_model_id


if TYPE_CHECKING:
    from .config import OPSDConfig


# Wording ours. The meaning follows https://huggingface.co/papers/2601.18734 (solution) and
# https://huggingface.co/papers/2603.05433 (concise, uniform and by difficulty).
TEACHER_PROMPT_TEMPLATES = {
    "solution": (
        "{prompt}\n\nA reference solution to this problem, for your eyes only:\n\n{solution}\n\n"
        "With its line of thought in mind, derive the answer again in your own words, step by step, as if you had "
        "found it yourself. Do not mention the reference."
    ),
    "answer": (
        "{prompt}\n\nThe final answer is known to be: {answer}\n\n"
        "Derive it step by step, as if you did not know it, and do not mention that it was given."
    ),
    "concise": (
        "{prompt}\n\nReason as concisely as you can: keep every step that the result depends on, and leave out "
        "restatements, second thoughts and repeated checks."
    ),
    "concise_by_difficulty": (
        "{prompt}\n\nFirst judge how hard this problem is. If it is easy, answer with the few steps that it takes. If it "
        "is hard, think as long as it needs, but leave out restatements, second thoughts and repeated checks."
    ),
    "sibling": (
        "{prompt}\n\nA short and correct way to solve this problem, for your eyes only:\n\n{sibling}\n\n"
        "Solve it as briefly, in your own words. Do not mention the other solution."
    ),
}

PRIVILEGED_FIELDS = ("solution", "answer", "sibling", "privileged_context")


class TeacherContext:
    """
    Puts prompts into the teacher's context.

    Args:
        template (`str`):
            Prompt template with the placeholder `{prompt}` and any of `{solution}`, `{answer}`, `{sibling}` and
            `{privileged_context}`. A literal brace is written twice.
        system_prompt (`str`, *optional*):
            System prompt of the teacher, in place of that of the prompt, or of the chat template.

    Attributes:
        fields (`set[str]`):
            Privileged placeholders of the template.

    Raises:
        ValueError: If the template lacks `{prompt}`, has an unknown placeholder or unbalanced braces.

    Example:

    ```python
    >>> from trl_opsd.opsd.teacher import TeacherContext

    >>> context = TeacherContext("{prompt} The answer is {answer}.")
    >>> context.prompt({"prompt": [{"role": "user", "content": "2+2?"}], "answer": "4"})
    [{'role': 'user', 'content': '2+2? The answer is 4.'}]
    ```
    """

    def __init__(self, template: str, system_prompt: str | None = None):
        try:
            fields = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
        except ValueError as error:
            raise ValueError(
                f"`teacher_prompt_template` has unbalanced braces ({error}): write a literal brace twice, as in "
                "`\\boxed{{}}`."
            ) from None
        unknown = fields - {"prompt", *PRIVILEGED_FIELDS}
        if unknown:
            raise ValueError(
                f"`teacher_prompt_template` has the unknown placeholder `{{{sorted(unknown)[0]}}}`: use {{prompt}}, "
                f"{', '.join('{' + name + '}' for name in PRIVILEGED_FIELDS)}, and write a literal brace twice."
            )
        if "prompt" not in fields:
            raise ValueError(
                "`teacher_prompt_template` has no `{prompt}`, so the teacher would not see the problem: add it."
            )
        self.template = template
        self.system_prompt = system_prompt
        self.fields = fields - {"prompt"}

    def check_columns(self, columns: list[str]) -> None:
        """
        Checks that a dataset has what the template takes.

        Args:
            columns (`list[str]`):
                Columns of the dataset.

        Raises:
            ValueError: If a column is missing. The message names it and the columns found.
        """
        if "privileged_context" in columns:
            return
        for field in sorted(self.fields - {"sibling"}):
            if field not in columns:
                raise ValueError(
                    f"The teacher context needs the column `{field}`, and the dataset has {sorted(columns)}: add it, "
                    "or add `privileged_context`, which stands in for it, or choose another `teacher_context`."
                )

    def privileged_texts(self, example: dict[str, Any], sibling: str | None = None) -> dict[str, str]:
        """
        What the template takes from a row.

        Args:
            example (`dict[str, Any]`):
                Row of the dataset.
            sibling (`str`, *optional*):
                Shortest correct rollout of the same prompt.

        Returns:
            `dict[str, str]`: Text for each of `fields`.

        Raises:
            ValueError: If one is missing in this row.
        """
        override = example.get("privileged_context")
        texts = {}
        for field in self.fields:
            text = example.get(field)
            if field == "sibling":
                text = sibling
            elif override is not None:
                text = override
            if text is None:
                raise ValueError(
                    f"The teacher context needs `{field}`, and it is empty in the row with the prompt "
                    f"{str(example['prompt'])[:80]!r}: filter such rows out, or fill `privileged_context`."
                )
            texts[field] = text
        return texts

    def prompt(self, example: dict[str, Any], texts: dict[str, str] | None = None) -> list[dict[str, Any]] | str:
        """
        The prompt of a row in the teacher's context.

        Args:
            example (`dict[str, Any]`):
                Row with `prompt`, either a string or a list of messages that ends in a user turn.
            texts (`dict[str, str]`, *optional*):
                Privileged texts, by default those of the row.

        Returns:
            `list[dict[str, Any]]` or `str`: Prompt of the same format as the row's own. Earlier turns are kept.

        Raises:
            ValueError: If a privileged text is missing in this row, or if the last message is not a user turn of
                plain text, or if there is a system prompt and the prompt is not conversational.
        """
        texts = self.privileged_texts(example) if texts is None else texts
        prompt = example["prompt"]
        if isinstance(prompt, str):
            if self.system_prompt is not None:
                raise ValueError(
                    "`teacher_system_prompt` needs conversational prompts, and the dataset has plain strings: put the "
                    "text into `teacher_prompt_template`."
                )
            return self.template.format(prompt=prompt, **texts)
        *earlier, last = prompt
        if last["role"] != "user" or not isinstance(last["content"], str):
            raise ValueError(
                f"A teacher context needs prompts that end in a user turn of plain text, and found a last message "
                f"with the role {last['role']!r} and content of type {type(last['content']).__name__}."
            )
        if self.system_prompt is not None:
            earlier = [message for message in earlier if message["role"] != "system"]
            earlier = [{"role": "system", "content": self.system_prompt}, *earlier]
        return [*earlier, {**last, "content": self.template.format(prompt=last["content"], **texts)}]


class TeacherSyncCallback(TrainerCallback):
    """
    Moves a teacher's weights towards the student's: `teacher += rate × (student − teacher)`, every some optimizer
    steps. A rate of 1 is a hard copy.

    Args:
        pairs (`Callable`):
            Returns the teacher's and the student's parameters, by name: `dict[str, tuple[torch.Tensor, torch.Tensor]]`.
        rate (`float`):
            Share of the way.
        every (`int`):
            Number of optimizer steps between two moves.
    """

    def __init__(self, pairs: Callable[[], dict[str, tuple[torch.Tensor, torch.Tensor]]], rate: float, every: int):
        self.pairs, self.rate, self.every = pairs, rate, every

    @torch.no_grad()
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            for teacher, student in self.pairs().values():
                with gathered(student), gathered(teacher, is_changed=True):
                    teacher.lerp_(student.to(teacher.dtype), self.rate)


def shard_teacher(teacher: PreTrainedModel, accelerator: Accelerator) -> None:
    """
    Shards a teacher as FSDP2 shards the student, in place. `Accelerator.prepare_model` leaves a model without an optimizer
    whole, on the CPU, and, where only the main process has read the weights, empty on the others.

    Args:
        teacher ([`~transformers.PreTrainedModel`]):
            Teacher.
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator under FSDP2.
    """
    plugin = accelerator.state.fsdp_plugin
    policy, names = plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap
    # The layers of a teacher may be of another class. The student, prepared later, gets its own
    plugin.transformer_cls_names_to_wrap = None
    fsdp2_prepare_model(accelerator, teacher)
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = policy, names


def sharded_parameters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """
    Parameters of a model by the names they have without wrappers, each one as it is trained: sharded, where FSDP2 shards.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Model.

    Returns:
        `dict[str, torch.Tensor]`: Parameters.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # A forward without backward leaves the head whole, and later ones would not see what is written to its shards
            module.reshard()
    return fsdp2_canonicalize_names(dict(model.named_parameters()))


def gathered(parameter: torch.Tensor, is_changed: bool = False) -> AbstractContextManager:
    """
    Makes a parameter that ZeRO-3 partitions whole. Entered on every process.

    Args:
        parameter (`torch.Tensor`):
            Parameter.
        is_changed (`bool`, *optional*, defaults to `False`):
            Whether it is written to inside. All processes then get what the main one has written.

    Returns:
        Context manager, without effect elsewhere.
    """
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter, modifier_rank=0 if is_changed else None)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """
    A copy, on the CPU, of a parameter that FSDP2 or ZeRO-3 may shard. Called on every process.

    Args:
        parameter (`torch.Tensor`):
            Parameter.

    Returns:
        `torch.Tensor`: Copy.
    """
    with gathered(parameter):
        parameter = parameter.detach()
        return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).to("cpu", copy=True)


@torch.no_grad()
def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """
    Gives a parameter that FSDP2 or ZeRO-3 may shard a new value. Called on every process.

    Args:
        parameter (`torch.Tensor`):
            Parameter.
        value (`torch.Tensor`):
            Value of the whole parameter.
    """
    with gathered(parameter, is_changed=True):
        if isinstance(parameter, DTensor):
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
        parameter.copy_(value)


def resolve_teacher_weights(
    args: "OPSDConfig", model: str | PreTrainedModel, teacher_model: str | PreTrainedModel | None
) -> str:
    """
    Weights of the teacher, checked against its context.

    Args:
        args ([`OPSDConfig`]):
            Configuration.
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            External teacher.

    Returns:
        `str`: One of the values of `teacher_weights`.

    Raises:
        ValueError: If the teacher would be the student in weights and context, or if weights and teacher model
            contradict each other.
    """
    weights = args.teacher_weights or ("initial" if teacher_model is None else "external")
    if weights == "external" and teacher_model is None:
        raise ValueError(
            "`teacher_weights='external'` needs a teacher model: set `teacher_model_name_or_path` (in Python "
            "`teacher_model`), or use `teacher_weights='initial'`."
        )
    if weights != "external" and teacher_model is not None:
        raise ValueError(
            f"`teacher_weights={weights!r}` and a teacher model contradict each other: drop the teacher model, or set "
            "`teacher_weights='external'`."
        )
    same_weights = weights != "external" or teacher_model is model
    same_weights = same_weights or (isinstance(model, str) and model == teacher_model)
    own_template_kwargs = args.teacher_chat_template_kwargs not in (None, args.chat_template_kwargs or {})
    if same_weights and args.build_teacher_context() is None and not own_template_kwargs:
        raise ValueError(
            "Teacher and student are the same in weights and context, so the divergence is zero and nothing would be "
            "learned: set `teacher_context`, or `teacher_model_name_or_path` to another model."
        )
    return weights


def load_like_student(
    model: str | PreTrainedModel, init_kwargs: dict[str, Any] | None, args: "OPSDConfig"
) -> PreTrainedModel:
    """
    Loads a model with what the base class adds to the keyword arguments of the student.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Path or id. A model is returned as it is.
        init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained`.
        args ([`OPSDConfig`]):
            Configuration.

    Returns:
        [`~transformers.PreTrainedModel`]: Model.
    """
    if not isinstance(model, str):
        return model
    init_kwargs = dict(init_kwargs or {})
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        init_kwargs["device_map"] = None
    init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(model, **init_kwargs)


def copy_of_student(model: str | PreTrainedModel, args: "OPSDConfig") -> PreTrainedModel:
    """
    A frozen copy of the student, for a teacher that starts with its weights.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Student. Given as a path, it is loaded a second time.
        args ([`OPSDConfig`]):
            Configuration.

    Returns:
        [`~transformers.PreTrainedModel`]: Copy, in evaluation mode.

    Raises:
        ValueError: If there are arguments for loading an external teacher, or if a copy would be empty under ZeRO-3.
    """
    if args.teacher_model_init_kwargs is not None:
        raise ValueError(
            "`teacher_model_init_kwargs` are for an external teacher, and this one is loaded as the student is: "
            "set `model_init_kwargs` instead."
        )
    if isinstance(model, str):
        teacher = load_like_student(model, args.model_init_kwargs, args)
    elif args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        # The parameters of an instantiated model are sharded already, so a copy of it would be empty
        raise ValueError(
            "A teacher with the student's weights needs, under ZeRO-3, the model as a path, so that it can be "
            "loaded a second time: pass `model` as a string."
        )
    else:
        teacher = copy.deepcopy(model)
    return teacher.requires_grad_(False).eval()


def check_vocabularies(
    student: str | PreTrainedModel,
    teacher: str | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    args: "OPSDConfig",
) -> bool:
    """
    Checks that an external teacher speaks the student's language: the same tokenizer, though one head may be padded to
    more columns than the other.

    Args:
        student (`str` or [`~transformers.PreTrainedModel`]):
            Student.
        teacher (`str` or [`~transformers.PreTrainedModel`]):
            External teacher.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the student, if it was given.
        args ([`OPSDConfig`]):
            Configuration.

    Returns:
        `bool`: Whether the heads have the same number of columns.

    Raises:
        ValueError: If the tokenizers differ, or if the heads do and it cannot be told that the tokenizers do not.
    """
    options = {"trust_remote_code": args.trust_remote_code}
    configs = [
        AutoConfig.from_pretrained(model, **options) if isinstance(model, str) else model.config
        for model in (student, teacher)
    ]
    sizes = [config.get_text_config().vocab_size for config in configs]
    paths = [model if isinstance(model, str) else get_config_model_id(model.config) for model in (student, teacher)]
    if not all(isinstance(model, str) for model in (student, teacher)) and sizes[0] == sizes[1]:
        return True  # as in the base class: an instantiated model may have no tokenizer to look at
    student_tokenizer = processing_class or AutoTokenizer.from_pretrained(paths[0], **options)
    vocabularies = [
        tokenizer.get_vocab() for tokenizer in (student_tokenizer, AutoTokenizer.from_pretrained(paths[1], **options))
    ]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"Student and teacher have different tokenizers ({len(vocabularies[0])} and {len(vocabularies[1])} tokens), "
            "and the divergence compares them token by token: take a teacher of the same family, or use TRL's "
            "GOLDTrainer, which distils across tokenizers."
        )
    return sizes[0] == sizes[1]
