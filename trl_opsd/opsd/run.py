"""Run of stage 3: what its command line does once it is parsed."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..adapters import merged
from ..cli import UserError, as_list, check_checkpoint, check_output, user_errors, warn_of_precision
from ..data import check_columns, check_fit, hold_out, load_prompts, load_tokenizer, record_held_out
from ..data.fit import positions_in_training, write
from ..results import finish, write_results
from ..resuming import agreed, agreed_checkpoint, claim, train
from ..rewards import check_rows, load_reward_funcs, required_columns
from ..rlvr.bank import prompt_id, read_attempts, read_rollouts
from ..rlvr.identity import check_vocabulary, hash_weights, read_writer
from ..rollout_engine import check_engine
from .alarms import AlarmCallback
from .config import OPSDConfig, check_arguments
from .context import TeacherPrompts
from .metrics import OPSDAlarm
from .probe import check_probe, probe
from .qat import check_groups, fake_quantise
from .trainer import OPSDTrainer
from .view import RolloutPages


@dataclass
class OPSDScriptArguments(ScriptArguments):
    """
    Arguments of the OPSD command line.

    Args:
        reward_funcs (`list[str]`, *optional*):
            Verifiers, by name: one of [`trl_opsd.rewards`], one of [`trl.rewards`], or a dotted import path. They
            decide the gate. Where nothing is written (`lmbda: 0`) and all is trained on (`gate: all`) they judge
            nothing, and are left out.
        held_out (`list[str]`, *optional*):
            Evaluation sets whose problems are left out of the training set (see [`~trl_opsd.data.hold_out`]). `none`
            keeps all rows. Defaults to the named benchmarks that have been evaluated on, on this machine.
        rollout_bank (`str`, *optional*):
            Folder of the rollout bank of an RLVR run over the same prompts (`bank` in its `output_dir`). What it says
            of their pass rates stands beside what this run measures: prompts outside `min_pass_rate` and
            `max_pass_rate` are left out from the start. For `off_policy_steps`, and `lmbda` below 1, it adds to the data
            the column `completion_ids`, the shortest correct rollout of each prompt that has one.
        solution (`str`, *optional*):
            `"bank"` takes the reference solution of a prompt from `rollout_bank`, for data that has none: its shortest
            correct rollout, without the thinking trace. Prompts that have no correct rollout are left out. By default
            the solution is the column of that name.
        teacher_bank (`list[str]`, *optional*):
            Folders of rollout banks that the teacher has filled in its contexts (`python -m trl_opsd.compress.bank
            --prompt_template concise`), one for each context at most. `teacher_gate` decides by their pass rates. A bank of
            another model than the teacher's first weights, or asked in none of its contexts, is refused.
        probe_difficulty (`str`, *optional*):
            Column by whose values the probe groups the prompts, to see where the teacher fails. A column of many numbers is
            cut in thirds. Defaults to thirds by the length of the student's rollouts.
        qat (`str`, *optional*):
            Precision that the student's weights will be served in, `"int8"` or `"int4"`: it is trained, and writes its
            rollouts, with weights rounded to it (see [`~trl_opsd.opsd.qat.fake_quantise`]). Needs `torchao`.
        qat_group_size (`int`, *optional*, defaults to `32`):
            Input channels that share a scale under `int4`.
        probe_prompts (`int`, *optional*, defaults to `32`):
            Number of prompts that student and teacher-in-context are measured on before training. `0` is no probe.
        probe_only (`bool`, *optional*, defaults to `False`):
            Whether to end after the probe.
        alarm_correct_drop (`float` or `None`, *optional*, defaults to `0.2`):
            The run stops when the share of correct rollouts is this much below that of the start, see
            [`~trl_opsd.opsd.alarms.AlarmCallback`]. `1.0` is never.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Verifiers, by name: one of trl_opsd.rewards, one of trl.rewards, or a dotted import path. They "
            "decide the gate."
        },
    )
    held_out: list[str] | None = field(
        default=None,
        metadata={
            "help": "Evaluation sets whose problems are left out of the training set; 'none' keeps all rows. Defaults "
            "to the named benchmarks that have been evaluated on, on this machine."
        },
    )
    rollout_bank: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the rollout bank of an RLVR run over the same prompts (`bank` in its `output_dir`), for "
            "`solution`, `min_pass_rate`, `max_pass_rate`, and the completions of `off_policy_steps` and `lmbda`."
        },
    )
    solution: str | None = field(
        default=None,
        metadata={
            "help": "'bank' takes the reference solution of a prompt from `rollout_bank`: its shortest correct rollout, "
            "without the thinking trace. By default the solution is the column of that name.",
            "choices": ["bank"],
        },
    )
    teacher_bank: list[str] | None = field(
        default=None,
        metadata={
            "help": "Folders of rollout banks that the teacher has filled in its contexts (trl_opsd.compress.bank with "
            "`prompt_template`), by whose pass rates `teacher_gate` decides."
        },
    )
    probe_difficulty: str | None = field(
        default=None,
        metadata={
            "help": "Column by whose values the probe groups the prompts. Defaults to thirds by the length of the student's "
            "rollouts."
        },
    )
    qat: str | None = field(
        default=None,
        metadata={
            "help": "Precision that the student's weights will be served in: it is trained with weights rounded to it.",
            "choices": ["int8", "int4"],
        },
    )
    qat_group_size: int = field(default=32, metadata={"help": "Input channels that share a scale under int4."})
    probe_prompts: int = field(
        default=32,
        metadata={
            "help": "Number of prompts that student and teacher-in-context are measured on before training. 0 is no "
            "probe."
        },
    )
    probe_only: bool = field(default=False, metadata={"help": "End after the probe."})
    alarm_correct_drop: float | None = field(
        default=0.2,
        metadata={
            "help": "The run stops when the share of correct rollouts is this much below that of the start. 1.0 is never."
        },
    )


