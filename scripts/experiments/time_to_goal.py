"""
Seconds of training until a reasoner needs 40% fewer tokens at an accuracy that is hardly lower: ours, TRL's SDFTTrainer with the
same context, and TRL's GRPOTrainer with a length penalty.

    OMP_NUM_THREADS=1 python -m scripts.experiments.time_to_goal --develop                # the settings of each
    OMP_NUM_THREADS=1 python -m scripts.experiments.time_to_goal --seeds 0 1 2 3 4        # the measurement

| `--world` | the reasoner, from its RLVR checkpoint (made if it is not there) | rollouts of a batch | accuracy lower by | measured with |
|---|---|---|---|---|
| `short` | the tiny one of the quickstart | 96 | one point | |
| `long` | the tiny one, with long traces, a few much longer, and a fifth wrong; an hour | 96 | one point | `--budget 400 --every 1.3 --stay 2 --max_samples 2048` |
| `smollm2` | SmolLM2-135M-Instruct by recipes/small/smollm2_cpu_*.yaml, after scripts/smollm2.py; two hours | 48 | three points | `--seeds 0 --budget 1100 --first 300 --every 1.5 --stay 1.3 --max_samples 256` |

The settings of each method are the fastest of its grid below on the development seeds, which no measurement uses:
recipes/results/time_to_goal/development.json, and time_to_goal_long. For `smollm2` there is no time to develop any, so all of its
grid are measured. `--levers` adds runs of ours with one of its levers changed. Every run has a process of its own, one at a time
or `--jobs` side by side; one that is in the file already is not run again, so delete the file to measure anew. The clock is the
processor's time of training, generation included and evaluation excluded; the wall clock stands beside it. A model is evaluated
on held-out problems, sampled at temperature 1, whenever the clock has gone on by an eighth (`--every`), for every method alike.
`--report` makes plot and table from the files.
"""

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
import yaml
from transformers import GenerationMixin, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, ModelConfig, get_peft_config
from trl.experimental.sdft import SDFTConfig, SDFTTrainer
from trl.rewards import get_soft_overlong_punishment

from scripts.harness.plots import plt, save
from scripts.harness.results import RESULTS, ROOT, read, read_all, write_results, write_text
from scripts.harness.stages import TEACHERS, evaluate, make_teacher
from scripts.harness.tables import markdown
from trl_opsd import decoding
from trl_opsd.data import load_prompts
from trl_opsd.opsd import OPSDConfig, OPSDTrainer
from trl_opsd.opsd.run import OPSDScriptArguments, apply_bank
from trl_opsd.rewards import length_reward, math_reward


TOKENS, ACCURACY = 0.6, 0.01  # the goal: this share of the tokens of the start, at most this much less accurate
# Where the results of a world are, which teacher all start from, the longest reply in an evaluation and its other options, and
# how much less accurate the goal may be
WORLDS = {
    "short": {"results": "time_to_goal", "start": "strong", "limit": 192, "options": {}, "accuracy": ACCURACY},
    "long": {"results": "time_to_goal_long", "start": "long", "limit": 448, "options": {}, "accuracy": ACCURACY},
    "smollm2": {
        "results": "time_to_goal_smollm2",
        "start": "smollm2",
        "limit": 256,
        "options": {"task": "small", "dtype": "bfloat16", "batch_size": 64},
        "accuracy": 0.03,  # what the few problems that there is time for can see
    },
}
# What length is punished by, beside the math reward: in comparison with the group, or by each token
PENALTIES = {
    "length_reward": length_reward,
    "get_soft_overlong_punishment(128, 128)": get_soft_overlong_punishment(128, 128),
    "get_soft_overlong_punishment(448, 448)": get_soft_overlong_punishment(448, 448),
}
DEVELOPMENT = (10, 11)
# What may be changed about ours beside its rate
LEVERS = {
    "transformers' generate": {"plain": True},
    "limit": {"completion_limit_quantile": 1.0},
    "bank, 5": {"off_policy_steps": 5},
    "bank, 10": {"off_policy_steps": 10},
    "2 updates a batch": {"num_iterations": 2},
}
# What else the settings of SmolLM2 differ by from the first of their method
OTHERS = {
    "three times the rate": {"learning_rate": 9e-4},
    "without the teacher's gate": {"teacher_gate": None, "teacher_gate_rollouts": None},
}
RATES = (3e-4, 6e-4, 1e-3, 2e-3, 4e-3)


