"""
Writes the tables of recipes/results/README.md, the table.md of each experiment and the pictures of the pages, from the
files beside them.

    python -m scripts.readme_tables            writes them
    python -m scripts.readme_tables --check    ends with status 1 if they are not what the files say
"""

import argparse
import json
from functools import partial

from scripts.benchmarks import (
    attention_mask,
    divergence,
    generation,
    gpu,
    memory_plan,
    sandbox,
    scaling,
    step,
    teacher_memory,
    what_fits,
)
from scripts.benchmarks.decoding import table as decoding_table
from scripts.experiments import (
    ablations,
    bank,
    competence,
    coverage,
    levers,
    recover,
    rlvr_code,
    rlvr_curves,
    small,
    time_to_goal,
)
from scripts.harness.results import RESULTS, read, read_all, write_text
from scripts.harness.tables import markdown, spread
from trl_opsd.evaluate import svg


STAGES = {
    "sft": "SFT warm start",
    "rlvr": "RLVR",
    "prompt-only": "RLVR, asked to be concise (prompt-only)",
    "opsd": "**OPSD**",
}

SIZE_METHODS = {
    "teacher": "teacher",
    "pruned": "pruned only",
    "cold": "cold start",
    "sft": "SFT on the teacher's rollouts",
    "offline": "logits, on the teacher's rollouts",
    "rlvr": "RLVR",
    "opsd": "**OPSD**",
    "opsd-concise": "**OPSD**, teacher asked to be concise",
}


def chain_table() -> str:
    """The stages of the tiny chain: mean over the seeds, with the lowest and the highest."""
    runs = read_all(RESULTS / "tiny_chain", "seed-*/results.json")
    lines = []
    for stage, name in STAGES.items():
        cells = []
        for field, scale in (("accuracy", 100), ("mean_tokens", 1)):
            for decoding in ("greedy", "sampled"):
                chosen = [row for rows in runs for row in rows if (row["stage"], row["decoding"]) == (stage, decoding)]
                cells.append(spread(scale * row[field] for row in chosen))
        lines.append([name, *cells])
    changes = []
    for rows in runs:
        by_key = {(row["stage"], row["decoding"]): row for row in rows}
        changes.append(
            [
                100 * (by_key["opsd", decoding]["mean_tokens"] / by_key["rlvr", decoding]["mean_tokens"] - 1)
                for decoding in ("greedy", "sampled")
            ]
            + [
                100 * (by_key["opsd", decoding]["accuracy"] - by_key["rlvr", decoding]["accuracy"])
                for decoding in ("greedy", "sampled")
            ]
        )
    greedy, sampled, greedy_points, sampled_points = (list(column) for column in zip(*changes, strict=True))
    sentence = (
        f"OPSD against RLVR, over {len(runs)} seeds: tokens {spread(greedy)}% greedy and {spread(sampled)}% sampled at "
        f"temperature 1; accuracy {spread(greedy_points)} and {spread(sampled_points)} percentage points."
    )
    heading = ["", "accuracy greedy, %", "accuracy sampled, %", "tokens greedy", "tokens sampled"]
    return f"{markdown(heading, lines)}\n\n{sentence}"


def chain_picture() -> str:
    """Accuracy against tokens before and after OPSD, and of the prompt that costs nothing: a mark for each seed."""
    runs = read_all(RESULTS / "tiny_chain", "seed-*/results.json")
    stages = {
        "rlvr": "before (RLVR)",
        "prompt-only": "before, asked to be concise: costs nothing",
        "opsd": "after (OPSD)",
    }
    charts, titles = [], []
    for number, decoding in enumerate(("greedy", "sampled")):
        series = []
        for index, (stage, label) in enumerate(stages.items()):
            chosen = [row for rows in runs for row in rows if (row["stage"], row["decoding"]) == (stage, decoding)]
            series.append(
                svg.Series(
                    label,
                    index,
                    [row["mean_tokens"] for row in chosen],
                    [100 * row["accuracy"] for row in chosen],
                    y_error=[(100 * row["accuracy_low"], 100 * row["accuracy_high"]) for row in chosen],
                    name={"rlvr": "before", "prompt-only": "asked to be concise", "opsd": "after"}[stage],
                )
            )
        charts.append(
            svg.chart(
                series,
                "completion tokens, mean",
                "accuracy, %",
                x_from=0,
                y_from=94,
                y_to=100,
                left=svg.WIDTH * number,
            )
        )
        titles.append({"greedy": "greedy", "sampled": "sampled at temperature 1"}[decoding])
    return svg.picture(charts, titles, list(stages.values()))


