"""Run of stage 1: what its command line does once it is parsed."""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..adapters import merged
from ..cli import UserError, as_list, check_checkpoint, check_output, user_errors, warn_of_precision
from ..data import check_columns, check_fit, hold_out, load_prompts, load_tokenizer, record_held_out, warn_of_strings
from ..data.fit import positions_in_training
from ..results import finish
from ..resuming import agreed, agreed_checkpoint, claim, train
from ..rewards import check_rows, load_reward_funcs, required_columns
from ..rollout_engine import check_engine
from .config import RLVRConfig
from .identity import Writer, check_writer, hash_vocabulary, hash_weights, read_writer
from .trainer import NotFinite, RLVRTrainer


@dataclass
class RLVRScriptArguments(ScriptArguments):
    """
    Arguments of the RLVR command line.

    Args:
        reward_funcs (`list[str]`, *optional*):
            Verifiers, by name: one of [`trl_opsd.rewards`], one of [`trl.rewards`], or a dotted import path.
        held_out (`list[str]`, *optional*):
            Evaluation sets whose problems are left out of the training set (see [`~trl_opsd.data.hold_out`]). `none`
            keeps all rows. Defaults to the named benchmarks that have been evaluated on, on this machine.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Verifiers, by name: one of trl_opsd.rewards, one of trl.rewards, or a dotted import path."},
    )
    held_out: list[str] | None = field(
        default=None,
        metadata={
            "help": "Evaluation sets whose problems are left out of the training set; 'none' keeps all rows. Defaults "
            "to the named benchmarks that have been evaluated on, on this machine."
        },
    )


def run(script_args: RLVRScriptArguments, training_args: RLVRConfig, model_args: ModelConfig) -> None:
    """Checks what the arguments say together, then trains and saves."""
    with user_errors():
        resume_from = agreed_checkpoint(training_args)
        trust_remote_code = training_args.trust_remote_code
        config = check_checkpoint(
            model_args.model_name_or_path, "model_name_or_path", trust_remote_code, model_args.model_revision
        )
        check_output(training_args.output_dir, model_name_or_path=model_args.model_name_or_path)
        check_engine(training_args)
        script_args.reward_funcs = as_list(script_args.reward_funcs)
        reward_funcs = load_reward_funcs(script_args.reward_funcs)
        punishments = int(training_args.soft_punish_cache is not None)
        if training_args.reward_weights and len(training_args.reward_weights) != len(reward_funcs) + punishments:
            raise UserError(
                f"`reward_weights` has {len(training_args.reward_weights)} entries and `reward_funcs` "
                f"{len(reward_funcs)}: give one weight for each function"
                + (", and a last one for the punishment of `soft_punish_cache`." if punishments else ".")
            )

        splits = [script_args.dataset_train_split]
        if training_args.eval_strategy != "no":
            splits.append(script_args.dataset_test_split)
        datasets = [load_prompts(script_args.dataset_name, split) for split in splits]
        tokenizer = load_tokenizer(model_args.model_name_or_path, model_args.model_revision, trust_remote_code)
        warn_of_strings(datasets[0]["prompt"], tokenizer)
        for dataset in datasets:
            for name, func in zip(script_args.reward_funcs, reward_funcs, strict=True):
                check_columns(dataset, required_columns(func), f"The verifier `{name}`")
            check_rows(dataset, reward_funcs, script_args.dataset_name)
            fits = partial(
                check_fit,
                dataset,
                script_args.dataset_name,
                tokenizer,
                positions_in_training(config, training_args),
                training_args.max_completion_length or 0,
                training_args.chat_template_kwargs,
            )
            agreed(training_args, fits)  # of many rows it takes its time
        datasets[0], held_out, counts = hold_out(datasets[0], as_list(script_args.held_out), resume_from)
        if training_args.process_index == 0:
            print(counts)
        training_args.check_num_prompts(len(datasets[0]))

        model_init_kwargs = {
            "revision": model_args.model_revision,
            "trust_remote_code": trust_remote_code,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
        }
        training_args.model_init_kwargs = {**model_init_kwargs, **(training_args.model_init_kwargs or {})}
        claim(training_args)
        if training_args.process_index == 0:
            record_held_out(training_args.output_dir, held_out)

    model = merged(model_args.model_name_or_path, f"{training_args.output_dir}/start")
    bank = Path(training_args.output_dir) / "bank"
    with user_errors():  # as the trainer does, and before a model is loaded
        if training_args.bank_rollouts_per_prompt and read_writer(bank) is not None:
            weights = hash_weights(model, model_args.model_revision)
            check_writer(bank, Writer(model, weights, hash_vocabulary(tokenizer)))

        # What is only found inside ends in a sentence too
        trainer = RLVRTrainer(
            model=model,
            reward_funcs=reward_funcs,
            args=training_args,
            train_dataset=datasets[0],
            eval_dataset=datasets[1] if len(datasets) > 1 else None,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
    warn_of_precision(trainer)
    try:
        train(trainer, resume_from)
    except NotFinite as error:  # on every process: what there is now is not saved under the final name
        trainer.accelerator.print(f"error: {error}", file=sys.stderr)
        raise SystemExit(3) from None
    finish(trainer, "rlvr", script_args, model_args)
