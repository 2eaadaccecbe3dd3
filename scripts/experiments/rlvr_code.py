"""
RLVR on programs that read and print, with the sandbox as the reward: a tiny model that was taught two words wrong learns
what they mean.

    OMP_NUM_THREADS=1 python -m scripts.experiments.rlvr_code --seeds 0 1

The problems are of a toy language: "print the largest minus the first" of the numbers of one line. The model, of some
20,000 parameters, is first taught by programs of which a part has a wrong function, sign or end, and in which two words
mean another function more often than their own: where one of them is asked for, it is wrong at its likeliest. In RLVR every
rollout is a Python program, run by `code_reward` on inputs that are not in its prompt. The problems that are measured before
and after are neither in what was taught nor in RLVR.
Writes one results file for each seed, recipes/results/rlvr_code/seed-<seed>.json, then curve.png and table.md
(`--report`: only those). About three processor minutes for a seed.
"""

import argparse
import itertools
import json
import random
import re
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, set_seed
from trl import SFTConfig

from scripts.harness.plots import plt, save
from scripts.harness.results import RESULTS, ROOT, read_all, write_results, write_text
from scripts.harness.tables import markdown, spread
from trl_opsd.rewards import code_reward
from trl_opsd.rewards.code import UNJUDGED
from trl_opsd.rlvr import RLVRConfig, RLVRTrainer
from trl_opsd.tiny.model import make_model
from trl_opsd.tiny.sft import train
from trl_opsd.tiny.task import TinyConfig
from trl_opsd.tiny.tokenizer import CHAT_TEMPLATE


FUNCTIONS = {
    "sum": "sum(x)",
    "largest": "max(x)",
    "smallest": "min(x)",
    "number": "len(x)",
    "first": "x[0]",
    "last": "x[-1]",
}
SIGNS = {"plus": "+", "minus": "-", "times": "*"}
READ = "x=list(map(int,input().split()))\n"
PIECES = [READ, "print(", *FUNCTIONS.values(), *SIGNS.values(), ")", "\n"]
SLIPS = {"function": 0.15, "sign": 0.1, "end": 0.1}  # shares of the wrong pieces in what is taught
WRONG = {"largest": "smallest", "first": "last"}  # what two words mean in most of what is taught
WRONG_SHARE = 0.7
PROBLEMS = [(a, sign, b) for a, sign, b in itertools.product(FUNCTIONS, SIGNS, FUNCTIONS) if a != b]
HELD_OUT = 24
STEPS, GROUP, PROMPTS = 80, 8, 4


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of a problem and each piece of a program."""
    words = ["print the ", " of the numbers", "user", "assistant", " ", *FUNCTIONS, *SIGNS]
    tokens = dict.fromkeys(["<|pad|>", "<|im_start|>", "<|im_end|>", *words, *PIECES])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    pattern = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def program(problem: tuple[str, str, str], slips: random.Random | None = None) -> str:
    """The program of a problem; with `slips`, wrong in places now and then and in two words mostly."""
    first, sign, second = problem
    end = ")"
    if slips is not None:
        first, second = (
            WRONG[word] if word in WRONG and slips.random() < WRONG_SHARE else word for word in (first, second)
        )
        first, second = (
            slips.choice(list(FUNCTIONS)) if slips.random() < SLIPS["function"] else word for word in (first, second)
        )
        sign = slips.choice(list(SIGNS)) if slips.random() < SLIPS["sign"] else sign
        end = "" if slips.random() < SLIPS["end"] else ")"
    return f"{READ}print({FUNCTIONS[first]}{SIGNS[sign]}{FUNCTIONS[second]}{end}"


def ask(problem: tuple[str, str, str]) -> list[dict[str, str]]:
    first, sign, second = problem
    return [{"role": "user", "content": f"print the {first} {sign} {second} of the numbers"}]


def row(problem: tuple[str, str, str], numbers: random.Random) -> dict:
    """A problem with three inputs and what is to be printed, in the form of APPS."""
    inputs = [[numbers.randint(-9, 9) for _ in range(numbers.randint(3, 6))] for _ in range(3)]
    answer = program(problem).removeprefix(f"{READ}print(").removesuffix(")")
    outputs = [f"{eval(answer, {'x': x})}\n" for x in inputs]
    tests = {"inputs": [" ".join(map(str, x)) + "\n" for x in inputs], "outputs": outputs}
    return {"prompt": ask(problem), "tests": json.dumps(tests)}


@torch.no_grad()
def measure(model, tokenizer, rows: list[dict], words: str, sample: bool) -> dict:
    """The share of problems for which the program passes its tests, in the sandbox."""
    inputs = tokenizer.apply_chat_template(
        [row["prompt"] for row in rows],
        add_generation_prompt=True,
        padding=True,
        return_tensors="pt",
        return_dict=True,
    )
    model.eval()
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    ids = model.generate(**inputs, do_sample=sample, max_new_tokens=16, **sampling)[:, inputs["input_ids"].shape[1] :]
    scores = code_reward(tokenizer.batch_decode(ids, skip_special_tokens=True), tests=[row["tests"] for row in rows])
    return {
        "words": words,
        "decoding": "sampled" if sample else "greedy",
        "n": len(rows),
        "accuracy": sum(score == 1.0 for score in scores) / len(rows),
        "unjudged": sum(score is None for score in scores) / len(rows),
    }


def run(seed: int, output: Path) -> list[dict]:
    """Teaches, trains and measures one model. Returns a row for every step, and those of the held-out problems."""
    draw = random.Random(seed)
    problems = draw.sample(PROBLEMS, len(PROBLEMS))
    held_out, known = problems[:HELD_OUT], problems[HELD_OUT:]
    held_out_rows = {"taught wrong": [], "taught right": []}
    for problem in held_out:
        words = "taught wrong" if WRONG.keys() & set(problem) else "taught right"
        held_out_rows[words] += [row(problem, draw) for _ in range(2)]
    set_seed(seed)
    tokenizer = make_tokenizer()
    sizes = TinyConfig(
        hidden_size=32, num_layers=2, num_heads=2, num_key_value_heads=1, head_dim=16, intermediate_size=64
    )
    model = make_model(sizes, tokenizer, seed)
    common = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "seed": seed}
    common |= {"save_strategy": "no", "max_grad_norm": 1.0, "disable_tqdm": True}
    slipped = (
        {"prompt": ask(problem), "completion": [{"role": "assistant", "content": program(problem, draw)}]}
        for problem in (draw.choice(known) for _ in itertools.count())
    )
    args = SFTConfig(str(output / "sft"), max_steps=400, per_device_train_batch_size=32, learning_rate=3e-3, **common)
    train(model, tokenizer, slipped, args)

    def measured(step: str) -> list[dict]:
        return [
            {"step": step, **measure(model, tokenizer, rows, words, sample)}
            for words, rows in held_out_rows.items()
            for sample in (False, True)
        ]

    results = measured("start")
    args = RLVRConfig(
        str(output / "rlvr"),
        max_steps=STEPS,
        per_device_train_batch_size=GROUP * PROMPTS,
        num_generations=GROUP,
        max_completion_length=16,
        temperature=1.0,
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        bank_rollouts_per_prompt=0,
        **common,
    )
    dataset = Dataset.from_list([row(problem, draw) for problem in known])
    trainer = RLVRTrainer(model, [code_reward], args=args, train_dataset=dataset, processing_class=tokenizer)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    for step, log in enumerate(logs, start=1):
        shares = {status: log[f"code_reward/{status}"] for status in UNJUDGED}
        results.append({"step": step, "accuracy": log["rewards/code_reward/mean"], **shares})
    results += measured("end")
    for result in results:
        result["seed"] = seed
    return results


def plot() -> None:
    """Writes curve.png."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    for rows in read_all(RESULTS / "rlvr_code"):
        steps = [row for row in rows if isinstance(row["step"], int)]
        means = [
            sum(row["accuracy"] for row in steps[max(0, i - 4) : i + 1]) / min(5, i + 1) for i in range(len(steps))
        ]
        axis.plot(range(1, len(means) + 1), [100 * mean for mean in means], label=f"seed {rows[0]['seed']}")
    axis.set(xlabel="optimizer step", ylabel="programs that pass, %", title="RLVR on programs that read and print")
    axis.legend()
    axis.grid(alpha=0.3)
    save(figure, RESULTS / "rlvr_code" / "curve.png", dpi=130)


