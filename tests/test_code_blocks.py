"""Every code block of every page is executed: here, or by the test that is named beside it, with the reason."""

import ast
import dataclasses
import functools
import importlib
import re
import shlex
import shutil
from pathlib import Path

import pytest
import trl
import yaml
from datasets import Dataset, load_dataset
from test_docs import WRITTEN, blocks, name_of
from test_recipes import hub, run, small_options  # noqa: F401  (`hub` is a fixture)
from trl.experimental.gkd import GKDConfig
from trl.experimental.sdft import SDFTConfig
from trl.experimental.sdpo import SDPOConfig

import trl_opsd
from trl_opsd import OPSDConfig, OPSDTrainer, cli


ROOT = Path(__file__).parents[1]
PAGES = {name_of(page): page for page in WRITTEN}

#: Blocks in no language that is executed, by how they begin
NOT_CODE = {
    "SFT ──► RLVR": "a picture of the chain",
    "CUDA_VISIBLE_DEVICES=4": "needs a GPU that sends its weights by NCCL; its options are vLLM's and not ours",
}

#: Command lines that are not run here, and who runs them
ELSEWHERE = {
    "bash scripts/quickstart.sh": "the second line of the page of `compress`, after a set-up of minutes",
    "bash scripts/test.sh": "runs this test",
    "python -m trl_opsd.tiny --config recipes/tiny/sft.yaml": "tests/test_recipes.py::test_the_tiny_reasoner_comes_back",
    "python -m trl_opsd.compress --config recipes/tiny/compress.yaml --smoke": (
        "tests/test_compress.py::test_a_smoke_run_says_so, with stages that write at once"
    ),
    "python -m trl_opsd.compress --config recipes/tiny/compress.yaml": "the same in minutes",
    "python -m trl_opsd.compress --config recipes/tiny/size.yaml": "tests/test_compress_size.py; the whole takes an hour",
    "python -m trl_opsd.prune --config recipes/prune.yaml --model_name_or_path runs/rlvr --target_ratio 0.5": (
        "tests/test_recipes.py::test_pruning_recovering_and_distilling_run_in_order"
    ),
    "accelerate launch --num_processes 4 -m trl_opsd.opsd --config recipes/recover.yaml": (
        "tests/test_recipes.py::test_pruning_recovering_and_distilling_run_in_order"
    ),
    "accelerate launch --num_processes 4 -m trl_opsd.opsd --config recipes/opsd_pruned.yaml": (
        "tests/test_recipes.py::test_pruning_recovering_and_distilling_run_in_order"
    ),
    "accelerate launch --config_file recipes/accelerate_configs/fsdp2.yaml -m trl_opsd.opsd --config recipes/opsd.yaml "
    "--probe_prompts 0": "tests/test_sharded.py::test_the_tested_configuration_is_the_one_for_gpus, and on GPUs nobody",
    "accelerate launch --config_file recipes/accelerate_configs/fsdp2.yaml --num_processes 8 -m trl_opsd.opsd --config "
    "recipes/opsd.yaml --model_name_or_path YOUR/MODEL --gradient_accumulation_steps 4 --dtype bfloat16 --probe_prompts 0": (
        "tests/test_what_fits.py plans it, tests/test_sharded.py trains by the file for CPUs, and on GPUs nobody"
    ),
    "accelerate launch --config_file recipes/accelerate_configs/fsdp2.yaml --num_processes 8 -m trl_opsd.opsd --config "
    "recipes/opsd_pruned.yaml --teacher_model_name_or_path YOUR/MODEL --gradient_accumulation_steps 4 --dtype bfloat16 "
    "--probe_prompts 0": "tests/test_what_fits.py, the same",
    "accelerate launch --config_file recipes/accelerate_configs/cpu_ddp.yaml --main_process_port 0 -m trl_opsd.opsd "
    "--config recipes/tiny/opsd.yaml --ddp_backend gloo": "tests/test_sharded.py, which launches by the same files",
    "accelerate launch --config_file recipes/accelerate_configs/cpu_zero3.yaml --main_process_port 0 -m trl_opsd.opsd "
    "--config recipes/tiny/opsd.yaml --ddp_backend gloo --probe_prompts 0": "needs the extra `deepspeed`: tests/test_sharded.py",
    "python -m trl_opsd.compress --model_name_or_path YOUR/MODEL --dataset_name gsm8k --max_accuracy_drop 0.01": (
        "tests/test_compress_auto.py, with data and measurements that are built"
    ),
    "python -m trl_opsd.compress --model_name_or_path runs/rlvr --dataset_name gsm8k --max_accuracy_drop 0.01": (
        "tests/test_compress_auto.py, the same"
    ),
    "python -m trl_opsd.export --formats gguf --model_name_or_path runs/smollm2 --output_dir runs/export-smollm2 "
    "--margin 0.1 --dataset_name recipes/results/export/boxed_sums.jsonl --task boxed-sums --max_completion_length 24 "
    "--conversion_tokens 16 --licence apache-2.0": "tests/test_export.py, slow: minutes, and an environment of its own",
    "python -m trl_opsd.export --model_name_or_path runs/opsd --tasks 'gsm8k[:500]' --formats safetensors gguf openvino onnx "
    "--output_dir runs/export": "tests/test_export.py, slow: the same",
    "python -m trl_opsd.export --model_name_or_path runs/opsd --tasks 'gsm8k[:500]' --formats w8a8 fp8 w4a16 tensorrt-llm "
    "--bank runs/opsd-bank --output_dir runs/export": "tests/test_export.py, slow: the same",
    "python -m trl_opsd.evaluate --backend server --checkpoints before=runs/rlvr after=runs/opsd --tasks 'gsm8k[:256]' "
    "--concurrency 1 8 64 --serving_requests 128 --output runs/served/results.json": (
        "tests/test_evaluate_runs.py::TestStartedServer, and in the tier of vLLM tests/test_evaluate_vllm.py"
    ),
    "python -m trl_opsd.evaluate --config recipes/small/evaluate.yaml --backend server --dtype bfloat16 --max_samples 64 "
    "--checkpoints before=runs/smollm2-cpu/rlvr/start after=runs/smollm2-cpu/export/safetensors-bfloat16 --dataset_name "
    "runs/smollm2-cpu/sft/data --max_completion_length 256 --concurrency 1 8 64 --serving_requests 64 --vllm_kwargs "
    """'{"gpu_memory_utilization": 0.2, "max_model_len": 1024}' --output runs/smollm2-cpu/served.json""": (
        "tests/test_evaluate_runs.py::TestStartedServer, the same"
    ),
    "python -m trl_opsd.export --formats safetensors openvino onnx gguf w8a8 fp8 w4a16 --model_name_or_path runs/smollm2-cpu/opsd "
    "--dataset_name runs/smollm2-cpu/sft/data --dataset_split test --task sums-equations --reward_funcs math_reward "
    "--max_completion_length 256 --margin 0.03 --licence apache-2.0 --bank runs/smollm2-cpu/bank --output_dir "
    "runs/smollm2-cpu/export": "tests/test_export.py, slow: the same",
    "python -m trl_opsd.small --config recipes/small/sft.yaml": "tests/test_small.py, two steps of it; the whole takes hours",
    "python -m trl_opsd.plan --config recipes/opsd.yaml": "tests/test_plan.py, with configurations that are built",
    "python -m trl_opsd.plan --config recipes/opsd.yaml --model_name_or_path Qwen/Qwen3-8B --accelerate_config "
    "recipes/accelerate_configs/fsdp2.yaml": "tests/test_plan.py::test_eight_gpus_that_share_it_are_enough",
}