def grids(world: str) -> dict[str, list[dict]]:
    """The settings that are tried. Of the long world's, where a step takes seconds, those near the best of the short."""
    if world == "smollm2":
        # First the recipe's rate, for all, and two updates a batch, as it has, but where another number stands; the others are
        # in four parts, for their memory
        parts = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 4}
        sdft = {**parts, "distillation_alpha": 1.0}
        grpo = {**parts, "penalty": "length_reward", "weight": 1.0}
        return {
            "ours": [{}, OTHERS["without the teacher's gate"]],
            "SDFT": [{**sdft, "num_iterations": 1}, {**sdft, "num_iterations": 2}],
            "GRPO": [{"learning_rate": 3e-4, **grpo}, {"learning_rate": 9e-4, **grpo}],
        }
    if world == "long":
        rates = RATES[1:]
        # In four parts SDFT is a little faster, because the shorter ones are not padded to the longest
        parts = {"per_device_train_batch_size": 24, "gradient_accumulation_steps": 4}
        return {
            "ours": [{"learning_rate": rate} for rate in rates],
            "SDFT": [
                {"learning_rate": rate, "distillation_alpha": alpha, **parts}
                for rate, alpha in (*((rate, 1.0) for rate in rates), (2e-3, 0.5))
            ],
            "GRPO": [
                {"learning_rate": rate, "penalty": penalty, "weight": 1.0}
                for penalty in ("length_reward", "get_soft_overlong_punishment(448, 448)")
                for rate in (1e-3, 2e-3)
            ],
        }
    return {
        # The first is the recipe as it is
        "ours": [{"learning_rate": rate} for rate in RATES],
        # Reverse KL, which is the objective of ours, and the Jensen-Shannon divergence that is SDFT's default
        "SDFT": [{"learning_rate": rate, "distillation_alpha": alpha} for alpha in (1.0, 0.5) for rate in RATES],
        "GRPO": [
            {"learning_rate": rate, "penalty": penalty, "weight": weight}
            for rate, penalty, weight in (
                (3e-4, "length_reward", 1.0),
                (1e-3, "length_reward", 1.0),
                (2e-3, "length_reward", 1.0),
                (1e-3, "length_reward", 0.3),
                (1e-3, "get_soft_overlong_punishment(128, 128)", 1.0),
            )
        ],
    }


def make_trainer(world: str, method: str, setting: dict, path: Path, data: Path, seed: int, callback: TrainerCallback):
    recipes, _, _ = TEACHERS[WORLDS[world]["start"]]
    recipe = yaml.safe_load((ROOT / f"{recipes}opsd.yaml").read_text())
    # What the three have in common: batch, length, temperature, steps and optimizer; not `beta`, which is not one thing
    fields = GRPOConfig.__dataclass_fields__.keys() & SDFTConfig.__dataclass_fields__.keys()
    common = {name: value for name, value in recipe.items() if name in fields}
    common |= {"output_dir": tempfile.mkdtemp(), "seed": seed, "disable_tqdm": True, "save_strategy": "no"}
    model_args = ModelConfig(
        **{name: recipe[name] for name in ModelConfig.__dataclass_fields__.keys() & recipe.keys()}
    )
    if model_args.use_peft:
        kept = ("dtype", "attn_implementation")
        common["model_init_kwargs"] = {name: getattr(model_args, name) for name in kept}
    setting = dict(setting)
    rows = load_prompts(str(data))
    arguments = {"model": str(path), "train_dataset": rows, "callbacks": [callback]}
    arguments["peft_config"] = get_peft_config(model_args)
    if method == "ours":
        own = {name: value for name, value in recipe.items() if name in OPSDConfig.__dataclass_fields__}
        if setting.pop("plain", False):
            decoding.can_call = lambda *args, **kwargs: False  # the process is this run's alone
        config = OPSDConfig(**own | common | setting)
        if config.given is not None:
            bank = OPSDScriptArguments(rollout_bank=str(path / "bank"))
            arguments["train_dataset"], _ = apply_bank(rows, bank, config)
        return OPSDTrainer(args=config, reward_funcs=math_reward, **arguments)
    if method == "SDFT":
        arguments["train_dataset"] = rows.add_column("privileged_context", [""] * len(rows))
        own = {
            # The tiny reasoner's vocabulary is smaller than its default of the top 100
            "distillation_mode": SDFTConfig.distillation_mode if world == "smollm2" else "full_logits",
            "teacher_prompt_template": recipe["teacher_prompt_template"] + "{privileged_context}",
        }
        return SDFTTrainer(args=SDFTConfig(**common | own | setting), **arguments)
    penalty, weight = PENALTIES[setting.pop("penalty")], setting.pop("weight")
    # As long as the clock lets it: the schedule of the RLVR before it, without its end
    own = {"num_generations": 8, "max_steps": 10_000, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}
    config = GRPOConfig(**common | own | setting, reward_weights=[1.0, weight])
    return GRPOTrainer(args=config, reward_funcs=[math_reward, penalty], **arguments)