def table() -> str:
    """Held-out problems before and after, and what could not be judged."""
    seeds = read_all(RESULTS / "rlvr_code")
    lines = []
    for step, name in (("start", "as taught"), ("end", f"after {STEPS} steps of RLVR")):
        found = [[row for row in rows if row["step"] == step] for rows in seeds]
        cells = (
            spread(
                100 * row["accuracy"] for rows in found for row in rows if (row["words"], row["decoding"]) == column
            )
            for column in itertools.product(("taught wrong", "taught right"), ("greedy", "sampled"))
        )
        lines.append([name, *cells])
    first, last = (
        spread([100 * sum(row["accuracy"] for row in part) / len(part) for rows in seeds for part in [choose(rows)]])
        for choose in (
            lambda rows: [row for row in rows if isinstance(row["step"], int)][:5],
            lambda rows: [row for row in rows if isinstance(row["step"], int)][-5:],
        )
    )
    unjudged = max(row.get("infrastructure", 0) + row.get("unserved", 0) for rows in seeds for row in rows)
    return (
        f"Over {len(seeds)} seeds (mean, lowest to highest), programs that pass in the sandbox, in %. In training, first 5 "
        f"steps {first}, last 5 {last}; at most {100 * unjudged:.1f}% of a step were not judged. Made by "
        "`python -m scripts.experiments.rlvr_code`. Problems that are neither in what was taught nor in RLVR:\n\n"
        + markdown(["", "with a word taught wrong, greedy", "sampled", "the others, greedy", "sampled"], lines)
        + "\n"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", default=str(ROOT / "runs" / "rlvr_code"), help="folder for the runs")
    parser.add_argument("--report", action="store_true", help="only make the plot and the table")
    args = parser.parse_args(argv)
    if not args.report:
        for seed in args.seeds:
            output = RESULTS / "rlvr_code" / f"seed-{seed}.json"
            if not output.is_file():
                rows = run(seed, Path(args.runs) / f"seed-{seed}")
                options = {"steps": STEPS, "rollouts": GROUP * PROMPTS, "slips": SLIPS, "wrong_share": WRONG_SHARE}
                write_results(output, rows, {"seed": seed, **options})
    plot()
    write_text(RESULTS / "rlvr_code" / "table.md", table())
    print(table())


if __name__ == "__main__":
    main()