#: What makes a command line small, by its module. Options of ours that it has already are given again, and the last counts
TRAINS = {
    "use_cpu": "true",
    "bf16": "false",
    "use_vllm": "false",
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 16,
    "save_strategy": "no",
}
MEASURES = {
    "backend": "transformers",
    "dtype": "float32",
    "max_samples": 2,
    "max_completion_length": 16,
    "batch_size": 4,
}
SMALL = {
    "trl_opsd.opsd": {**TRAINS, "gate": "all", "probe_prompts": 0, "max_tokens_per_microbatch": 512},
    "trl_opsd.rlvr": {**TRAINS, "steps_per_generation": 2, "gradient_accumulation_steps": 2, "soft_punish_cache": 8},
    "trl_opsd.prune": {"calibration_samples": 4, "max_completion_length": 8, "batch_size": 4, "dtype": "float32"},
    "trl_opsd.evaluate": MEASURES,
    "trl_opsd.compress.bank": MEASURES,
    "trl_opsd.data": {},
    "trl.scripts.sft": {"max_steps": 1, "max_length": 64},
    "trl.scripts.grpo": {
        **{name: TRAINS[name] for name in ("use_cpu", "bf16", "max_steps", "max_completion_length", "save_strategy")},
        "per_device_train_batch_size": 8,
        "report_to": "none",
    },
}
#: Those that take seconds and differ from a recipe's own command, which tests/test_recipes.py runs, by little
SLOW = ("trl_opsd.rlvr", "trl_opsd.opsd", "trl_opsd.prune", "trl.scripts.sft", "trl.scripts.grpo")