class Clock(TrainerCallback):
    """Seconds of training, and what the model has become by then. Ends the run at the goal, or when time is up."""

    def __init__(self, measure, start: dict, limits: dict, accuracy: float = ACCURACY):
        self.measure, self.start, self.limits, self.accuracy = measure, start, limits, accuracy
        self.rows, self.cpu, self.wall, self.generation = [], 0.0, 0.0, 0.0

    def time_generation(self) -> None:
        generate = GenerationMixin.generate

        def timed(*args, **kwargs):
            begin = time.process_time()
            try:
                return generate(*args, **kwargs)
            finally:
                self.generation += time.process_time() - begin

        GenerationMixin.generate = timed  # the process is this run's alone

    def go(self) -> None:
        self.begin = time.process_time(), time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.go()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.cpu += time.process_time() - self.begin[0]
        self.wall += time.perf_counter() - self.begin[1]
        last = self.rows[-1]["cpu_s"] if self.rows else 0.0
        # Further than the goal, to see whether it stays there
        reached = next((row["cpu_s"] for row in self.rows if row["goal"]), float("inf"))
        is_last = self.cpu > min(self.limits["budget"], self.limits["stay"] * reached)
        is_last = is_last or state.global_step >= state.max_steps
        if self.cpu >= max(self.limits["first"], self.limits["every"] * last) or is_last:
            generation = self.generation
            measured = self.measure(model)
            self.generation = generation
            row = {"step": state.global_step, "cpu_s": self.cpu, "wall_s": self.wall, "generation_cpu_s": generation}
            row |= measured
            row["short"] = row["mean_tokens"] <= TOKENS * self.start["mean_tokens"]
            row["goal"] = row["short"] and row["accuracy"] >= self.start["accuracy"] - self.accuracy
            self.rows.append(row)
            print(json.dumps(row), flush=True)
        if is_last:
            control.should_training_stop = True
        self.go()
        return control


def work(world: str, method: str, setting: dict, seed: int, runs: str, limits: dict) -> dict:
    """
    One run, in a process of its own: its row. It ends within `limits`: options `budget`, `stay`, `first`, `every` and
    `max_samples` of the command line.
    """
    torch.set_num_threads(1)
    path, data = make_teacher(WORLDS[world]["start"], seed, Path(runs))

    def measure(model=None):
        options = {"decoding": "sampled", "max_completion_length": WORLDS[world]["limit"], **WORLDS[world]["options"]}
        rows = evaluate(path, data, seed, limits["max_samples"], model=model, **options)
        return {name: rows[0][name] for name in ("accuracy", "accuracy_low", "accuracy_high", "mean_tokens")}

    start = measure()
    clock = Clock(measure, start, limits, WORLDS[world]["accuracy"])
    trainer = make_trainer(world, method, setting, path, data, seed, clock)
    clock.time_generation()
    trainer.train()
    reached = [next((row for row in clock.rows if row[name]), None) for name in ("goal", "short")]
    row = {"method": method, "setting": setting, "seed": seed, "budget_cpu_s": limits["budget"], "start": start}
    return row | {
        "goal": reached[0],
        "short": reached[1],
        "evaluations": clock.rows,
        "steps": trainer.state.global_step,
    }


