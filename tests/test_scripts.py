"""Set-up, benchmarks and experiments: every result has its command, every table says what the files say."""

import ast
import contextlib
import graphlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from kernels import KEEPS_SCORES
from transformers import TrainerControl, TrainerState


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # commands are run from the root, where `-m` finds `scripts`

from scripts import readme_tables  # noqa: E402
from scripts.harness.meter import Meter  # noqa: E402
from scripts.harness.processes import process, run_alone, run_distributed  # noqa: E402
from scripts.harness.results import RESULTS, read_all, write_results  # noqa: E402
from scripts.harness.shapes import small  # noqa: E402
from scripts.harness.tables import markdown, spread  # noqa: E402


PAGE = (RESULTS / "README.md").read_text()
COMMANDS = dict(re.findall(r"^\| \[(\w+)\]\(\1\) \| .* \| `([^`]+)` \|$", PAGE, re.M))
NOT_RUN = dict(re.findall(r"^\| (\w+) \| .*: not run yet \| `([^`]+)` \|$", PAGE, re.M))


def test_every_folder_of_results_is_listed_with_its_command():
    assert set(COMMANDS) == {path.name for path in RESULTS.iterdir() if path.is_dir()}
    assert not NOT_RUN.keys() & COMMANDS.keys()


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", sorted({*COMMANDS.values(), *NOT_RUN.values()}))
def test_the_command_of_a_result_can_be_run(command, monkeypatch):
    program, *arguments = shlex.split(command)
    if program == "bash":
        subprocess.run(["bash", "-n", *arguments], check=True, cwd=ROOT)
        return
    monkeypatch.chdir(ROOT)
    is_module = arguments[0] == "-m"
    target, options = (arguments[1], arguments[2:]) if is_module else (arguments[0], arguments[1:])
    monkeypatch.setattr(sys, "argv", [target, "--help"])
    with contextlib.redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as ended:
        if is_module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target, run_name="__main__")
    assert ended.value.code in (None, 0)
    known = re.findall(r"--\w+", output.getvalue())
    named = [option for option in options if option.startswith("--") and option != "--config"]
    assert set(named) <= set(known), f"`{command}` has options that its --help does not"
    config = options[options.index("--config") + 1] if "--config" in options else "pyproject.toml"
    assert (ROOT / config).is_file()


planned_alike = pytest.mark.skipif(
    KEEPS_SCORES, reason="a table has plans for torch 2.13, and other torches need more"
)


@planned_alike
def test_tables_say_what_the_results_say():
    readme_tables.main(["--check"])


@planned_alike
def test_a_table_that_is_wrong_is_found():
    page = (RESULTS / "README.md").read_text()
    assert "| **OPSD** |" in page
    assert readme_tables.filled(page.replace("| **OPSD** |", "| **OPSD** | 101.0 |")) == page
    with pytest.raises(ValueError, match="no place for the table `chain`"):
        readme_tables.filled(page.replace("<!-- chain -->", ""))


def test_scripts_import_each_other_in_one_direction_only():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for path in (ROOT / "scripts").rglob("*.py")
    }
    graph = {}
    for name, module in modules.items():
        found = [alias.name for node in ast.walk(module) if isinstance(node, ast.Import) for alias in node.names]
        for node in ast.walk(module):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: imports are absolute"
                found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        graph[name] = modules.keys() & set(found) - {"scripts"}
    assert "scripts.benchmarks.step" in graph["scripts.benchmarks.scaling"]
    list(graphlib.TopologicalSorter(graph).static_order())  # raises on a circle
    for name, imported in graph.items():
        if name.startswith("scripts.harness"):
            assert all(other.startswith("scripts.harness") for other in imported), name


def test_a_report_of_nothing_is_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match=rf"{re.escape(str(tmp_path))} has no results yet"):
        read_all(tmp_path)


def test_a_process_is_another_one_and_stays_the_same():
    with process() as call:
        first = call(os.getpid)
        assert call(os.getpid) == first != os.getpid()
    assert run_alone(os.getpid) not in (first, os.getpid())
    with pytest.raises(ZeroDivisionError):
        run_alone(divmod, 1, 0)


def test_a_process_that_dies_says_what_it_printed(capfd):
    with pytest.raises(RuntimeError, match="(?s)`exec` died after printing:.*last words"):
        run_alone(exec, "import os; os.write(1, b'last words'); os._exit(3)")
    assert "last words" not in capfd.readouterr().out