def size_table() -> str:
    """The size sweep: for each ratio and method the mean over the seeds, with the lowest and the highest."""
    runs = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("tiny_size/seed-*/results.json"))]
    rows = [row for run in runs for row in run["rows"]]
    config = runs[0]["run"]["config"]
    lines = []
    for ratio, method in dict.fromkeys((row["ratio"], row["method"]) for row in rows):
        chosen = {
            decoding: [
                row for row in rows if (row["ratio"], row["method"], row["decoding"]) == (ratio, method, decoding)
            ]
            for decoding in ("greedy", "sampled")
        }
        sampled = chosen["sampled"]
        cells = [f"{100 * ratio:g}%", f"{sampled[0]['parameters']:,}", SIZE_METHODS[method]]
        cells += [spread(100 * row["accuracy"] for row in chosen[decoding]) for decoding in ("greedy", "sampled")]
        cells += [spread(100 * row["kept"] for row in sampled), spread(row["mean_tokens"] for row in sampled)]
        cells.append(f"{sum(row['answer_flops'] for row in sampled) / len(sampled) / 1e6:.1f}")
        lines.append(cells)
    offered = next(row["rollouts"] for row in rows if row["rollouts"])
    sentence = (
        f"{len(runs)} seeds. All methods of a ratio start from the same pruned model after {config['cold_start_steps']} "
        f"updates of supervised fine-tuning (the cold start) and make {config['updates']} more, on {offered:,} rollouts."
    )
    heading = ["removed", "parameters", "method", "accuracy greedy, %", "accuracy sampled, %"]
    heading += ["of the teacher's, sampled, %", "tokens sampled", "MFLOPs per answer"]
    return f"{markdown(heading, lines)}\n\n{sentence}"


def golds_table() -> str:
    """What the mathematical verifier makes of the reference answers of two test sets."""
    lines = []
    for before, row in zip(
        *(read(RESULTS / "math_reward" / f"{name}.json") for name in ("before", "golds")), strict=True
    ):
        cells = [row["set"]]
        for tried, mistakes in (("spellings", "false_negatives"), ("neighbours", "false_positives")):
            cells += [f"{row[tried]:,}", f"{before[mistakes]:,}", f"{row[mistakes]:,}"]
        lines.append(cells)
    failed = ["spellings", "failed before", "failed"]
    return markdown(["set", *failed, "neighbours", "passed before", "passed"], lines)


def export_table() -> str:
    """What models became in each format: size, accuracy where it was judged, greedy prefix, speed."""
    lines = []
    for name in ("tiny", "small", "smollm2", "opsd-smollm2"):
        files = sorted((RESULTS / "export").glob(f"{name}*.json"))
        rows = list({row["artefact"]: row for file in files for row in read(file)}.values())
        whole = next(row["bytes"] for row in rows if row["artefact"] == "checkpoint")
        for row in rows:
            cells = [name, row["artefact"]]
            if row["answer"] == "failed":
                lines.append([*cells, "", "", "", "", f"refused: {row['why'].partition(' (all it said')[0]}"])
                continue
            bounds = next(iter((row["accuracy"] or {}).values()), None)
            accuracy = "" if bounds is None else "{:.1f} ({:.1f} to {:.1f})".format(*(100 * value for value in bounds))
            cells += [f"{row['bytes'] / 1e6:,.1f} ({row['bytes'] / whole:.2f})", accuracy]
            measured = "prefix" in row
            cells += [f"{row['prefix']:.2f}" if measured else "", f"{row['tokens_per_s']:,.0f}" if measured else ""]
            lines.append([*cells, {"measured": ""}.get(row["answer"], row["answer"])])
    heading = ["model", "artefact", "MB (of the checkpoint)", "accuracy greedy, % (95% interval)", "greedy prefix"]
    return markdown([*heading, "tokens/s", "verdict"], lines)


