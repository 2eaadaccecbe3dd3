"""
The warm start of the small reasoner: supervised fine-tuning for a number of steps, which can be interrupted.

It ends on a number of steps and not on an accuracy, since what is hard for it is arithmetic, which comes gradually.
"""

import importlib.util
import json
import time
from dataclasses import asdict, fields, replace
from itertools import groupby, islice
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from ..adapters import merged
from ..cli import check_checkpoint, save_final
from ..data.fit import load_tokenizer
from ..positions import positions_of
from ..results import write_results, write_text
from ..resuming import agreed_checkpoint, claim, train
from ..tiny.model import make_model
from ..tiny.sft import CountTokens, answer, encode, summary
from .task import TEMPLATES, Problem, SmallConfig, problems, row, sft_rows
from .tokenizer import make_tokenizer


#: Positions of the model: a long sibling in the prompt, and a long reply.
MAX_LENGTH = 1024
#: Longest reply of a measurement. The longest right one of the warm start has some 330 tokens.
MAX_NEW_TOKENS = 384
#: Rows that the tokenizer learns from, the same for every seed.
TOKENIZER_ROWS = 4000


class MeasureAccuracy(TrainerCallback):
    """
    Measures greedy accuracy on validation problems, by family, plain and concise, and logs it.

    Args:
        trainer ([`~trl.SFTTrainer`]):
            Trainer.
        tasks (`list[Problem]`):
            Validation problems.
        every (`int`):
            Optimizer steps between two measurements.
    """

    def __init__(self, trainer: SFTTrainer, tasks: list[Problem], every: int):
        self._print, self._tokenizer = trainer.accelerator.print, trainer.processing_class
        self._tasks, self._every = tasks, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self._every == 0:
            for result in measure_families(model, self._tokenizer, self._tasks, ("plain", "concise"), sample=False):
                # Kept with the checkpoint, so that a run that goes on has those from before
                state.log_history.append({"phase": "training", "step": state.global_step, **result})
                self._print(f"step {state.global_step}: {line_of(result)}", flush=True)


def measure_families(model, tokenizer, tasks: list[Problem], modes, sample: bool) -> list[dict]:
    """Accuracy and mean length by mode and family: rows as those of [`~trl_opsd.tiny.sft.measure`], with `task`."""
    rows = []
    for mode in modes:
        replies = zip(tasks, *answer(model, tokenizer, tasks, mode, MAX_NEW_TOKENS, sample), strict=True)
        replies = sorted(replies, key=lambda reply: reply[0].task)  # asked all at once, which takes less time
        for task, group in groupby(replies, key=lambda reply: reply[0].task):
            _, right, lengths = zip(*group, strict=True)
            rows.append({"task": task, **summary(mode, sample, right, lengths)})
    return rows


def line_of(result: dict) -> str:
    """A measurement, for people."""
    return (
        f"{result['mode']:>8} {result['decoding']:>7} {result['task']:>16}: {result['accuracy']:6.1%} in "
        f"{result['mean_tokens']:.1f} tokens"
    )


def draw(config: SmallConfig, seed: int) -> dict[str, list[Problem]]:
    """
    Draws the problems of the later stages, and those that the warm start is measured by.

    Args:
        config ([`SmallConfig`]):
            The tasks.
        seed (`int`):
            Seed of the training problems; the others are the same for every seed.

    Returns:
        `dict[str, list[Problem]]`: Those of the splits `"train"`, `"test"` and `"validation"`.

    Raises:
        ValueError: If there are not that many.
    """
    later = (config.posed, config.posed_difficulty)
    drawn = {}
    for split, option, seed_of, families in (
        ("train", "train_size", seed, later),
        ("test", "test_size", 0, later),
        ("validation", "accuracy_problems", 0, (config.families, config.difficulty)),
    ):
        size = getattr(config, option)
        try:
            drawn[split] = problems(split, size, seed_of, *families)
        except ValueError as error:
            raise ValueError(f"`{option}` is {size}. {error}") from None
    return drawn


def check(config: SmallConfig, args: SFTConfig, model_args: ModelConfig) -> str | None:
    """
    Checks what can be checked before training, and takes the output folder.

    Returns:
        `str` or `None`: Checkpoint to go on from.

    Raises:
        ValueError: If `max_steps` is missing, there is more than one process, reasoning-gym is not installed, there are fewer
            problems than are asked for, the checkpoint
            cannot be taught, an option of one is given for a new model, or the output folder cannot be had, has another
            model, or is gone on with and has other problems.
        UserError: If there is no checkpoint at `model_name_or_path`, or no tokenizer.
    """
    if args.max_steps < 1:
        raise ValueError("`max_steps` is missing: give the number of steps of the warm start.")
    if args.world_size > 1:
        raise ValueError(f"The warm start runs in one process, not {args.world_size}: launch it with `python -m`.")
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError("The small reasoner's problems need a package: run `pip install reasoning-gym`.")
    files = data_files(config, draw(config, args.seed))
    _check_model(model_args, args.trust_remote_code)
    resume_from = agreed_checkpoint(args)
    if resume_from is not None and Path(resume_from, "adapter_config.json").is_file() and not model_args.use_peft:
        raise ValueError(
            f"`resume_from_checkpoint`: `{resume_from}` has an adapter: give `--use_peft` and its options again."
        )
    # Checkpoints of other problems are neither gone on with nor left for another call to go on with
    begun = [] if resume_from is None else [Path(resume_from).parent]
    begun += [Path(args.output_dir)] if any(Path(args.output_dir).glob("checkpoint-*")) else []
    for path, text in ((folder / "data" / name, text) for folder in begun for name, text in files.items()):
        if not path.is_file() or path.read_bytes() != text.encode():
            raise ValueError(
                f"`output_dir`: `{path}` is not there, or has other problems than this run poses: give the seed and the "
                "options of the problems that its checkpoints were begun with, or choose another folder."
            )
    kept = [Path(args.output_dir, name) for name in ("config.json", "adapter_config.json")]
    if resume_from is None and any(path.exists() for path in kept):
        raise ValueError(
            f"`output_dir`: `{args.output_dir}` has a model already: remove it, or choose another folder."
        )
    claim(args)
    return resume_from