def test_distributed_processes_have_ranks():
    assert run_distributed(2, os.getenv, "RANK") == ["0", "1"]
    assert run_distributed(1, os.getenv, "RANK") == [None]
    with pytest.raises(RuntimeError, match="(?s)`divmod` failed after printing:.*ZeroDivisionError"):
        run_distributed(2, divmod, 1, 0)


def test_the_peak_is_that_of_the_block():
    import torch

    with Meter("cpu") as meter:
        torch.ones(16 << 20).sum()
    assert 60 < meter.peak_mib < 80  # 64 MiB, freed by now
    assert meter.seconds > 0


def test_shapes_count_what_is_built():
    from transformers import Qwen3ForCausalLM

    for tied in (True, False):
        shape = small(128, 2, 320, tied=tied)
        matrices = [parameter for parameter in Qwen3ForCausalLM(shape.config()).parameters() if parameter.ndim == 2]
        assert sum(matrix.numel() for matrix in matrices) == shape.total


def test_tables_in_markdown():
    assert spread([-0.04, 0.01]) == "0.0 (0.0 to 0.0)"
    assert spread([1, 2, 6]) == "3.0 (1.0 to 6.0)"
    assert markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


@pytest.fixture
def in_this_process(monkeypatch):
    """Arms have processes of their own, each of which imports torch and TRL."""
    from scripts.benchmarks import divergence, gpu, step

    @contextlib.contextmanager
    def here():
        prepared = []

        def call(function, *args):
            # The measured function of a case is a variable of its process
            if function is divergence.measure_once:
                divergence.step = prepared[0]
            result = function(*args)
            if function is divergence.prepare:
                prepared.append(divergence.step)
            return result

        yield call

    monkeypatch.setattr(divergence, "process", here)
    monkeypatch.setattr(step, "run_distributed", lambda number, function, *args: [function(*args)])
    monkeypatch.setattr(gpu, "run_alone", lambda function, *args: function(*args))
    return gpu


def test_the_gpu_command_runs_up_to_the_gpu(in_this_process, tmp_path, monkeypatch, capsys):
    gpu = in_this_process
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    gpu.main(["--device", "cpu", "--output_dir", str(tmp_path)])
    loss, steps = (json.loads((tmp_path / f"{kind}-cpu.json").read_text()) for kind in ("loss", "step-tiny"))
    found = {(row["backend"], row["kl_clip"]): row for row in loss["rows"]}
    assert set(found) == {("products", None), ("fused", 1e-4), ("fused", None), ("chunked", None), ("liger", None)}
    for row in loss["rows"]:
        assert row["seconds_median"] > 0 and row["seconds_to_faster_peer"] > 0
    assert {"torch", "python"} <= {name.lower() for name in loss["environment"]["versions"]}
    rows = {row["arm"]: row for row in steps["rows"]}
    assert list(rows) == gpu.ARMS
    for row in rows.values():
        assert row["useful_per_s"] > 0 and row["peer"] in rows
    assert rows["TRL Distillation"]["losses"] == pytest.approx(rows["ours, external teacher, all"]["losses"], rel=1e-4)
    text = capsys.readouterr().out
    assert gpu.loss_table(loss["rows"]) in text and gpu.step_table(steps["rows"]) in text and "Targets" in text


def test_the_gpu_command_says_what_it_did_not_measure(in_this_process, tmp_path, monkeypatch):
    import torch

    gpu = in_this_process

    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu.step, "work", full)
    monkeypatch.setattr(gpu, "ARMS", gpu.ARMS[:1])
    monkeypatch.setattr(gpu, "measure_loss", lambda *args: [])
    gpu.main(["--device", "cpu", "--output_dir", str(tmp_path)])
    assert "| TRL Distillation | out of memory |" in gpu.step_table(
        json.loads((tmp_path / "step-tiny-cpu.json").read_text())["rows"]
    )
    gpu.main(["--device", "cpu", "--output_dir", str(tmp_path), "--seconds", "-1"])
    assert "| TRL Distillation | out of time |" in gpu.step_table(
        json.loads((tmp_path / "step-tiny-cpu.json").read_text())["rows"]
    )
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            gpu.main([])


