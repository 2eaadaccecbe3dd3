r"""
Fills a rollout bank with verified rollouts of a finished model:

    python -m trl_opsd.compress.bank --config recipes/tiny/size_evaluate.yaml --dataset_split train \
        --model_name_or_path CHECKPOINT --dataset_name DATA --bank FOLDER --output FOLDER.json

For a teacher that no RLVR run of ours has trained, or whose bank is to hold what it writes now. A bank of another model
that lies there, or of the same asked in another way, is moved aside, because a chain that is run again with another teacher
fills its bank again.
"""

import logging
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from ..cli import UserError, make_folder, parse, silence, user_errors
from ..evaluate import EvaluateConfig
from ..evaluate.backends import Request, load_engine
from ..evaluate.estimate import Samples, summarize
from ..evaluate.plan import Job, plan
from ..evaluate.schema import to_json
from ..evaluate.score import score
from ..results import write_results
from ..rlvr.bank import RolloutBank, prompt_id
from ..rlvr.identity import Writer, hash_vocabulary, hash_weights, read_writer


@dataclass
class BankArguments:
    r"""
    Arguments beside those of [`~trl_opsd.evaluate.EvaluateConfig`], which say what is asked, how it is sampled (the
    `decoding` is always `"sampled"`) and what decides whether an answer is correct.

    Args:
        bank (`str`, *optional*):
            Folder to fill.
        rollouts_per_prompt (`int`, *optional*, defaults to `1`):
            Completions to sample for each prompt. Those that are correct, and different, are kept.
    """

    bank: str | None = field(default=None, metadata={"help": "Folder to fill."})
    rollouts_per_prompt: int = field(default=1, metadata={"help": "Completions to sample for each prompt."})


def main(args: list[str] | None = None) -> None:
    with user_errors():
        arguments, config = parse((BankArguments, EvaluateConfig), args, prog="trl_opsd.compress.bank")
        for name, value in (("bank", arguments.bank), ("output", config.output)):
            if value is None:
                raise UserError(f"`{name}` is missing: give the place for it.")
        if arguments.rollouts_per_prompt < 1:
            raise UserError(f"`rollouts_per_prompt` must be at least 1, and is {arguments.rollouts_per_prompt}.")
        if config.thinking_budget is not None:
            raise UserError("`thinking_budget` forces an end that the teacher did not write: leave it out of a bank.")
        (job,) = plan(replace(config, decoding=["sampled"]))
        path = job.checkpoint.path
        context = job.config.context()
        writer = Writer(
            path, hash_weights(path), hash_vocabulary(job.tokenizer), None if context is None else context.template
        )
        make_room(arguments.bank, writer)
        make_folder(arguments.bank, "bank")
        make_folder(Path(config.output).parent, "output")
    rows = fill(job, RolloutBank(arguments.bank, arguments.rollouts_per_prompt, writer))
    write_results(config.output, rows, config)


def make_room(folder: str, writer: Writer) -> None:
    """
    Moves the bank of another model, or of another prompt template, aside, and says where it is.

    Args:
        folder (`str`):
            Folder that is to be filled.
        writer ([`~trl_opsd.rlvr.identity.Writer`]):
            Who is to fill it.
    """
    found = read_writer(folder)
    if found is None or found.is_same(writer):
        return
    names = (Path(f"{folder.rstrip('/')}.{found.weights[:8]}{number or ''}") for number in count())
    aside = next(name for name in names if not name.exists())
    Path(folder).rename(aside)
    logging.getLogger("trl_opsd").warning(f"The bank at `{folder}` was of {found}, and is at `{aside}` now.")


def fill(job: Job, bank: RolloutBank) -> list[dict]:
    """
    Samples, verifies and banks, one pass over the problems for each rollout of a prompt.

    Args:
        job ([`~trl_opsd.evaluate.plan.Job`]):
            Model, problems and verifiers.
        bank ([`~trl_opsd.rlvr.bank.RolloutBank`]):
            Where the correct rollouts go.

    Returns:
        `list[dict]`: One row for each pass: its `step`, and what [`~trl_opsd.evaluate.estimate.summarize`] makes of it.
    """
    engine = load_engine(job.config, job.checkpoint, job.tokenizer)
    sampling = job.sampling("sampled")
    rows = []
    for step in range(bank.rollouts_per_prompt):
        first = job.config.seed + step * len(job.prompt_ids)  # no two rollouts share their random numbers
        requests = [
            Request(ids, first + index, limit)
            for index, (ids, limit) in enumerate(zip(job.prompt_ids, job.limits, strict=True))
        ]
        completions = [ids for _, ids in sorted(engine.generate(requests, sampling))]
        records = score(job, "sampled", requests, completions)
        rollouts, attempts = [], {}
        for row, ids, record in zip(job.dataset, completions, records, strict=True):
            key = prompt_id(row["prompt"])
            tried, correct = attempts.get(key, (0, 0))
            attempts[key] = (tried + 1, correct + bool(record.correct))
            if record.correct:
                text = record.completion
                is_text = isinstance(row["prompt"], str)
                rollouts.append(
                    {
                        "prompt_id": key,
                        "prompt": row["prompt"],
                        "completion": text if is_text else [{"role": "assistant", "content": text}],
                        "completion_ids": ids,
                        "reward": 1.0,
                    }
                )
        bank.add(step, rollouts, attempts)
        rows.append({"step": step, **to_json(summarize(Samples.from_records(records)))})
    engine.close()
    return rows


if __name__ == "__main__":
    silence()
    main()