def show_probe(result: dict) -> None:
    """Prints what the probe found: a line for each of the two, one for each group of prompts and one for the teacher."""
    for name, label in (("student", "student"), ("prompt_only", "in the teacher's context")):
        if result[name] is not None:
            correct = "" if result[name]["correct"] is None else f"{result[name]['correct']:.1%} correct, "
            print(f"probe, {label}: {correct}{result[name]['tokens']:.1f} tokens")
    for group in result["by_difficulty"]:
        parts = [f"student {group['student']['correct']:.1%} in {group['student']['tokens']:.1f} tokens"]
        for place, found in enumerate(group["contexts"], start=1):
            parts.append(f"in context {place} {found['correct']:.1%} in {found['tokens']:.1f}")
        print(f"probe, {group['group']} ({group['num_prompts']} prompts): {', '.join(parts)}")
    teacher = result["teacher"]
    kl, agreement, *parts = (
        "unknown" if value is None else f"{value:.3f}"
        for value in (teacher["kl"], teacher["top1_agreement"], *teacher["kl_by_part"])
    )
    print(
        f"probe, teacher on the student's rollouts: {kl} nats per token (by quarter of the trace: {', '.join(parts)}), "
        f"same most likely token at a share of {agreement}"
    )


def check_bank(script_args: OPSDScriptArguments, training_args: OPSDConfig) -> None:
    """Checks that `solution` and `rollout_bank` go with each other and with the rest."""
    if script_args.solution not in (None, "bank"):
        raise UserError(f"`solution` must be 'bank', or left out for the column, and is {script_args.solution!r}.")
    if script_args.solution == "bank":
        if script_args.rollout_bank is None:
            raise UserError("`solution: bank` needs a bank: give its folder with `--rollout_bank`.")
        contexts = (*training_args.build_teacher_contexts(), training_args.build_sibling_fallback())
        if not any(context is not None and "solution" in context.fields for context in contexts):
            raise UserError(
                "`solution: bank` is for a teacher that sees a solution: set `teacher_context: solution`, or a "
                "`teacher_prompt_template` with {solution}."
            )
    elif script_args.rollout_bank and all(
        value is None for value in (training_args.min_pass_rate, training_args.max_pass_rate, training_args.given)
    ):
        raise UserError(
            "`rollout_bank` is used for nothing: set `solution: bank`, `off_policy_steps`, `lmbda`, `min_pass_rate` or "
            "`max_pass_rate`, or drop it."
        )