def run_all(tasks: list[tuple], world: str, runs: str, limits: dict, jobs: int) -> None:
    """
    Runs what is not in its file yet, each in a process of its own, and adds its row to the file.

    Args:
        tasks (`list[tuple]`):
            File, method, setting and seed of each.
        world (`str`), runs (`str`), limits (`dict`):
            As of [`work`].
        jobs (`int`):
            How many are run at a time.
    """
    tasks = [task for index, task in enumerate(tasks) if task not in tasks[:index]]
    order, missing, failed = [task[1:] for task in tasks], {}, []

    def place(row: dict) -> int:
        """Rows of other calls come first, as they are."""
        return order.index(key_of(row)) if key_of(row) in order else -1

    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for output, *key in tasks:
            if tuple(key) not in map(key_of, rows_of(output)):
                missing[pool.submit(work, world, *key, runs, limits)] = output
        for future in as_completed(missing):
            output = missing[future]
            if future.exception() is not None:  # the others go on
                failed.append(future.exception())
                continue
            row = {**future.result(), "jobs": jobs}
            write_results(
                output,
                sorted([*rows_of(output), row], key=place),
                {"goal": [TOKENS, WORLDS[world]["accuracy"]], **limits},
            )
            print(line_of(row), flush=True)
    if failed:
        raise failed[0]


def key_of(row: dict) -> tuple:
    return row["method"], row["setting"], row["seed"]


def rows_of(output: Path) -> list[dict]:
    return read(output) if output.is_file() else []


def line_of(row: dict) -> str:
    """A run, for people."""
    goal, last = row["goal"] or {"step": None, "cpu_s": float("nan")}, row["evaluations"][-1]
    return (
        f"{row['seed']} {row['method']} {row['setting']}: goal at step {goal['step']}, {goal['cpu_s']:.1f} s; "
        f"start {row['start']['accuracy']:.3f} / {row['start']['mean_tokens']:.1f}, "
        f"end (step {last['step']}, {last['cpu_s']:.0f} s) {last['accuracy']:.3f} / {last['mean_tokens']:.1f}"
    )


def develop(world: str, methods: list[str], runs: str, budget: float, jobs: int) -> None:
    """Every setting of every grid, once on each of the development seeds."""
    limits = {"max_samples": 512, "first": 0.0, "every": 1.3 if world == "short" else 1.5}
    limits |= {"budget": budget / 2, "stay": 1.3}
    output = folder(world) / "development.json"
    settings = [(method, setting) for method, grid in grids(world).items() for setting in grid if method in methods]
    tasks = [(output, method, setting, seed) for seed in DEVELOPMENT for method, setting in settings]
    run_all(tasks, world, runs, limits, jobs)


def folder(world: str) -> Path:
    return RESULTS / WORLDS[world]["results"]


def chosen(world: str, method: str) -> dict:
    """
    The setting that missed the goal on the fewest development seeds; of those the one that was there first, on average, and of
    those that never were the one that was the shortest while accurate enough. SmolLM2's is the first of its grid.
    """
    if world == "smollm2":
        return grids(world)[method][0]
    rows = [row for row in read(folder(world) / "development.json") if row["method"] == method]

    def rank(setting):
        missed, seconds, shortest = 0, 0.0, 0.0
        for row in (row for row in rows if row["setting"] == setting):
            if row["goal"]:
                seconds += row["goal"]["cpu_s"]
            else:
                missed += 1
                accurate = [
                    e
                    for e in row["evaluations"]
                    if e["accuracy"] >= row["start"]["accuracy"] - WORLDS[world]["accuracy"]
                ]
                shortest += min([e["mean_tokens"] for e in accurate], default=float("inf"))
        return missed, seconds, shortest

    return min((row["setting"] for row in rows), key=rank)