def test_where_each_arm_of_the_small_reasoner_starts(tmp_path, monkeypatch):
    from scripts.experiments import small

    started = {}

    def train(module, recipe, folder, **options):
        started[folder.name] = {"how": (module.removeprefix("trl_opsd."), Path(recipe).stem), **options}
        return folder

    monkeypatch.setattr(small, "train_stage", train)
    monkeypatch.setattr(small, "train_arm", train)
    monkeypatch.setattr(small, "shortest", lambda rlvr, output: output)
    monkeypatch.setattr(small, "measure", lambda arm, checkpoint, *args: [{"mean_tokens": 100}])
    for arm in small.ARMS:
        small.checkpoint_of(arm, 0, tmp_path, 40, small.POSED)
    sft, rlvr = tmp_path / "sft", tmp_path / "rlvr"
    others = {
        "rlvr": sft,
        small.name_of("OPSD, sibling, second round"): tmp_path / small.name_of("OPSD, sibling"),
        small.name_of("OPSD after GRPO with the length penalty, three times the updates"): (
            tmp_path / small.name_of("GRPO, length penalty")
        ),
        small.name_of("GRPO with the length penalty after OPSD"): tmp_path / small.name_of(small.COMPETENT),
    }
    trained = [small.name_of(arm) for arm, how in small.ARMS.items() if how is not None]
    assert {name: started[name]["model_name_or_path"] for name in ["rlvr", *trained]} == {
        name: others.get(name, rlvr) for name in ["rlvr", *trained]
    }
    how = {small.name_of(arm): how for arm, how in small.ARMS.items() if how is not None}
    for name, (stage, recipe, options) in how.items():
        if stage != "sft":
            assert started[name]["how"] == (stage, recipe) and options.items() <= started[name].items()
    assert {recipe for name, (_, recipe, _) in how.items() if "solution" in name} == {"opsd_solution"}
    assert {recipe for name, (_, recipe, _) in how.items() if "sibling" in name} == {"opsd_sibling"}
    assert {recipe for name, (_, recipe, _) in how.items() if "concise" in name} == {"opsd_concise"}
    assert all(
        "length_reward" in options["reward_funcs"] for name, (*_, options) in how.items() if "GRPO__length" in name
    )
    longer = {name for name in trained if started[name]["max_steps"] == 120}
    assert longer == {name for name in trained if "three_times_the_updates" in name}
    assert started[small.name_of("GRPO, truncated")]["max_completion_length"] == 50
    assert "model_name_or_path" not in started["sft"]


def test_what_is_timed_without_a_mask_is_the_same_as_with_one():
    from argparse import Namespace

    from scripts.benchmarks import attention_mask

    attention_mask.prepare(Namespace(seed=0, hidden_size=128, layers=2, length=48, rows=3, device="cpu"))
    assert len(set(attention_mask.lengths.tolist())) > 1
    assert all(attention_mask.error(way) < 1e-5 for way in attention_mask.WAYS)


def test_what_is_killed_is_told_and_left_as_it_was():
    """Each activity is found under the name it has now, and one within itself counts once."""
    from scripts.experiments import kills
    from trl_opsd import cli, results

    saves = cli.save_final, results.save_final
    told = []
    with kills.told(told.append):
        assert results.save_final is not saves[1]
        with pytest.raises(AttributeError):
            results.save_final(None)
    assert told == ["+saving the model", "-saving the model"]
    assert (cli.save_final, results.save_final) == saves


@pytest.mark.parametrize(
    "name, change",
    [
        ("model.safetensors", lambda run: run["model.safetensors"]["w"].add_(1e-7)),
        ("checkpoint-6/optimizer.pt", lambda run: run["checkpoint-6/optimizer.pt"]["state"][0].add_(1e-7)),
        ("checkpoint-6/optimizer.pt", lambda run: run["checkpoint-6/optimizer.pt"].pop("step")),
        ("opsd.json", lambda run: run["opsd.json"]["rows"].pop(0)),
        ("checkpoint-6/pass_rates.json", lambda run: run["checkpoint-6/pass_rates.json"].update(position=4)),
        (None, lambda run: run["opsd.json"]["rows"][0].update(step_time=9.0)),  # what no run repeats
        (None, lambda run: run["opsd.json"].update(resume_from_checkpoint="checkpoint-3")),
        (None, lambda run: run["checkpoint-5/optimizer.pt"]["state"][0].add_(1)),  # of a step on the way
    ],
)
def test_what_a_continued_run_lost_is_found(tmp_path, name, change):
    import torch
    from safetensors.torch import save_file

    from scripts.experiments import kills

    for folder in ("alone", "continued"):
        run = {
            "model.safetensors": {"w": torch.ones(3)},
            "opsd.json": {"rows": [{"step": 1, "loss": 0.5, "step_time": 1.0, "at": str(tmp_path / folder)}]},
            "checkpoint-6/pass_rates.json": {"position": 3},
            **{f"checkpoint-{step}/optimizer.pt": {"state": [torch.ones(2)], "step": step} for step in (5, 6)},
        }
        if folder == "continued":
            change(run)
        for file, content in run.items():
            path = tmp_path / folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".json":
                path.write_text(json.dumps(content))
            else:
                save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    assert kills.differences(tmp_path / "alone", tmp_path / "continued") == ([f"{name} differs"] if name else [])