def apply_bank(dataset: Dataset, script_args: OPSDScriptArguments, args: OPSDConfig) -> tuple[Dataset, str]:
    """The rows of the training set that the bank leaves, with what they take from it, and a line that counts them."""
    folder = script_args.rollout_bank
    rollouts, attempts = read_rollouts(folder), read_attempts(folder)
    ids = [prompt_id(prompt) for prompt in dataset["prompt"]]
    if attempts.keys().isdisjoint(ids):
        raise UserError(
            f"The rollout bank at `{folder}` has none of the prompts of `{script_args.dataset_name}`: it is of other "
            "data, or of the same with another wording."
        )
    shortest = {}
    # Of each prompt the shortest comes first
    for row in rollouts.select_columns(["prompt_id", "completion", "completion_ids"]):
        shortest.setdefault(row["prompt_id"], row)

    def is_skipped(prompt: str) -> bool:
        tried, correct = attempts.get(prompt, (0, 0))
        if tried < args.pass_rate_rollouts:
            return False
        too_hard = args.min_pass_rate is not None and correct / tried < args.min_pass_rate
        return too_hard or (args.max_pass_rate is not None and correct / tried > args.max_pass_rate)

    takes_solution = script_args.solution == "bank"
    takes_completion = args.given is not None and "completion_ids" not in dataset.column_names
    unsolved = [takes_solution and prompt not in shortest for prompt in ids]
    skipped = [is_skipped(prompt) for prompt in ids]
    kept = [row for row, reasons in enumerate(zip(unsolved, skipped, strict=True)) if not any(reasons)]
    counts = (
        f"rollout bank: {len(kept)} of {len(ids)} prompts are left; {sum(unsolved)} have no correct rollout, "
        f"{sum(skipped)} are outside `min_pass_rate` and `max_pass_rate`, and a prompt may be both"
    )
    if not kept:
        raise UserError(f"{counts}: choose another bank, or other pass rates.")
    dataset = dataset.select(kept)
    if takes_solution:
        if "privileged_context" in dataset.column_names:
            raise UserError(
                f"`solution: bank` has no effect on `{script_args.dataset_name}`, whose column `privileged_context` "
                "stands in for every solution: drop the column, or `solution: bank`."
            )
        texts = [shortest[ids[row]]["completion"] for row in kept]
        texts = [text if isinstance(text, str) else text[-1]["content"] for text in texts]
        # As the verifiers read it: the answer, and what leads to it there. Tags in a prompt confuse chat templates.
        texts = [text.rpartition("</think>")[2].strip() for text in texts]
        if "solution" in dataset.column_names:
            dataset = dataset.remove_columns("solution")
        dataset = dataset.add_column("solution", texts)
    if takes_completion:
        found = [shortest.get(ids[row]) for row in kept]
        dataset = dataset.add_column(
            "completion_ids", [None if row is None else row["completion_ids"] for row in found]
        )
        counts += f"; of {sum(row is not None for row in found)} it gives the completion"
    return dataset, counts


def find_teacher_banks(
    folders: list[str], args: OPSDConfig, teacher: str, revision: str | None
) -> dict[int, dict[str, tuple[int, int]]]:
    """
    Reads the banks that the teacher has filled in its contexts.

    Args:
        folders (`list[str]`):
            Their folders.
        args ([`OPSDConfig`]):
            Configuration.
        teacher (`str`):
            Folder or id of the model that the teacher's weights are at the start.
        revision (`str`, *optional*):
            Branch, tag or commit of it on the Hub.

    Returns:
        `dict[int, dict[str, tuple[int, int]]]`: By the place of a context in the order of preference, how often each prompt
        was tried and solved in it.

    Raises:
        UserError: If there is no gate that decides by them, or one was filled by another model or in another context.
    """
    if args.teacher_gate is None:
        raise UserError(
            "`teacher_bank` says where the teacher is right in its context, and nothing asks: set `teacher_gate`, for "
            "instance to 0.5, or drop it."
        )
    templates = [context.template for context in args.build_teacher_contexts()]
    weights, found = hash_weights(teacher, revision), {}
    for folder in folders:
        writer = read_writer(folder)
        if writer is None:
            raise UserError(
                f"There is no rollout bank at `{folder}`: fill one with `python -m trl_opsd.compress.bank "
                "--prompt_template ...`."
            )
        if writer.weights != weights:
            raise UserError(
                f"The rollout bank at `{folder}` is of {writer}, and the teacher is `{teacher}` (weights {weights[:8]}): "
                "fill one with it, because another model is right elsewhere."
            )
        if writer.context not in templates:
            raise UserError(
                f"The rollout bank at `{folder}` is of {writer}, and the teacher's contexts are {templates}: fill one with "
                "`--prompt_template` set to one of them."
            )
        place = templates.index(writer.context)
        if place in found:
            raise UserError(f"Two of `teacher_bank` are of the context `{writer.context}`: give one for each context.")
        found[place] = read_attempts(folder)
    return found