def lines(page: Path) -> list[str]:
    """The command lines of a page's blocks, without variables and comments."""
    found = []
    for text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                found.append(shlex.join(words))
    return found


def module_of(words: list[str]) -> str:
    return f"trl.scripts.{words[1]}" if words[0] == "trl" else words[words.index("-m") + 1]


def arguments_of(words: list[str]) -> list[str]:
    return words[2:] if words[0] == "trl" else words[words.index("-m") + 2 :]


HERE = [(name, line) for name, page in PAGES.items() for line in lines(page) if line not in ELSEWHERE]


def test_every_block_is_executed_or_listed():
    for name, page in PAGES.items():
        for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
            assert kind in ("bash", "python", "yaml", "json") or text.startswith(tuple(NOT_CODE)), (name, text)
            # tests/test_docs.py::test_example_rows_are_rows reads the rows, and no other page has any
            assert kind != "json" or name == "trl_opsd/data/README.md"
    every = {line for page in PAGES.values() for line in lines(page)}
    assert set(ELSEWHERE) <= every, "a line that is listed is on no page"
    new = {line for _, line in HERE if module_of(shlex.split(line)) not in SMALL}
    assert not new, "say in SMALL how to make these small, or in ELSEWHERE who runs them"


def test_who_runs_the_others_is_there():
    for reason in ELSEWHERE.values():
        for file, test in re.findall(r"(tests/\w+\.py)(?:::(\w+))?", reason):
            assert re.search(rf"(def|class) {test}\b", (ROOT / file).read_text()), reason