def served_table() -> str:
    """SmolLM2 before and after OPSD behind vLLM's server, in both orders."""
    files = [RESULTS / "smollm2_cpu" / f"served-{order}.json" for order in ("before-after", "after-before")]
    runs = [{row["stage"]: row["serving"] for row in read(file)} for file in files]
    lines = []
    for index, load in enumerate(runs[0]["before"]):
        for field, name in (("requests_per_s", "answers/s"), ("correct_per_s", "correct answers/s")):
            values = {stage: [run[stage][index][field] for run in runs] for stage in ("before", "after")}
            ratios = [after / before for before, after in zip(values["before"], values["after"], strict=True)]
            cells = [", ".join(f"{value:.2f}" for value in values[stage]) for stage in ("before", "after")]
            lines.append([f"{load['concurrency']}", name, *cells, ", ".join(f"{ratio:.1f}" for ratio in ratios)])
        first = [f"{run[stage][index]['first_token_p50_s']:.2f}" for stage in ("before", "after") for run in runs]
        lines.append([f"{load['concurrency']}", "first token, s", ", ".join(first[:2]), ", ".join(first[2:]), ""])
    return markdown(["at a time", "", "before", "after", "times"], lines)


def signs_picture() -> str:
    """A run that goes well and one that does not: accuracy and length on held-out problems, step by step."""
    runs = [row for row in read(RESULTS / "signs" / "rates.json") if row["method"] == "ours"]
    runs.sort(key=lambda row: row["setting"]["learning_rate"])
    names = {0.002: "good: a learning rate of 2e-3", 0.004: "bad: 4e-3, which ruins what the answers depend on"}
    charts = []
    for field, scale, label in (("accuracy", 100, "accuracy, %, sampled"), ("mean_tokens", 1, "mean tokens")):
        series = []
        for index, run in enumerate(runs):
            points = [{"step": 0, **run["start"]}, *run["evaluations"]]
            points = [point for point in points if point["step"] <= 24]
            steps, values = zip(*((point["step"], scale * point[field]) for point in points), strict=True)
            series.append(svg.Series(names[run["setting"]["learning_rate"]], index, steps, values, kind="line"))
        charts.append(svg.chart(series, "step", label, y_from=0.0, left=len(charts) * svg.WIDTH))
    return str(svg.picture(charts, ["accuracy", "length"], list(names.values())))


BLOCKS = {
    "served": served_table,
    "export": export_table,
    "chain": chain_table,
    "size": size_table,
    "divergence": divergence.table,
    "step": step.table,
    "decoding": decoding_table,
    "generation": generation.table,
    "goal": partial(time_to_goal.summary, "short"),
    "goal, long traces": partial(time_to_goal.summary, "long"),
    "goal, smollm2": partial(time_to_goal.summary, "smollm2"),
    "scaling, time": scaling.step_table,
    "scaling, memory": scaling.memory_table,
    "scaling, extrapolated": scaling.extrapolation_table,
    "scaling, prompts": scaling.prompt_table,
    "teacher memory": teacher_memory.table,
    "memory plan": memory_plan.table,
    "what fits": what_fits.table,
    "attention mask": attention_mask.table,
    "gpu": gpu.table,
    "sandbox": sandbox.table,
    "golds": golds_table,
}
FILES = {
    "rlvr_curves": rlvr_curves.table,
    "rlvr_code": rlvr_code.table,
    "tiny_bank": bank.table,
    "tiny_competence": competence.table,
    "tiny_recover": recover.table,
    "coverage": coverage.table,
    "levers": levers.table,
    **{name: partial(small.table, name) for name in ("small", "small_hard")},
    "time_to_goal": partial(time_to_goal.table, "short"),
    "time_to_goal_long": partial(time_to_goal.table, "long"),
    "time_to_goal_smollm2": partial(time_to_goal.table, "smollm2"),
    **{name: partial(ablations.table, name) for name in ablations.TABLES},
}


def filled(text: str) -> str:
    """The page with every table as the results say."""
    for name, table in BLOCKS.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(
                f"recipes/results/README.md has no place for the table `{name}`: {begin.strip()} and its end."
            )
        text = before + begin + table() + end + after
    return text


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args(argv)
    page = RESULTS / "README.md"
    texts = {page: filled(page.read_text()), RESULTS / "tiny_chain" / "accuracy_tokens.svg": chain_picture()}
    texts[RESULTS / "signs" / "rates.svg"] = signs_picture()
    texts |= {RESULTS / name / "table.md": table() for name, table in FILES.items()}
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        print(path)
        if not args.check:
            write_text(path, texts[path])
    if args.check and stale:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
