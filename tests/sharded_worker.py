"""
Trains on fixed rollouts, in however many processes and however sharded, once for each case, and writes what comes out.

Launched by test_sharded.py with an accelerate configuration.
"""

import argparse
import os
from pathlib import Path
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, fsdp2_canonicalize_names
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, TrainerCallback
from trl import DistillationTrainer

from trl_opsd import OPSDConfig, OPSDTrainer, RLVRConfig, RLVRTrainer
from trl_opsd.cli import save_final
from trl_opsd.opsd.alarms import AlarmCallback
from trl_opsd.opsd.metrics import OPSDAlarm
from trl_opsd.opsd.teacher import whole
from trl_opsd.tiny import TinyConfig, problems, row
from trl_opsd.tiny.task import CONCISE_TEMPLATE


TEXTS = ["6 a:-3=3", "5", "1 a:+2=3 b:*4=5", "2 a:+3=5", "0", "1 a:+2=3 b:*4=5 c:+1=6", "3 a:*1=3", "4 b:-2=2"]


def let_fsdp_run_on_cpus() -> None:
    """accelerate makes FSDP of several processes on GPUs, and leaves those on CPUs out: this calls them the former."""
    original = AcceleratorState.__init__

    def init(self, *args, **kwargs):
        PartialState(cpu=True)
        if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = init


def let_fsdp_average_on_cpus() -> None:
    """torch 2.8's gloo sums where it is asked for an average, 2.9's does not. Asked for a sum, FSDP2 divides it itself."""
    original = FSDPParamGroup.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.force_sum_reduction_for_comms = True

    FSDPParamGroup.__init__ = init


def let_torch_load_to_indexed_cpus() -> None:
    """transformers 5.17 resumes several processes on CPUs by loading to `cpu:0`, which torch does not know; 5.23 does not."""
    torch.serialization.register_package(
        5, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
    )


def held(parameters) -> float:
    """Share of the parameters that lies on this process."""
    here = total = 0
    for parameter in parameters:
        if isinstance(parameter, DTensor):
            shard, size = parameter.to_local().numel(), parameter.numel()
        elif "ds_tensor" in vars(parameter):
            shard, size = parameter.ds_tensor.numel(), parameter.ds_numel
        else:
            shard = size = parameter.numel()
        here, total = here + shard, total + size
    return here / total


class Recorder(TrainerCallback):
    """Keeps the whole weights after every step, from the tensors that the optimizer updates."""

    def __init__(self):
        self.trainer = None
        self.steps = []

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, unwrap = self.trainer, self.trainer.accelerator.unwrap_model
        # Names and tensors of the time before the first forward, when nothing has been gathered yet
        self.weights = fsdp2_canonicalize_names(dict(unwrap(trainer.model_wrapped).named_parameters()))
        self.teacher = {}
        if isinstance(trainer, OPSDTrainer) and trainer.teacher_model is not None:
            self.teacher = dict(unwrap(trainer.teacher_model).named_parameters())
        self.steps.append(self.snapshot(self.weights))

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(self.snapshot(self.weights))

    def snapshot(self, parameters):
        return {name: whole(parameter) for name, parameter in parameters.items()}


def result(trainer, recorder) -> dict:
    accelerator = trainer.accelerator
    own = torch.cat([value.flatten() for value in recorder.steps[-1].values()]).unsqueeze(0)
    everybodys = accelerator.gather(own.to(accelerator.device))
    return {
        "num_processes": accelerator.num_processes,
        "wrapper": type(trainer.model_wrapped).__name__,
        "zero_stage": trainer.model_wrapped.zero_optimization_stage() if trainer.is_deepspeed_enabled else 0,
        "held": held(recorder.weights.values()),
        "teacher_held": held(recorder.teacher.values()) if recorder.teacher else None,
        "rank_difference": (everybodys - everybodys[:1]).abs().max().item(),
        "logs": [log for log in trainer.state.log_history if "loss" in log or "eval_loss" in log],
        "steps": recorder.steps,
        "teacher": recorder.snapshot(recorder.teacher),
    }