def _check_model(model_args: ModelConfig, trust_remote_code: bool) -> None:
    path = model_args.model_name_or_path
    if path is None:
        for option in fields(model_args):
            if vars(model_args)[option.name] != option.default:
                raise ValueError(
                    f"`{option.name}` is about a checkpoint that is taught, and a new model is made here: give one with "
                    f"`--model_name_or_path`, or leave `{option.name}` out."
                )
        return
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise ValueError("A quantised model is not taught here: leave `load_in_4bit` and `load_in_8bit` out.")
    config = check_checkpoint(path, "model_name_or_path", trust_remote_code, model_args.model_revision)
    positions = positions_of(config)
    if positions is not None and positions < MAX_LENGTH:
        raise ValueError(
            f"`model_name_or_path`: `{path}` has {positions} positions, and prompts and replies are given {MAX_LENGTH}."
        )
    if load_tokenizer(path, model_args.model_revision, trust_remote_code).chat_template is None:
        raise ValueError(f"`model_name_or_path`: the tokenizer of `{path}` has no chat template: add one.")


def warm_start(
    config: SmallConfig, args: SFTConfig, model_args: ModelConfig, resume_from: str | None = None
) -> list[dict]:
    """
    Trains the small reasoner, or a checkpoint in its place, and writes it, with the data of the later stages, to
    `args.output_dir`.

    The folder holds `data/train.jsonl` and `data/test.jsonl` in the data contract, the test rows of each family once
    more in `data/by_task`, at the end an ordinary checkpoint, and `sft.json` with what was measured. The seed decides
    the weights and the training rows; tokenizer and test rows are the same for every seed.

    Args:
        config ([`SmallConfig`]):
            Tasks, architecture and warm start.
        args ([`~trl.SFTConfig`]):
            Training arguments.
        model_args ([`~trl.ModelConfig`]):
            The checkpoint that is taught in place of a new model, and its adapter. It keeps its tokenizer.
        resume_from (`str`, *optional*):
            Checkpoint to go on from.

    Returns:
        `list[dict]`: The measurements in `sft.json`: greedy accuracy on the way (`phase` is `"training"`), and every
        mode, greedy and sampled, at the end (`"final"`).

    Raises:
        SystemExit: With the status 143, after a checkpoint, if SIGTERM has ended it.
    """
    start = time.perf_counter()
    output_dir = Path(args.output_dir)
    drawn = draw(config, args.seed)
    for name, text in data_files(config, drawn).items():
        write_text(output_dir / "data" / name, text)

    set_seed(args.seed)
    if model_args.model_name_or_path is None:
        tokenizer = tokenizer_of(config)
        model = make_model(config, tokenizer, args.seed, MAX_LENGTH)
    else:
        path = merged(model_args.model_name_or_path, str(output_dir / "start"))
        tokenizer = load_tokenizer(path, model_args.model_revision, args.trust_remote_code)
        tokenizer.padding_side = "left"  # of the prompts of a measurement
        model = AutoModelForCausalLM.from_pretrained(
            path,
            revision=model_args.model_revision,
            trust_remote_code=args.trust_remote_code,
            attn_implementation=model_args.attn_implementation,
            dtype=model_args.dtype,
        )
    if args.device.type == "cpu" and model_args.attn_implementation is None:
        model.set_attn_implementation("eager")  # at these lengths a step takes three quarters of the time of "sdpa"
    num_rows = args.max_steps * args.train_batch_size * args.gradient_accumulation_steps
    dataset = encode(list(islice(sft_rows(config, args.seed), num_rows)), tokenizer)
    trainer = SFTTrainer(
        model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.add_callback(CountTokens(trainer))
    trainer.add_callback(MeasureAccuracy(trainer, drawn["validation"], config.accuracy_steps))
    train(trainer, resume_from)

    results = [entry for entry in trainer.state.log_history if "phase" in entry]
    set_seed(args.seed)  # so that the sampled ones are those of a run that went on after its last step, too
    for sample in (False, True):
        for result in measure_families(model, tokenizer, drawn["validation"], TEMPLATES, sample):
            results.append({"phase": "final", "step": trainer.state.global_step, **result})
    save_final(trainer)
    results[-1]["wall_s"] = time.perf_counter() - start
    write_results(output_dir / "sft.json", results, {**asdict(config), **args.to_dict(), **asdict(model_args)})
    return results


def tokenizer_of(config: SmallConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a world, which depends on no seed."""
    # Drills have no words that the others lack
    rows = islice(sft_rows(replace(config, drill_share=0.0), 0), TOKENIZER_ROWS)
    messages = (message for row in rows for message in row["prompt"] + row["completion"])
    return make_tokenizer((f"{message['role']}\n{message['content']}" for message in messages), config.vocab_size)


def data_files(config: SmallConfig, drawn: dict[str, list[Problem]]) -> dict[str, str]:
    """The data of the later stages: the JSON Lines of each file in `data`, by its name."""
    rows = {split: [row(problem) for problem in drawn[split]] for split in ("train", "test")}
    files = {f"{split}.jsonl": rows[split] for split in rows}
    for task in config.posed:
        files[f"by_task/{task}.jsonl"] = [row for row in rows["test"] if row["task"] == task]
    return {name: "".join(json.dumps(row) + "\n" for row in kept) for name, kept in files.items()}