def name_of(world: str, row: dict) -> str:
    best = chosen(world, row["method"])
    for name, lever in {"": {}, **LEVERS, **OTHERS}.items():
        if row["setting"] == best | lever:
            return f"{row['method']}, {name}" if name else row["method"]
    return f"{row['method']}, at SDFT's rate"


def plot(world: str) -> None:
    """Writes curves.png."""
    seeds = read_all(folder(world))
    figure, axes = plt.subplots(2, len(seeds), figsize=(4 * len(seeds), 6), sharex=True, sharey="row", squeeze=False)
    for column, rows in zip(axes.T, seeds, strict=True):
        for row in rows:
            points = [{"cpu_s": 0.5, **row["start"]}, *row["evaluations"]]  # 0 has no place on the axis
            seconds = [point["cpu_s"] for point in points]
            (line,) = column[0].plot(seconds, [point["mean_tokens"] for point in points], label=name_of(world, row))
            column[1].plot(seconds, [100 * point["accuracy"] for point in points], color=line.get_color())
            if row["goal"]:
                column[0].plot(row["goal"]["cpu_s"], row["goal"]["mean_tokens"], "o", color=line.get_color())
                column[1].plot(row["goal"]["cpu_s"], 100 * row["goal"]["accuracy"], "o", color=line.get_color())
        column[0].axhline(TOKENS * row["start"]["mean_tokens"], color="grey", linestyle=":")
        column[1].axhline(100 * (row["start"]["accuracy"] - WORLDS[world]["accuracy"]), color="grey", linestyle=":")
        column[0].set(title=f"seed {row['seed']}", xscale="log")
        column[1].set(xlabel="processor seconds of training")
    axes[0, 0].set_ylabel("tokens, sampled")
    axes[1, 0].set_ylabel("accuracy, sampled, %")
    axes[0, 0].legend()
    save(figure, folder(world) / "curves.png", dpi=120)


def table(world: str) -> str:
    """Every run, and the setting that was chosen for each method."""
    rows = [row for rows in read_all(folder(world)) for row in rows]

    def cell(row: dict, name: str) -> str:
        found = row[name]
        if found is None:
            return f"not within {row['evaluations'][-1]['cpu_s']:.0f} s"
        return f"{found['cpu_s']:.1f} s ({found['wall_s']:.1f} s), step {found['step']}"

    def step(before: dict, after: dict) -> str:
        """Processor seconds of a step between two evaluations."""
        steps = after["step"] - before["step"]
        seconds = [(after[name] - before[name]) / steps for name in ("cpu_s", "generation_cpu_s")]
        return f"{seconds[0]:.2f} s, {seconds[1]:.2f} s"

    lines = []
    for row in rows:
        evaluations = [{"step": 0, "cpu_s": 0.0, "generation_cpu_s": 0.0}, *row["evaluations"]]
        ours = next(other for other in rows if other["method"] == "ours" and other["seed"] == row["seed"])
        after = [e for e in row["evaluations"] if row["goal"] and e["step"] > row["goal"]["step"]]
        end = row["goal"] or row["evaluations"][-1]
        cells = [
            str(row["seed"]),
            name_of(world, row),
            f"{row['start']['accuracy']:.1%} / {row['start']['mean_tokens']:.1f}",
            cell(row, "short"),
            cell(row, "goal"),
            f"{end['accuracy']:.1%} / {end['mean_tokens']:.1f}",
            f"{statistics.mean(e['accuracy'] for e in after):.1%}, {sum(e['goal'] for e in after)} of {len(after)}"
            if after
            else "",
            f"{end['generation_cpu_s'] / end['cpu_s']:.0%}",
            f"{row['goal']['cpu_s'] / ours['goal']['cpu_s']:.2f}" if row["goal"] and ours["goal"] else "",
            f"{step(*evaluations[:2])} / {step(*evaluations[-2:])}",
        ]
        lines.append(cells)
    heading = ["seed", "method", "start, accuracy / tokens", "tokens alone", "goal, processor (wall)", "at the goal"]
    heading += ["after it: accuracy, mean; evaluations at the goal", "generation", "times ours"]
    heading += ["a step at first / at last, of it generation"]
    settings = "\n".join(f"- {method}: `{json.dumps(chosen(world, method))}`" for method in grids(world))
    command = f"python -m scripts.experiments.time_to_goal --world {world}"
    return f"{markdown(heading, lines)}\n\n{settings}\n\nMade by `{command}`, with the options that its help says.\n"