def test_the_table_of_kills_counts_those_that_hit():
    from scripts.experiments import kills

    forward, missed, generating = (
        {"activity": activity, "was_running": was_running}
        for activity, was_running in (("forward", True), ("forward", False), ("generating", True))
    )
    rows = [
        {"case": "rlvr", "killed": [forward], "lost": []},
        {"case": "rlvr", "killed": [missed], "lost": []},
        {"case": "rlvr", "killed": [forward, generating, missed], "lost": ["opsd.json differs"]},
        {"case": "rlvr, two processes", "killed": [generating], "lost": []},
        {"case": "tiny", "killed": [generating], "lost": []},
    ]
    table = kills.table(rows)
    assert "| rlvr | 3 | forward 2, generating 1 | 1 |" in table
    assert "| **rlvr** | 4 |  | 1 |" in table and "| **all** | 5 |  | 1 |" in table
    assert kills.kills_of_stage(rows, "rlvr") == 4


def test_growth_and_gaps_of_a_soak():
    from scripts.experiments import soak

    samples = [
        {"segment": segment, "step": step, "memory": 100.0 * segment + 0.02 * step + (50 if step < 150 else 0)}
        for segment, first in ((0, 100), (1, 100), (2, 100))
        for step in range(first, 300)
    ]
    growth, half, processes = soak.slope(samples, "memory")
    # A line through each by itself: they start at different heights, and what warms up is left aside
    assert growth == pytest.approx(20) and half < 1e-6 and processes == 3
    log = [{"step": step, "loss": 0.1, "num_tokens": 10 * step} for step in range(1, 6)]
    assert soak.gaps(log, 5) == []
    assert soak.gaps([*log[:2], *log[3:], {"train_runtime": 1.0, "step": 5}], 5) == ["step 3 is there 0 times"]
    assert soak.gaps([*log, log[-1]], 5) == ["step 5 is there 2 times"]
    assert soak.gaps([*log[:4], {**log[4], "loss": float("nan")}], 5) == ["the loss of step 5 is not finite"]