def opsd(case: dict, models: Path, output: Path) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    rows = [row(problem) for problem in problems(TinyConfig(), "train", len(TEXTS), seed=0)]
    index = {example["prompt"][0]["content"]: i for i, example in enumerate(rows)}
    completions = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in TEXTS]

    def generate(self, prompt_ids, images, multimodal_fields, has_tool_images=False):
        prompts = [tokenizer.decode(ids).split("\n")[1].removesuffix("<|im_end|>") for ids in prompt_ids]
        return [list(completions[index[prompt]]) for prompt in prompts]

    def verifier(prompts, completions, trainer_state, **kwargs):
        gate = case["gates"][min(trainer_state.global_step, len(case["gates"]) - 1)]  # evaluation comes after the last
        return [float(gate[index[prompt[0]["content"]]]) for prompt in prompts]

    dtype = "bfloat16" if case.get("bf16") or case.get("half") else "float32"
    config = OPSDConfig(
        output_dir=str(output / case["name"]),
        per_device_train_batch_size=case["per_device"],
        gradient_accumulation_steps=case["accumulation"],
        teacher_weights=case["teacher"],
        teacher_update_rate=0.5,
        teacher_sync_steps={"ema": 1, "snapshot": 2}.get(case["teacher"]),
        teacher_prompt_template=CONCISE_TEMPLATE,
        max_completion_length=64,
        shuffle_dataset=False,
        max_steps=len(case["gates"]),
        # With weight decay and momentum, a step on nothing would move the weights. The epsilon is of the size of the
        # gradients, because Adam makes steps of rounding errors without one
        learning_rate=0.01,
        weight_decay=0.1,
        adam_epsilon=1e-2,
        max_grad_norm=7.0,  # clips in some of the steps
        lr_scheduler_type="linear",
        logging_steps=1,
        model_init_kwargs={"dtype": dtype},
        teacher_model_init_kwargs={"dtype": dtype} if case["teacher"] == "external" else None,
        bf16=case.get("bf16", False),
        gradient_checkpointing=case.get("gradient_checkpointing", False),
        use_liger_kernel=case.get("liger", False),
        use_cpu="DS_ACCELERATOR" not in os.environ,
        ddp_backend="gloo" if "DS_ACCELERATOR" in os.environ else None,
        report_to="none",
        save_strategy="steps" if "save_steps" in case else "no",
        save_steps=case.get("save_steps", 500),
        eval_strategy="steps" if case.get("eval") else "no",
        eval_steps=1,
        disable_tqdm=True,
    )
    # Which transformers refuses on a CPU when it is asked in the ordinary way
    config.bf16 = config.bf16 or case.get("half", False)
    recorder = Recorder()
    with mock.patch.object(DistillationTrainer, "_generate_single_turn", generate):
        trainer = OPSDTrainer(
            model=str(models / case.get("model", "student")),
            teacher_model=str(models / case.get("external", "teacher")) if case["teacher"] == "external" else None,
            args=config,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=Dataset.from_list(rows) if case.get("eval") else None,
            processing_class=tokenizer,
            reward_funcs=verifier,
            peft_config=LoraConfig(r=4, target_modules="all-linear") if case.get("lora") else None,
            callbacks=[recorder],
        )
        recorder.trainer = trainer
        trainer.add_callback(AlarmCallback(trainer, correct_drop=None))
        if trainer.is_fsdp_enabled and case.get("activation_checkpointing"):
            trainer.accelerator.state.fsdp_plugin.activation_checkpointing = True
        try:
            trainer.train(resume_from_checkpoint=str(output / case["resume"]) if "resume" in case else None)
        except OPSDAlarm as alarm:
            recorder.steps.append(recorder.snapshot(recorder.weights))
            return {**result(trainer, recorder), "alarm": str(alarm)}
    if case.get("save"):
        save_final(trainer)
    return result(trainer, recorder)


def rlvr(case: dict, models: Path, output: Path) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(models / "student")
    rows = [row(problem) for problem in problems(TinyConfig(), "train", 8, seed=0)]
    config = RLVRConfig(
        output_dir=str(output / case["name"]),
        per_device_train_batch_size=case["per_device"],
        gradient_accumulation_steps=case["accumulation"],
        num_generations=4,
        max_completion_length=6,
        max_steps=2,
        learning_rate=0.01,
        beta=0.1,
        logging_steps=1,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        gradient_checkpointing=False,
        use_cpu="DS_ACCELERATOR" not in os.environ,
        ddp_backend="gloo" if "DS_ACCELERATOR" in os.environ else None,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    recorder = Recorder()
    trainer = RLVRTrainer(
        model=str(models / case.get("model", "student")),
        reward_funcs=lambda completion_ids, **kwargs: [-float(sum(ids) % 7) for ids in completion_ids],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if case.get("lora") else None,
        callbacks=[recorder],
    )
    recorder.trainer = trainer
    trainer.train()
    if case.get("save"):
        save_final(trainer)
    return result(trainer, recorder)


parser = argparse.ArgumentParser()
parser.add_argument("--cases", type=Path)
parser.add_argument("--models", type=Path)
parser.add_argument("--output", type=Path)
arguments = parser.parse_args()
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    let_fsdp_run_on_cpus()
    if Version(torch.__version__) < Version("2.9"):
        let_fsdp_average_on_cpus()
let_torch_load_to_indexed_cpus()
results = {}
for case in torch.load(arguments.cases):
    run = rlvr if case["teacher"] is None else opsd
    results[case["name"]] = run(case, arguments.models, arguments.output)
    if PartialState().is_main_process:
        torch.save(results, arguments.output / "results.pt")
