"""
Command line of stage 3: `accelerate launch -m trl_opsd.opsd --config recipes/opsd.yaml`.

Every field of [`OPSDScriptArguments`], [`OPSDConfig`] and [`~trl.ModelConfig`] is a key of the YAML file and an option
of the command line, which overrides the file.
"""

import sys
from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..cli import UserError, check_checkpoint, parse, save_final, user_errors
from ..data import check_columns, load_prompts
from ..results import write_results
from ..rewards import load_reward_funcs, required_columns
from .config import OPSDConfig
from .gate import resolve_gate
from .probe import probe
from .teacher import resolve_teacher_weights
from .trainer import OPSDTrainer


@dataclass
class OPSDScriptArguments(ScriptArguments):
    """
    Arguments of the OPSD command line.

    Args:
        reward_funcs (`list[str]`, *optional*):
            Verifiers, by name: one of [`trl_opsd.rewards`], one of [`trl.rewards`], or a dotted import path. They
            decide the gate.
        probe_prompts (`int`, *optional*, defaults to `32`):
            Number of prompts that student and teacher-in-context are measured on before training. `0` is no probe.
        probe_only (`bool`, *optional*, defaults to `False`):
            Whether to end after the probe.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Verifiers, by name: one of trl_opsd.rewards, one of trl.rewards, or a dotted import path. They "
            "decide the gate."
        },
    )
    probe_prompts: int = field(
        default=32,
        metadata={
            "help": "Number of prompts that student and teacher-in-context are measured on before training. 0 is no "
            "probe."
        },
    )
    probe_only: bool = field(default=False, metadata={"help": "End after the probe."})


def show_probe(result: dict) -> None:
    """Prints what the probe found, a line for each of the two and one for the teacher."""
    for name, label in (("student", "student"), ("prompt_only", "in the teacher's context")):
        if result[name] is not None:
            correct = "" if result[name]["correct"] is None else f"{result[name]['correct']:.1%} correct, "
            print(f"probe, {label}: {correct}{result[name]['tokens']:.1f} tokens")
    teacher = result["teacher"]
    kl, agreement, *parts = (
        "unknown" if value is None else f"{value:.3f}"
        for value in (teacher["kl"], teacher["top1_agreement"], *teacher["kl_by_part"])
    )
    print(
        f"probe, teacher on the student's rollouts: {kl} nats per token (by quarter of the trace: {', '.join(parts)}), "
        f"same most likely token at a share of {agreement}"
    )


def main(args: list[str] | None = None) -> None:
    with user_errors():
        script_args, training_args, model_args = parse(
            (OPSDScriptArguments, OPSDConfig, ModelConfig), args, prog="trl_opsd.opsd"
        )
        trust_remote_code = training_args.trust_remote_code
        check_checkpoint(model_args.model_name_or_path, "model_name_or_path", trust_remote_code)
        teacher = training_args.teacher_model_name_or_path
        if teacher is not None:
            check_checkpoint(teacher, "teacher_model_name_or_path", trust_remote_code)
        if script_args.dataset_name is None:
            raise UserError(
                "`dataset_name` is missing: give a dataset, a file or a named source with `--dataset_name`."
            )
        if script_args.probe_only and script_args.probe_prompts < 1:
            raise UserError("`probe_only` needs prompts to probe: set `probe_prompts` above 0.")
        reward_funcs = load_reward_funcs(script_args.reward_funcs or [])
        resolve_gate(training_args, reward_funcs)
        resolve_teacher_weights(training_args, model_args.model_name_or_path, teacher)

        splits = [script_args.dataset_train_split]
        if training_args.eval_strategy != "no":
            splits.append(script_args.dataset_test_split)
        datasets = [load_prompts(script_args.dataset_name, split) for split in splits]
        context = training_args.build_teacher_context()
        for dataset in datasets:
            for func in reward_funcs:
                check_columns(dataset, required_columns(func), f"The verifier `{func.__name__}`")
            if context is not None:
                context.check_columns(dataset.column_names)

        model_init_kwargs = {
            "revision": model_args.model_revision,
            "trust_remote_code": trust_remote_code,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
        }
        training_args.model_init_kwargs = {**model_init_kwargs, **(training_args.model_init_kwargs or {})}
        if teacher is not None:
            teacher_init_kwargs = {**model_init_kwargs, "revision": training_args.teacher_model_revision}
            training_args.teacher_model_init_kwargs = {
                **teacher_init_kwargs,
                **(training_args.teacher_model_init_kwargs or {}),
            }

    trainer = OPSDTrainer(
        model=model_args.model_name_or_path,
        teacher_model=teacher,
        args=training_args,
        train_dataset=datasets[0],
        eval_dataset=datasets[1] if len(datasets) > 1 else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        reward_funcs=reward_funcs or None,
    )
    if script_args.probe_prompts > 0 and training_args.resume_from_checkpoint is None:
        found = probe(trainer, script_args.probe_prompts)
        if trainer.accelerator.is_main_process:
            show_probe(found)
            write_results(f"{training_args.output_dir}/probe.json", [found], training_args.to_dict())
    if script_args.probe_only:
        return
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if trainer.alarms.stopped_by is not None:
        # What the student has become is not what anybody asked for: it is not saved under the final name
        trainer.accelerator.print(f"error: {trainer.alarms.stopped_by}", file=sys.stderr)
        raise SystemExit(3)
    save_final(trainer)
    if trainer.accelerator.is_main_process:
        write_results(f"{training_args.output_dir}/opsd.json", trainer.state.log_history, training_args.to_dict())
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.end()


if __name__ == "__main__":
    main()
