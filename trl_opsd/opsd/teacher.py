"""
Whose weights score the rollouts.

[`Teacher`] is all there is to know of them: where they come from, where they lie, how they score, how they follow the
student, and how they get into a checkpoint and out of it.
"""

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DistributedType, fsdp2_canonicalize_names, fsdp2_prepare_model
from peft import LoraConfig
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file
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
from trl.models import prepare_deepspeed
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import create_model_from_path, get_config_model_id, use_adapter

from .config import OPSDConfig
from .head import Head


if TYPE_CHECKING:
    from peft import PeftModel


logger = get_logger(__name__)

# Name of a teacher that is a second adapter, and the file of a teacher that follows the student in a checkpoint
ADAPTER = "opsd_teacher"
FILE = "teacher.safetensors"


class Teacher:
    """
    The weights that score the rollouts of a student.

    | `weights` | without an adapter | with one |
    |---|---|---|
    | `"external"` | the model that is given | the same |
    | `"initial"` | a frozen copy of the student | the student with its adapter disabled |
    | `"ema"`, `"snapshot"` | a frozen copy that follows the student | a second adapter that follows the first |
    | `"live"` | the student | the student |

    Args:
        args ([`OPSDConfig`]):
            Configuration.
        student (`str` or [`~transformers.PreTrainedModel`]):
            Student, before anything is done to it.
        external (`str` or [`~transformers.PreTrainedModel`], *optional*):
            Model of an external teacher.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the student, if it was given.
        has_adapter (`bool`):
            Whether an adapter is what is trained.

    Attributes:
        weights (`str`):
            One of the values of `teacher_weights`.
        model ([`~transformers.PreTrainedModel`] or `None`):
            Model of its own, as the accelerator has prepared it. `None` if it scores with the student's.
        valid_vocab (`int` or `None`):
            Columns of the heads that tokens reach, where the heads of student and teacher differ in their padding.

    Raises:
        ValueError: If the tokenizers of student and teacher differ. Before a model is loaded.
    """

    def __init__(
        self,
        args: OPSDConfig,
        student: str | PreTrainedModel,
        external: str | PreTrainedModel | None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
        has_adapter: bool,
    ):
        self.weights = args.resolve_teacher_weights(external)
        self.follows_student = self.weights in ("ema", "snapshot")
        self.has_adapter = has_adapter
        self.model: PreTrainedModel | None = None
        self.valid_vocab: int | None = None
        self._is_padded = False
        self._sums: dict[str, torch.Tensor] = {}  # weights of a teacher in half precision, in float32
        self._student: PreTrainedModel | PeftModel | None = None
        self._accelerator: Accelerator | None = None
        self._redirect = _ForwardRedirection()
        if self.weights == "live" or (
            self.weights == "snapshot" and args.resolve_teacher_sync_steps(self.weights) <= 10
        ):
            logger.warning(
                "A teacher that keeps up with the student has been seen to collapse: "
                "https://huggingface.co/papers/2603.05433 found 50 steps between copies to be good and 10 too few."
            )
        if self.weights == "external":
            self._is_padded = not check_vocabularies(student, external, processing_class, args)
            # FSDP keeps what may be trained in float32
            self.model = load_external(external, args).requires_grad_(False)
        elif self.weights != "live" and not has_adapter:
            self.model = copy_of_student(student, args)

    def prepare(self, student: "PreTrainedModel | PeftModel", tokenizer, accelerator: Accelerator) -> None:
        """
        Places the teacher where the student will be, before the accelerator prepares the student.

        Args:
            student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                Student, with its adapter.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Tokenizer of the student.
            accelerator ([`~accelerate.Accelerator`]):
                Accelerator of the training.

        Raises:
            ValueError: If the base model is to be the teacher and the adapter already changes it, or if a teacher is to
                follow the student under FSDP1.
        """
        self._student, self._accelerator = student, accelerator
        if self._is_padded:
            self.valid_vocab = len(tokenizer)
        is_fsdp1 = accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2
        if self.follows_student and is_fsdp1:
            raise ValueError(
                f"`teacher_weights={self.weights!r}` is not supported under FSDP1, which hides the parameters of a model "
                "in flat ones: set `fsdp_version: 2`."
            )
        if self.model is not None:
            if accelerator.distributed_type == DistributedType.DEEPSPEED:
                self.model = prepare_deepspeed(self.model, accelerator)
            else:
                self.model = accelerator.prepare_model(self.model, evaluation_mode=True)
            if accelerator.is_fsdp2:
                shard_teacher(self.model, accelerator)
        elif self.follows_student:
            self._add_adapter()
        elif self.weights == "initial":
            check_identity(student)

    def _add_adapter(self) -> None:
        """Adds a second adapter to the student, equal to its own and frozen."""
        own = self._student.active_adapter
        config = copy.copy(self._student.peft_config[own])
        if isinstance(config, LoraConfig):
            # PiSSA, OLoRA and the like take their start out of the base weights, and would do so a second time
            config.init_lora_weights = True
        with torch.random.fork_rng():  # so that the student's rollouts do not depend on it
            self._student.add_adapter(ADAPTER, config)
        self._student.set_adapter(own)
        for teacher, student in self.pairs().values():
            teacher.requires_grad_(False)
            teacher.data = student.detach().clone()  # before FSDP or DeepSpeed shard the model

    @property
    def has_stepped(self) -> bool:
        """Whether the student's optimizer has taken the step that ends now."""
        return self._accelerator.sync_gradients and not self._accelerator.optimizer_step_was_skipped

    @property
    def has_second_adapter(self) -> bool:
        """Whether the teacher is an adapter of the student's that is not the one it trains."""
        return self.model is None and self.follows_student

    @property
    def config(self):
        """Configuration of the model that scores."""
        return (self._student if self.model is None else self._accelerator.unwrap_model(self.model)).config

    @torch.no_grad()
    def forward(
        self, student: "PreTrainedModel | PeftModel", hidden_states: Callable, *inputs: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, Head]:
        """
        Scores rollouts.

        Args:
            student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                Student without wrappers, whose forward pass this is called in: its sharded parameters are whole.
            hidden_states (`Callable`):
                Hidden states of the model that is its first argument.
            *inputs, **kwargs:
                The other arguments of it.

        Returns:
            `tuple[torch.Tensor, Head]`: Hidden states, of shape `(B, L, H_teacher)`, and the head that belongs to them.
        """
        if self.model is not None:
            self.model.eval()
            model = self._accelerator.unwrap_model(self.model)
            hidden = self._redirect(self.model, model, hidden_states, model, *inputs, **kwargs)
            return hidden, Head.of(model)
        # The student's own module. Already inside its wrapper, so nothing to redirect.
        with self.in_student(student):
            return hidden_states(student, *inputs, **kwargs), Head.of(student)

    @contextmanager
    def in_student(self, student: "PreTrainedModel | PeftModel") -> Iterator[None]:
        """
        Inside, the student's module has the weights of a teacher without a model of its own, and is in evaluation.

        Args:
            student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                Student without wrappers.
        """
        weights = nullcontext()
        if self.weights != "live":
            weights = use_adapter(student, ADAPTER if self.follows_student else None)
        was_training = student.training
        student.eval()
        try:
            with weights:
                yield
        finally:
            student.train(was_training)

    def pairs(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """
        Parameters of a teacher that follows the student, and the student's.

        Returns:
            `dict[str, tuple[torch.Tensor, torch.Tensor]]`: Teacher's and student's, by name, each as it is trained:
            sharded, where the student is.
        """
        student = sharded_parameters(self._student)
        if self.model is not None:
            teacher = sharded_parameters(self._accelerator.unwrap_model(self.model))
            return {name: (teacher[name], parameter) for name, parameter in student.items()}
        own = f".{self._student.active_adapter}."
        return {
            name: (student[name.replace(own, f".{ADAPTER}.")], parameter)
            for name, parameter in student.items()
            if own in name
        }

    def follow(self, args: OPSDConfig) -> "TeacherSyncCallback":
        """
        Returns:
            [`TeacherSyncCallback`]: Callback that lets a teacher which follows the student do so.
        """
        rate = 1.0 if self.weights == "snapshot" else args.teacher_update_rate
        return TeacherSyncCallback(self, rate, args.resolve_teacher_sync_steps(self.weights))

    @torch.no_grad()
    def move(self, rate: float) -> None:
        """
        Moves the teacher towards the student: `teacher += rate × (student − teacher)`. Called on every process, which moves
        its own shards: those of teacher and student are cut alike.

        In half precision a small step is rounded away: then the sum is kept in float32, beside the weights.

        Args:
            rate (`float`):
                Share of the way. 1 is a copy.
        """
        moved = []
        for name, (parameter, of_student) in self.pairs().items():
            teacher, student = shard(parameter), shard(of_student)
            if rate == 1.0:
                teacher.copy_(student)
            elif teacher.dtype == torch.float32:
                teacher.lerp_(student.float(), rate)
            else:
                if name not in self._sums:
                    self._sums[name] = teacher.detach().float()
                teacher.copy_(self._sums[name].lerp_(student.float(), rate))
            moved.append(parameter)
        refresh(moved)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """
        Inside, the student's modules hold no weights of the teacher's, so that nobody takes them for the student's: what
        sends a model to an engine knows the layers of an adapter, and not the modules that are trained as a whole.
        """
        taken = []
        if self.has_second_adapter:
            wrappers = (m for m in self._student.modules() if isinstance(m, ModulesToSaveWrapper))
            taken = [
                (w.modules_to_save, w.modules_to_save.pop(ADAPTER)) for w in wrappers if ADAPTER in w.modules_to_save
            ]
        try:
            yield
        finally:
            for modules, module in taken:
                modules[ADAPTER] = module

    def save(self, folder: str, is_main: bool) -> None:
        """
        Writes a teacher that follows the student into a checkpoint. Called on every process.

        Args:
            folder (`str`):
                Folder of the checkpoint. A missing one is made.
            is_main (`bool`):
                Whether this process writes.
        """
        parameters = {}
        for name, (teacher, _) in self.pairs().items():
            # Every process takes part in making a parameter whole, and the main one keeps it
            parameter = whole(teacher, self._sums.get(name), keep=is_main)
            if is_main:
                parameters[name] = parameter
        if is_main:
            os.makedirs(folder, exist_ok=True)
            path = os.path.join(folder, FILE)
            save_file(parameters, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)

    def load(self, folder: str) -> None:
        """
        Reads what [`save`] wrote. Called on every process.

        Args:
            folder (`str`):
                Folder of the checkpoint.

        Raises:
            ValueError: If it has no teacher.
        """
        path = os.path.join(folder, FILE)
        if not os.path.isfile(path):
            raise ValueError(
                f"`{folder}` has no {FILE}, so the teacher cannot go on from where it was: resume from a checkpoint that "
                f"was written with `teacher_weights={self.weights!r}`."
            )
        saved, pairs = load_file(path), self.pairs()
        for name, (teacher, _) in pairs.items():
            value = cut(saved[name], like=teacher)
            with torch.no_grad():
                shard(teacher).copy_(value)
            if value.dtype == torch.float32 != teacher.dtype:
                self._sums[name] = value
        refresh([teacher for teacher, _ in pairs.values()])

    def remove_saved_adapter(self, folder: str) -> None:
        """
        PEFT saves every adapter, and reads a folder with several as one without the student's.

        Args:
            folder (`str`):
                Folder that the student was saved to.
        """
        if self.has_second_adapter:
            shutil.rmtree(os.path.join(folder, ADAPTER), ignore_errors=True)


class TeacherSyncCallback(TrainerCallback):
    """
    Lets a teacher follow the student, every some optimizer steps, if the student has moved in them: where nothing passes
    the gate there is no step.

    Args:
        teacher ([`Teacher`]):
            Teacher.
        rate (`float`):
            Share of the way that it goes.
        every (`int`):
            Number of optimizer steps between two moves.
    """

    def __init__(self, teacher: Teacher, rate: float, every: int):
        self.teacher, self.rate, self.every = teacher, rate, every
        self.student_moved = False

    def on_train_begin(self, args, state, control, **kwargs):
        # Of a run that goes on from between two moves, it is not known
        self.student_moved = state.global_step % self.every != 0

    def on_step_end(self, args, state, control, **kwargs):
        self.student_moved |= self.teacher.has_stepped
        if state.global_step % self.every == 0 and self.student_moved:
            self.teacher.move(self.rate)
            self.student_moved = False


def check_identity(student: "PeftModel") -> None:
    """
    Checks that an adapter changes nothing yet, so that the base model has the student's initial weights.

    Args:
        student ([`~peft.PeftModel`]):
            Student.

    Raises:
        ValueError: If it does.
    """
    own = student.active_adapter
    changed = [
        name
        for name, parameter in student.named_parameters()
        if ("lora_B" in name or "lora_embedding_B" in name) and parameter.detach().any()
    ]
    for name, module in student.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and own in module.modules_to_save:
            original = module.original_module.state_dict()
            trained = module.modules_to_save[own].state_dict()
            changed += [f"{name}.{key}" for key in trained if not torch.equal(trained[key], original[key])]
    if changed:
        raise ValueError(
            f"`teacher_weights='initial'` takes the base model with the adapter disabled, but the adapter already changes "
            f"it (`{changed[0]}`): merge the adapter first (`merge_and_unload`), or initialise it so that it starts as the "
            "identity."
        )
    if not isinstance(student.peft_config[own], LoraConfig):
        logger.warning(
            f"`teacher_weights='initial'` takes the base model with the adapter disabled, and of an adapter of the type "
            f"{student.peft_config[own].peft_type} it cannot be told whether it has been trained already: start from a "
            "new one."
        )


def load_external(model: str | PreTrainedModel, args: OPSDConfig) -> PreTrainedModel:
    """
    An external teacher, loaded as [`~trl.DistillationTrainer`] loads one.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            Path or id. A model is returned as it is.
        args ([`OPSDConfig`]):
            Configuration.

    Returns:
        [`~transformers.PreTrainedModel`]: Model.

    Raises:
        ValueError: If there are arguments for loading a model that is loaded already.
    """
    if isinstance(model, str):
        # Where nothing is said of it, the type is that of the checkpoint
        own = {"dtype": None, "revision": args.teacher_model_revision, **(args.teacher_model_init_kwargs or {})}
        return load(model, own, args)
    if args.teacher_model_init_kwargs is not None:
        raise ValueError(
            "`teacher_model_init_kwargs` are for loading a teacher, and `teacher_model` is a model already: drop them, or "
            "give the teacher as a path."
        )
    return model


def load(model: str, init_kwargs: dict[str, Any] | None, args: OPSDConfig) -> PreTrainedModel:
    """
    Loads a model with what the base class adds to the keyword arguments of the student.

    Args:
        model (`str`):
            Path or id.
        init_kwargs (`dict[str, Any]`, *optional*):
            Keyword arguments for `from_pretrained`.
        args ([`OPSDConfig`]):
            Configuration.

    Returns:
        [`~transformers.PreTrainedModel`]: Model.
    """
    init_kwargs = dict(init_kwargs or {})
    if args.distributed_state.distributed_type in ["MULTI_GPU", "DEEPSPEED"]:
        init_kwargs["device_map"] = None
    init_kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return create_model_from_path(model, **init_kwargs)


def copy_of_student(model: str | PreTrainedModel, args: OPSDConfig) -> PreTrainedModel:
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
        ValueError: If a copy would be empty, under ZeRO-3.
    """
    if isinstance(model, str):
        teacher = load(model, args.model_init_kwargs, args)
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
    args: OPSDConfig,
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
            f"Student and teacher have different tokenizers ({len(vocabularies[0])} and {len(vocabularies[1])} tokens; "
            f"`vocab_size` {sizes[0]} and {sizes[1]}), "
            "and the divergence compares them token by token: take a teacher of the same family, or use TRL's "
            "GOLDTrainer, which distils across tokenizers."
        )
    return sizes[0] == sizes[1]


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


def shard(parameter: torch.Tensor) -> torch.Tensor:
    """
    What lies of a parameter on this process: the shard of one that FSDP2 or ZeRO-3 shard, else all of it.

    Args:
        parameter (`torch.Tensor`):
            Parameter.

    Returns:
        `torch.Tensor`: The tensor itself. Under ZeRO-3 it is flat, and [`refresh`] must follow what is written to it.
    """
    return parameter.ds_tensor if is_deepspeed_zero3_enabled() else parameter


def refresh(parameters: list[torch.Tensor]) -> None:
    """
    Lets parameters follow what was written to their shards. Called on every process.

    Args:
        parameters (`list[torch.Tensor]`):
            Parameters.
    """
    if not is_deepspeed_zero3_enabled():
        return
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # Small ones ZeRO-3 keeps whole beside their shards, and renews after a step of the optimizer's in this way
    kept_whole = [parameter for parameter in parameters if parameter.ds_status == ZeroParamStatus.AVAILABLE]
    if kept_whole:
        kept_whole[0].partition(kept_whole)
        kept_whole[0].all_gather(kept_whole)


def cut(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """
    The shard of a value, cut as that of a parameter is.

    Args:
        value (`torch.Tensor`):
            Value of the whole parameter.
        like (`torch.Tensor`):
            Parameter.

    Returns:
        `torch.Tensor`: Shard, in the precision of the value, on the device of the parameter's.
    """
    if isinstance(like, DTensor):
        return distribute_tensor(value, like.device_mesh, like.placements)
    if not is_deepspeed_zero3_enabled():
        return value.to(like.device, copy=True)
    size, rank = like.ds_tensor.numel(), torch.distributed.get_rank(like.ds_process_group)
    flat = value.new_zeros(size)  # the last shards may end in padding
    part = value.flatten()[rank * size : (rank + 1) * size]
    flat[: len(part)] = part
    return flat.to(like.ds_tensor.device)


def gathered(parameter: torch.Tensor) -> AbstractContextManager:
    """
    Makes a parameter that ZeRO-3 partitions whole, to be read. Entered on every process.

    Args:
        parameter (`torch.Tensor`):
            Parameter.

    Returns:
        Context manager, without effect elsewhere.
    """
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameter)


def whole(parameter: torch.Tensor, shards: torch.Tensor | None = None, keep: bool = True) -> torch.Tensor | None:
    """
    A copy, on the CPU, of a parameter that FSDP2 or ZeRO-3 may shard. Called on every process.

    Args:
        parameter (`torch.Tensor`):
            Parameter.
        shards (`torch.Tensor`, *optional*):
            Other values of it, cut as [`shard`] does. Defaults to its own.
        keep (`bool`, *optional*, defaults to `True`):
            Whether this process wants it. It takes part either way.

    Returns:
        `torch.Tensor` or `None`: Copy.
    """
    if shards is not None and is_deepspeed_zero3_enabled():
        group = parameter.ds_process_group
        value = shards.new_empty(shards.numel() * torch.distributed.get_world_size(group))
        torch.distributed.all_gather_into_tensor(value, shards, group=group)
        value = value[: parameter.ds_numel].view(parameter.ds_shape)
        return value.to("cpu", copy=True) if keep else None
    with gathered(parameter):
        value = (parameter if shards is None else shards).detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        return value.to("cpu", copy=True) if keep else None