def knows_any(banks: dict[int, dict[str, tuple[int, int]]], dataset: Dataset) -> bool:
    """Whether the teacher's banks have any prompt of a data set."""
    return any(prompt_id(prompt) in bank for prompt in dataset["prompt"] for bank in banks.values())


def add_pass_rates(
    dataset: Dataset, banks: dict[int, dict[str, tuple[int, int]]], args: OPSDConfig, name: str
) -> tuple[Dataset, str]:
    """A data set with the column `teacher_pass_rates` out of the teacher's banks, and a line that counts it."""
    if "teacher_pass_rates" in dataset.column_names:
        raise UserError(
            f"`{name}` has a column `teacher_pass_rates`, which `teacher_bank` would replace: drop one of the two."
        )
    places = range(len(args.build_teacher_contexts()))
    rates, first = [], []
    for prompt in dataset["prompt"]:
        key = prompt_id(prompt)
        counts = [banks.get(place, {}).get(key, (0, 0)) for place in places]
        rates.append([correct / tried if tried else None for tried, correct in counts])
        first.append(next((place for place, rate in enumerate(rates[-1]) if (rate or 0) >= args.teacher_gate), None))
    known = sum(any(rate is not None for rate in row) for row in rates)
    shares = ", ".join(f"{first.count(place)} have context {place + 1}" for place in places)
    return dataset.add_column("teacher_pass_rates", rates), (
        f"teacher's gate: of {len(rates)} prompts the banks know {known}; {shares}, {first.count(None)} the plain prompt"
    )