def summary(world: str) -> str:
    """Seconds and steps to the goal, and whether a method stays there: a line for each method."""
    seeds = read_all(folder(world))

    def cell(row: dict) -> str:
        if row["goal"] is None:
            return f"not in {row['evaluations'][-1]['cpu_s']:.0f}"
        return f"{row['goal']['cpu_s']:.1f} ({row['goal']['step']})"

    names = {"SDFT": "TRL SDFT, same context", "GRPO": "TRL GRPO, length penalty"}
    lines = []
    for name in dict.fromkeys(name_of(world, row) for rows in seeds for row in rows):
        runs = [next(row for row in rows if name_of(world, row) == name) for rows in seeds]
        after = [
            e["goal"] for row in runs for e in row["evaluations"] if row["goal"] and e["step"] > row["goal"]["step"]
        ]
        lines.append([names.get(name, name), *map(cell, runs), f"{sum(after)} of {len(after)}"])
    heading = ["processor seconds (steps)", *(f"seed {rows[0]['seed']}" for rows in seeds)]
    return markdown([*heading, "evaluations after it that are at the goal"], lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=list(WORLDS), default="short")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--levers", nargs="+", choices=list(LEVERS), default=[], help="what to change about ours")
    parser.add_argument("--develop", action="store_true", help="choose the settings")
    parser.add_argument(
        "--methods", nargs="+", default=["ours", "SDFT", "GRPO"], help="of which the settings are chosen"
    )
    parser.add_argument("--report", action="store_true", help="only make the plot and the table")
    parser.add_argument("--runs", default=str(ROOT / "runs" / "ablation"), help="folder for the starts")
    parser.add_argument("--budget", type=float, default=120.0, help="processor seconds of training of a run")
    parser.add_argument(
        "--stay", type=float, default=3.0, help="how many times the seconds to the goal a run goes on for"
    )
    parser.add_argument("--first", type=float, default=0.0, help="processor seconds before the first evaluation")
    parser.add_argument("--every", type=float, default=1.125, help="the clock's factor between two evaluations")
    parser.add_argument("--max_samples", type=int, default=1024, help="held-out problems of an evaluation")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on as many cores")
    args = parser.parse_args(argv)
    if args.world == "smollm2" and (args.develop or args.levers):
        parser.error("`--world smollm2` has neither settings to develop nor levers: all of its grid are measured.")
    if args.develop:
        return develop(args.world, args.methods, args.runs, args.budget, args.jobs)
    if not args.report:
        limits = {name: getattr(args, name) for name in ("budget", "stay", "first", "every", "max_samples")}
        best = {method: chosen(args.world, method) for method in grids(args.world)}
        settings = list(best.items())
        # The objective of ours and of SDFT is the same, so at one rate the steps are the same, and their cost is not
        matched = {name: value for name, value in best["SDFT"].items() if name == "learning_rate"}
        if matched and matched != best["ours"]:
            settings.append(("ours", matched))
        settings += [("ours", best["ours"] | LEVERS[name]) for name in args.levers]
        if args.world == "smollm2":
            # The first of each before the second of any
            tried = [[(method, setting) for setting in grid] for method, grid in grids(args.world).items()]
            settings = [pair for pairs in zip(*tried, strict=True) for pair in pairs]
        tasks = [
            (folder(args.world) / f"seed-{seed}.json", *setting, seed) for seed in args.seeds for setting in settings
        ]
        run_all(tasks, args.world, args.runs, limits, args.jobs)
    plot(args.world)
    write_text(folder(args.world) / "table.md", table(args.world))
    print(table(args.world))


if __name__ == "__main__":
    main()