@pytest.fixture(scope="module")
def world(hub):  # noqa: F811
    """The folder of tests/test_recipes.py, with the names of the pages in it, too."""
    built = hub / "Qwen" / "Qwen3-1.7B"
    (hub / "scripts").symlink_to(ROOT / "scripts")
    (hub / "YOUR").mkdir()
    (hub / "YOUR" / "MODEL").symlink_to(built)
    for name in ("rlvr", "opsd", "tiny/pruned"):
        (hub / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(built, hub / "runs" / name)
    sums = [(a, b) for a in range(1, 13) for b in range(1, 11)]
    data = {
        "HuggingFaceH4/MATH-500/test": [
            {"problem": f"What is {a} plus {b}?", "answer": f"{a + b}", "solution": f"{a + b}"} for a, b in sums
        ],
        "trl-lib/DeepMath-103K/train": [
            {"prompt": [{"role": "user", "content": f"{a} + {b}"}], "solution": f"${a + b}$"} for a, b in sums[:8]
        ],
        "YOUR/DATA/train": [
            {"prompt": [{"role": "user", "content": f"{a} + {b}"}], "answer": f"{a + b}"} for a, b in sums[:8]
        ],
        "runs/tiny/rlvr/bank/rollouts/train": [
            {
                "prompt": [{"role": "user", "content": f"{a} + {b}"}],
                "completion": [{"role": "assistant", "content": f"{a + b}"}],
            }
            for a, b in sums[:64]
        ],
    }
    for name, rows in data.items():
        folder, _, split = name.rpartition("/")
        (hub / folder).mkdir(parents=True)
        Dataset.from_list(rows).to_json(hub / folder / f"{split}.jsonl")
    return hub


def small(words: list[str]) -> list[str]:
    module, arguments = module_of(words), arguments_of(words)
    if {"--compare", "--report", "--card"} & set(arguments):
        return arguments
    options = dict(SMALL[module])
    if module == "trl_opsd.opsd" and "--gate" not in arguments:
        options["output_dir"] = "runs/from_a_page"
    if module == "trl_opsd.rlvr":
        options["output_dir"] = "runs/rlvr_from_a_page"
    return [*arguments, *small_options(**options)]


def execute(world: Path, line: str, monkeypatch) -> None:
    """Runs a command line of ours in this process; the launcher is left out."""
    words = shlex.split(line)
    monkeypatch.chdir(world)
    module = importlib.import_module(module_of(words))
    main = (
        module.main
        if module_of(words).endswith(".bank")
        else importlib.import_module(f"{module.__name__}.__main__").main
    )
    try:
        main(small(words))
    except SystemExit as end:
        # Of a comparison 1 and 3 are verdicts: worse, and undecided
        assert end.code in ((0, 1, 3) if "--compare" in words else (None, 0)), line


@pytest.mark.parametrize("page", ["trl_opsd/data/README.md", "README.md", "trl_opsd/evaluate/README.md"])
def test_what_measures_and_reads_runs(world, monkeypatch, page):
    """In the order of the page: each line takes what the one before it has left."""
    shutil.rmtree(world / "runs" / "evaluation", ignore_errors=True)
    quick = ("trl_opsd.data", "trl_opsd.evaluate")
    ran = [line for name, line in HERE if name == page and module_of(shlex.split(line)) in quick]
    assert len(ran) >= 2
    for line in ran:
        execute(world, line, monkeypatch)
    if page.endswith("evaluate/README.md"):
        assert (world / "runs" / "report" / "report.html").is_file() and (
            world / "runs" / "opsd" / "README.md"
        ).is_file()
    elif page == "README.md":
        assert (world / "runs" / "evaluation" / "results.json").is_file()
    else:
        assert (world / "runs" / "train.jsonl").is_file()


@pytest.mark.parametrize("line", sorted({line for _, line in HERE if "compress.bank" in line}))
def test_a_bank_by_itself_runs(world, monkeypatch, line):
    execute(world, line, monkeypatch)
    words = shlex.split(line)
    assert (world / words[words.index("--output") + 1]).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name, line", [pair for pair in HERE if module_of(shlex.split(pair[1])) in SLOW])
def test_what_trains_ends_well(world, name, line):
    """As a person types it, in a process of its own."""
    words = shlex.split(line)
    if "runs/grpo" in words[-1:] or "--model_name_or_path runs/grpo" in line or "runs/small" in line:
        for folder in ("grpo", "small"):  # what the line above it on the page leaves
            shutil.copytree(world / "runs" / "rlvr", world / "runs" / folder, dirs_exist_ok=True)
    run(world, ["python", "-m", module_of(words), *small(words)])


@pytest.mark.parametrize("name, line", [pair for pair in HERE if module_of(shlex.split(pair[1])) in SLOW[:3]])
def test_what_trains_is_understood(world, monkeypatch, name, line):
    """By the parser of its stage, with the recipe that it names and every value in it."""
    words = shlex.split(line)
    monkeypatch.chdir(world)
    stage = importlib.import_module(f"{module_of(words)}.__main__")
    here = [] if module_of(words) == "trl_opsd.prune" else ["--use_cpu", "true", "--bf16", "false"]
    assert cli.parse(stage.ARGUMENTS, [*arguments_of(words), *here])


# Python


@pytest.fixture
def small_by_default(monkeypatch):
    """Configurations as the pages write them, with what makes them small where a page says nothing of it."""
    small = {
        "max_steps": 1,
        "max_completion_length": 16,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
    }
    monkeypatch.setattr(trl_opsd, "OPSDConfig", functools.partial(OPSDConfig, **small))
    monkeypatch.setattr(trl, "GRPOConfig", functools.partial(trl.GRPOConfig, **small))


def run_python(page: Path, names: dict) -> None:
    """Runs the blocks of a page, one after the other; what a comment behind the last line says has to come out."""
    for text in blocks(page, "python"):
        *statements, last = ast.parse(text).body
        exec(compile(ast.Module(statements, []), str(page), "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), str(page), "eval"), names)
            comment = text.strip().splitlines()[-1].partition("  # ")[2]
            assert not comment or value == ast.literal_eval(comment)
        else:
            exec(compile(ast.Module([last], []), str(page), "exec"), names)


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if blocks(page, "python")])
def test_python_runs_from_the_top_of_a_page_to_its_end(world, monkeypatch, small_by_default, name):
    monkeypatch.chdir(world)
    names = {"dataset": load_dataset("trl-lib/DeepMath-103K", split="train")} if name == "README.md" else {}
    run_python(PAGES[name], names)
    if "trainer" in names:
        assert isinstance(names["trainer"], OPSDTrainer) and names["trainer"].state.global_step == 1


def test_a_block_that_says_something_else_is_found(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("```python\nanswer = 42\nanswer + 1  # 43\n```\n")
    run_python(page, {})
    page.write_text("```python\nanswer = 42\nanswer + 1  # 44\n```\n")
    with pytest.raises(AssertionError):
        run_python(page, {})


def test_the_example_of_the_class_is_that_of_its_page():
    lines = [line.strip()[4:] for line in OPSDTrainer.__doc__.splitlines() if line.strip()[:4] in (">>> ", "... ")]
    (page, *_) = blocks(PAGES["trl_opsd/opsd/README.md"], "python")
    assert ast.dump(ast.parse("\n".join(lines))) == ast.dump(ast.parse(page))


# YAML


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if blocks(page, "yaml")])
def test_yaml_is_a_recipe(world, monkeypatch, tmp_path, name):
    """That it does what it says: tests/test_opsd_offload.py."""
    monkeypatch.chdir(world)
    stage = importlib.import_module("trl_opsd.opsd.__main__")
    for number, text in enumerate(blocks(PAGES[name], "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text + "use_cpu: true\nbf16: false\noutput_dir: out\n")
        parsed = cli.parse(stage.ARGUMENTS, ["--config", str(file)])
        values = {name: value for part in parsed for name, value in vars(part).items()}
        for key, value in yaml.safe_load(text).items():
            assert values[key] == value


# From TRL's trainers


def test_the_table_of_other_trainers_names_their_options_and_ours():
    text = PAGES["recipes/README.md"].read_text().partition("## From TRL's trainers\n")[2].partition("\n## ")[0]
    (table,) = re.findall(r"^\| from \|.*\n\|---.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    theirs = {
        "DistillationTrainer": trl.DistillationConfig,
        "GKDTrainer": GKDConfig,
        "SDFTTrainer": SDFTConfig,
        "SDPOTrainer": SDPOConfig,
    }
    options = {name: {field.name for field in dataclasses.fields(config)} for name, config in theirs.items()}
    own = {field.name for field in dataclasses.fields(OPSDConfig)} | {"teacher_model_name_or_path"}
    trainer, seen = None, set()
    for row in table.splitlines():
        source, there, here = (re.findall(r"`(\w+)`", cell) for cell in row.split("|")[1:4])
        trainer = source[0] if source else trainer
        seen.add(trainer)
        assert set(there) <= options[trainer] and set(here) <= own, row
    assert seen == set(theirs)