class TestGeneration:
    """Tokens per second of generation in training: the arithmetic of its rows, and what is not there."""

    BATCHES = [
        {"lengths": [100, 192], "seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak, "extra_mib": 7.0}
        for seconds, cpu, peak in ((10.0, 4.0, 900.0), (20.0, 2.0, 905.4), (40.0, 1.0, 901.0))
    ]

    def test_medians_of_the_processor_and_of_the_clock(self):
        from scripts.benchmarks import generation

        syncs = [{"seconds": 0.5, "cpu_seconds": 0.1}, {"seconds": 0.1, "cpu_seconds": 0.1}]
        row = generation.summary("smollm2", "vLLM, float32", self.BATCHES, [*syncs, syncs[0]], 12.34)
        assert (row["tokens_per_cpu_second"], row["lowest"], row["highest"]) == (146.0, 73.0, 292.0)
        assert (row["tokens_per_second"], row["cpu_seconds"], row["seconds"]) == (14.6, 2.0, 20.0)
        assert (row["mean_length"], row["longest"], row["at_limit"]) == (146.0, 192, 0.5)
        assert (row["sync_seconds"], row["sync_cpu_seconds"], row["peak_mib"]) == (0.5, 0.1, 905)
        before = generation.summary("smollm2", generation.BEFORE, self.BATCHES[:1], [None], 1.0)
        first, second = generation.table([before, row]).splitlines()[2:]
        assert "| 73 (73 to 73) | 1.00 |" in first and "| none |" in first
        assert "| 146 (73 to 292) | 2.00 | 15 | 2.0 (20.0) | 146, 192 | 0.10 (0.50) |" in second

    def test_where_there_is_no_vllm_it_is_said_and_not_left_out(self, tmp_path, monkeypatch, capsys):
        from scripts.benchmarks import generation

        turns = []

        @contextlib.contextmanager
        def told():
            def call(function, way=None, *args):
                turns.append((function.__name__, way))
                return {"start": 1.0, "sync": None, "write": self.BATCHES[0]}[function.__name__]

            yield call

        monkeypatch.setattr(generation, "process", told)
        monkeypatch.setattr(generation, "is_vllm_available", lambda: False)
        generation.main(
            ["--models", "tiny", "--tiny", "somewhere", "--repeats", "2", "--output", str(tmp_path), "--ways", *WAYS]
        )
        rows = json.loads((tmp_path / "tiny.json").read_text())["rows"]
        assert [row["way"] for row in rows] == list(generation.WAYS) == WAYS
        assert ["not_measured" in row for row in rows] == [False, False, True, True]
        # Two starts, then in turns
        assert [way for name, way in turns if name == "write"] == WAYS[:2] * 2
        out = capsys.readouterr().out
        assert "Not measured: vLLM, because vLLM is not installed" in out
        assert "| tiny | vLLM, float32 | not measured: vLLM is not installed" in out


WAYS = ["transformers, before", "transformers, finished rows dropped", "vLLM, float32", "vLLM, bfloat16"]


def run_of(world, method, setting, seed, runs, limits):
    """In the place of a run of time_to_goal: its row, at once."""
    if setting == {"fails": True}:
        raise ZeroDivisionError
    measured = {"step": 1, "cpu_s": 1.0, "accuracy": 0.5, "mean_tokens": 9.0}
    return {
        "method": method,
        "setting": setting,
        "seed": seed,
        "goal": None,
        "start": measured,
        "evaluations": [measured],
    }


def test_a_run_that_fails_and_rows_of_other_calls_lose_nothing(tmp_path, monkeypatch, capsys):
    from scripts.experiments import time_to_goal

    monkeypatch.setattr(time_to_goal, "work", run_of)
    output = tmp_path / "seed-0.json"
    write_results(output, [run_of("long", "GRPO", {"of": "another call"}, 0, "", {})], {})
    settings = [{"fails": True}, {"rate": 2}, {"rate": 1}, {"rate": 2}]
    with pytest.raises(ZeroDivisionError):
        time_to_goal.run_all([(output, "ours", setting, 0) for setting in settings], "long", "", {}, jobs=2)
    rows = json.loads(output.read_text())["rows"]
    assert [row["setting"] for row in rows] == [{"of": "another call"}, {"rate": 2}, {"rate": 1}]
    assert [row.get("jobs") for row in rows] == [None, 2, 2]


def clocked(monkeypatch, limits: dict, lengths: list[float], accuracy: float = 0.01) -> list[dict]:
    """The evaluations of a run of as many steps as there are lengths after them, of ten seconds each, at 80% correct."""
    from scripts.experiments import time_to_goal

    seconds = iter(range(0, 10_000, 10))
    monkeypatch.setattr(time_to_goal.time, "process_time", lambda: float(next(seconds)))
    monkeypatch.setattr(time_to_goal.time, "perf_counter", lambda: 0.0)
    state, control = TrainerState(max_steps=len(lengths)), TrainerControl()
    clock = time_to_goal.Clock(
        lambda model: {"accuracy": 0.8, "mean_tokens": lengths[state.global_step - 1]},
        {"accuracy": 0.82, "mean_tokens": 100.0},
        {"budget": 1000.0, "stay": 1.5, "first": 0.0, "every": 1.5, **limits},
        accuracy,
    )
    clock.on_train_begin(None, state, control)
    for _ in lengths:
        # `go` reads the clock once after each step, so that a step takes ten seconds
        state.global_step += 1
        if clock.on_step_end(None, state, control).should_training_stop:
            break
    return clock.rows


def test_the_time_to_a_goal_is_measured_at_the_end_and_not_before_it_should(monkeypatch):
    rows = clocked(monkeypatch, {}, [100.0] * 7)
    assert [row["step"] for row in rows] == [
        1,
        2,
        3,
        5,
        7,
    ]  # the last is the run's, which the factor would not have measured
    assert [row["cpu_s"] for row in rows] == [10, 20, 30, 50, 70]
    rows = clocked(monkeypatch, {"first": 35.0}, [100.0] * 7)
    assert [row["step"] for row in rows] == [4, 6, 7]
    rows = clocked(monkeypatch, {"budget": 25.0}, [100.0] * 7)
    assert [row["step"] for row in rows] == [1, 2, 3]
    # Half of the tokens from the second step on: it goes on for one and a half times the seconds
    short = [100.0, *[50.0] * 8]
    assert [(row["step"], row["short"], row["goal"]) for row in clocked(monkeypatch, {}, short)][:2] == [
        (1, False, False),
        (2, True, False),  # two points are more than one
    ]
    rows = clocked(monkeypatch, {}, short, accuracy=0.03)
    assert [(row["step"], row["goal"]) for row in rows] == [(1, False), (2, True), (3, True), (4, True)]