def check_given(name: str, dataset: Dataset, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that the token ids of completions that are given mean the same text to the student."""
    folder = Path(name).parent if Path(name).name == "rollouts" else Path(name)
    if (folder / "rollouts").is_dir():
        check_vocabulary(folder, model, tokenizer)
    elif "completion" in dataset.column_names:  # nothing says whose ids they are but the text beside them
        index = next(index for index, ids in enumerate(dataset["completion_ids"]) if ids is not None)
        row = dataset[index]
        text = row["completion"] if isinstance(row["completion"], str) else row["completion"][-1]["content"]
        found = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        if found.strip() != text.strip():
            raise UserError(
                f"The `completion_ids` of row {index} of `{name}` mean {found[:40]!r} to the tokenizer of `{model}`, and its "
                f"`completion` is {text[:40]!r}: they are of another tokenizer, so give a bank that was written with this one."
            )


def check_templates(dataset: Dataset, args: OPSDConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that the teacher's contexts can be written with the tokenizer, and that no prompt breaks out of them."""
    kwargs = (
        args.chat_template_kwargs if args.teacher_chat_template_kwargs is None else args.teacher_chat_template_kwargs
    )
    contexts, fallback = args.build_teacher_contexts(), args.build_sibling_fallback()
    if not contexts:
        return
    prompts = TeacherPrompts(
        contexts, fallback, lambda batch: [write(tokenizer, row, kwargs) for row in batch], tokenizer
    )
    prompts.check_turns(dataset)
    for context in (*contexts, *([] if fallback is None else [fallback])):
        try:
            prompts.render([prompts.prompt(dataset[0], context, sibling="")])
        except Exception as error:  # a template raises what it likes, and tokenizers an Exception and no more
            raise UserError(
                f"The tokenizer of `{tokenizer.name_or_path}` cannot write the teacher's prompt "
                f"({' '.join(str(error).split()):.200}), whose template is {context.template[:80]!r}: give a "
                "`teacher_prompt_template` in words that it has."
            ) from None


def check_settings(
    script_args: OPSDScriptArguments, training_args: OPSDConfig, model_args: ModelConfig, is_probed: bool
) -> tuple[list[Callable], PreTrainedConfig]:
    """
    Checks what the arguments say together, before any data is read. Returns the verifiers, and the configuration of the
    student.
    """
    trust_remote_code = training_args.trust_remote_code
    config = check_checkpoint(
        model_args.model_name_or_path, "model_name_or_path", trust_remote_code, model_args.model_revision
    )
    teacher = training_args.teacher_model_name_or_path
    if teacher is not None:
        check_checkpoint(teacher, "teacher_model_name_or_path", trust_remote_code)
    if not script_args.probe_only:
        check_output(
            training_args.output_dir,
            model_name_or_path=model_args.model_name_or_path,
            teacher_model_name_or_path=teacher,
        )
    check_engine(training_args)
    if script_args.probe_only and script_args.probe_prompts < 1:
        raise UserError("`probe_only` needs prompts to probe: set `probe_prompts` above 0.")
    if is_probed:
        check_probe(training_args)
    is_judged = training_args.lmbda > 0 or training_args.gate != "all" or training_args.teacher_gate is not None
    reward_funcs = load_reward_funcs(as_list(script_args.reward_funcs) if is_judged else [])
    check_arguments(training_args, model_args.model_name_or_path, teacher, reward_funcs=reward_funcs)
    if script_args.qat is not None and (model_args.use_peft or training_args.use_vllm):
        raise UserError(
            "`qat` rounds the weights of the whole student as it computes, which is not what adapters train, and vLLM is "
            "given them before they are rounded: drop LoRA, or vLLM, or `qat`."
        )
    if script_args.qat is not None and importlib.util.find_spec("torchao") is None:
        raise UserError("`qat` needs torchao: run `pip install torchao`.")
    if script_args.qat == "int4":
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        check_groups(skeleton, script_args.qat_group_size)
    check_bank(script_args, training_args)
    return reward_funcs, config


def load_datasets(
    script_args: OPSDScriptArguments,
    training_args: OPSDConfig,
    model_args: ModelConfig,
    reward_funcs: list[Callable],
    config: PreTrainedConfig,
    resume_from: str | None,
) -> tuple[list[Dataset], list[str]]:
    """
    Loads the training set, and that of the evaluation if there is one, with what banks add to them, and checks them.
    Returns them, and the evaluation sets whose problems are left out.
    """
    name, model = script_args.dataset_name, model_args.model_name_or_path
    teacher = training_args.teacher_model_name_or_path

    def say(text: str) -> None:
        if training_args.process_index == 0:
            print(text)

    banks = {}
    if script_args.teacher_bank is not None:
        first = (model, model_args.model_revision)
        if teacher is not None:
            first = (teacher, training_args.teacher_model_revision)
        banks = find_teacher_banks(as_list(script_args.teacher_bank), training_args, *first)
    splits = [script_args.dataset_train_split]
    if training_args.eval_strategy != "no":
        splits.append(script_args.dataset_test_split)
    if (Path(name) / "rollouts").is_dir():
        datasets = [read_rollouts(name)]
    else:
        datasets = [load_prompts(name, split) for split in splits]
    datasets[0], held_out, counts = hold_out(datasets[0], as_list(script_args.held_out), resume_from)
    say(counts)
    given_by = name
    if script_args.rollout_bank is not None:
        if "completion_ids" not in datasets[0].column_names:
            given_by = script_args.rollout_bank
        datasets[0], counts = apply_bank(datasets[0], script_args, training_args)
        say(counts)
    if script_args.teacher_bank is not None:
        for place, split in enumerate(datasets):
            is_known = knows_any(banks, split)
            if place == 0 and not is_known:
                raise UserError(
                    f"The teacher's rollout banks have none of the prompts of `{name}`: they are of other data, or of the "
                    "same with another wording."
                )
            if is_known:  # else the evaluation is measured in the run, or refused below
                datasets[place], counts = add_pass_rates(split, banks, training_args, name)
                say(counts if place == 0 else f"evaluation, {counts}")
    check_arguments(training_args, model, teacher, datasets[0], datasets[-1], reward_funcs)
    if script_args.probe_difficulty is not None:
        check_columns(datasets[0], [script_args.probe_difficulty], "`probe_difficulty`")
    tokenizer = load_tokenizer(model, model_args.model_revision, training_args.trust_remote_code)
    if training_args.given is not None:
        check_given(given_by, datasets[0], model, tokenizer)
    for dataset in datasets:
        for func in reward_funcs:
            check_columns(dataset, required_columns(func), f"The verifier `{func.__name__}`")
        check_rows(dataset, reward_funcs, name)
        fits = partial(
            check_fit,
            dataset,
            name,
            tokenizer,
            positions_in_training(config, training_args),
            training_args.max_completion_length,
            training_args.chat_template_kwargs,
        )
        agreed(training_args, fits)  # of many rows it takes its time
    check_templates(datasets[0], training_args, tokenizer)
    return datasets, held_out


def set_init_kwargs(training_args: OPSDConfig, model_args: ModelConfig) -> None:
    """Has student and teacher loaded as `model_args` say, but for what is set already."""
    init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    training_args.model_init_kwargs = {**init_kwargs, **(training_args.model_init_kwargs or {})}
    if training_args.teacher_model_name_or_path is not None:
        init_kwargs["revision"] = training_args.teacher_model_revision
        training_args.teacher_model_init_kwargs = {**init_kwargs, **(training_args.teacher_model_init_kwargs or {})}


def probe_first(trainer: OPSDTrainer, alarms: AlarmCallback, script_args: OPSDScriptArguments) -> None:
    """Probes, writes and prints what was found, tells the alarms, and ends the run where there is nothing to train on."""
    folder = trainer.args.output_dir
    found = probe(trainer, script_args.probe_prompts, f"{folder}/probe.html", script_args.probe_difficulty)
    if trainer.accelerator.is_main_process:
        show_probe(found)
        write_results(f"{folder}/probe.json", [found], trainer.args.to_dict())
    correct = found["student"]["correct"]
    if correct is not None:
        alarms.probed = found["num_prompts"], round(correct * found["num_prompts"])
    if correct == 0 and trainer.rollouts.gate == "correct" and not script_args.probe_only:
        trainer.accelerator.print(
            f"error: None of the {found['num_prompts']} rollouts of the probe is correct, so nothing would be trained "
            "on: look at them in probe.html (is the chat template applied, is the answer where the verifier looks?), "
            "and if the model solves some prompts all the same, ask it more with `--probe_prompts`, or none with 0.",
            file=sys.stderr,
        )
        raise SystemExit(3)


def run(script_args: OPSDScriptArguments, training_args: OPSDConfig, model_args: ModelConfig) -> None:
    """Checks what the arguments say together, then trains and saves."""
    with user_errors():
        resume_from = agreed_checkpoint(training_args)
        is_probed = script_args.probe_prompts > 0 and resume_from is None
        reward_funcs, config = check_settings(script_args, training_args, model_args, is_probed)
        datasets, held_out = load_datasets(script_args, training_args, model_args, reward_funcs, config, resume_from)
        set_init_kwargs(training_args, model_args)
        claim(training_args)
        if training_args.process_index == 0:
            record_held_out(training_args.output_dir, held_out)
            if resume_from is None:  # those of a run before it speak of another model
                for name in ("probe.json", "probe.html"):
                    Path(training_args.output_dir, name).unlink(missing_ok=True)

    # An adapter of an earlier stage is merged: what is trained here starts from what was trained there
    student = merged(model_args.model_name_or_path, f"{training_args.output_dir}/start/student")
    teacher = training_args.teacher_model_name_or_path
    if teacher is not None:
        teacher = merged(teacher, f"{training_args.output_dir}/start/teacher")
    with user_errors():  # what is only found inside ends in a sentence too
        trainer = OPSDTrainer(
            model=student,
            teacher_model=teacher,
            args=training_args,
            train_dataset=datasets[0],
            eval_dataset=datasets[1] if len(datasets) > 1 else None,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
            reward_funcs=reward_funcs or None,
        )
        if script_args.qat is not None:
            fake_quantise(trainer.model, script_args.qat, script_args.qat_group_size)
    alarms = AlarmCallback(trainer, correct_drop=script_args.alarm_correct_drop)
    trainer.add_callback(alarms)
    if training_args.log_completions:
        trainer.add_callback(RolloutPages(trainer))
    warn_of_precision(trainer)
    if is_probed:
        probe_first(trainer, alarms, script_args)
    if script_args.probe_only:
        return
    try:
        train(trainer, resume_from)
    except OPSDAlarm as alarm:  # raised before a step that would ruin the student
        trainer.accelerator.print(f"error: {alarm}", file=sys.stderr)
        raise SystemExit(3) from None
    if alarms.stopped_by is not None:
        # What the student has become is not what anybody asked for: it is not saved under the final name
        trainer.accelerator.print(f"error: {alarms.stopped_by}", file=sys.stderr)
        raise SystemExit(3)
    finish(trainer, "opsd", script_args, model_args)
