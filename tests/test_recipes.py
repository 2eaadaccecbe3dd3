"""The recipes for real models: their commands, run on models of the same architecture, and their arithmetic."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_hub
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.data import load_prompts
from trl_opsd.rlvr.bank import RolloutBank, prompt_id
from trl_opsd.rlvr.identity import Writer, hash_vocabulary, hash_weights


ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.name for path in ROOT.glob("recipes/*.yaml"))
ANSWERS = {f"What is {a} + {b}?": a + b for a in range(1, 7) for b in range(1, 7)}
# What makes any of them small and fit for a CPU. A recipe's other values are its own
SMALL = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 16,
    "max_tokens_per_microbatch": 512,
    "steps_per_generation": 2,
    "soft_punish_cache": 8,
    "bf16": "false",
    "save_steps": 1,
    "calibration_samples": 8,
    "max_samples": 2,
    "batch_size": 4,
}


def command_of(recipe: str) -> list[str]:
    """The command in the head of a recipe, as words."""
    head = (ROOT / "recipes" / recipe).read_text().split("\n\n")[0].replace("\\\n#", " ")
    (line,) = re.findall(rf"^#   ((?:python|accelerate) .*--config recipes/{recipe}.*)$", head, re.MULTILINE)
    return shlex.split(line)


def small(recipe: str, **changes) -> list[str]:
    """Options that make a run of a recipe small: those of `SMALL` that the recipe has, and what a CPU needs."""
    config = yaml.safe_load((ROOT / "recipes" / recipe).read_text())
    options = {key: value for key, value in SMALL.items() if key in config}
    if "use_vllm" in config:
        options |= {"use_vllm": "false"}
    if "bf16" in config:
        options |= {"use_cpu": "true"}
    if config.get("num_generations") == 8 and "steps_per_generation" not in config:
        options |= {"gradient_accumulation_steps": 2}  # so that a group fills a generation
    return small_options(**{**options, **changes})


def small_options(**options) -> list[str]:
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A working folder in which the names of the recipes are those of things that were built here."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    # The template of Qwen3, and of its 151,669 tokens a few hundred
    names = dict.fromkeys(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    added = dict.fromkeys(["<think>", "</think>"])
    tokenizer = lambda: tiny_hub.make_tokenizer("qwen3", "<|im_end|>", "<|endoftext|>", names, added=added)  # noqa: E731
    build = tiny_hub.text_model(
        "Qwen3ForCausalLM", tokenizer, tie_word_embeddings=True, hidden_size=64, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_hidden_layers=4, intermediate_size=128,
    )  # fmt: skip
    build(folder / "Qwen" / "Qwen3-1.7B")
    raw = {
        "open-r1/DAPO-Math-17k-Processed/en": [
            {"prompt": problem, "solution": str(answer)} for problem, answer in ANSWERS.items()
        ],
        "google-research-datasets/mbpp/full": [
            {
                "text": problem,
                "code": "def f():\n    return 1",
                "test_list": ["assert f() == 1"],
                "test_setup_code": "",
            }
            for problem in ANSWERS
        ],
        "openai/gsm8k/main": [
            {"question": problem, "answer": f"Add.\n#### {answer}"} for problem, answer in ANSWERS.items()
        ],
    }
    for name, rows in raw.items():
        target, _, config = name.rpartition("/")
        (folder / target / config).mkdir(parents=True)
        for split in ("train", "test"):
            Dataset.from_list(rows).to_parquet(folder / target / config / f"{split}.parquet")
        lines = ["---", "configs:", f"- config_name: {config}", "  data_files:"]
        lines += [f"  - {{split: {split}, path: {config}/{split}.parquet}}" for split in ("train", "test")]
        (folder / target / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def train_of(hub: Path, recipe: str, output: Path) -> list[str]:
    """The words of a run: the command of the recipe, made small, with what it starts from where that was built."""
    config = yaml.safe_load((hub / "recipes" / recipe).read_text())
    changes = {"output_dir": output} if "output_dir" in config else {"output": output / "results.json"}
    changes |= {"probe_prompts": 0} if "teacher_weights" in config else {}
    if recipe == "recover.yaml":
        changes |= {"max_steps": 2}
    if recipe == "evaluate.yaml":
        changes |= {
            "backend": "transformers",
            "tasks": "gsm8k",
            "checkpoints": "base=Qwen/Qwen3-1.7B",
            "dtype": "float32",
        }
        changes |= {"max_samples": 2, "max_completion_length": 16}
    if config.get("gate") == "correct":
        changes |= {"gate": "all"}  # an untrained model is never right
    return [*command_of(recipe), *small(recipe, **changes)]


def check_output(recipe: str, output: Path) -> None:
    """A run has left what the next one takes."""
    if recipe == "evaluate.yaml":
        assert (output / "results.json").is_file()
    elif "lora" in recipe:
        assert (output / "adapter_config.json").is_file()
    else:
        assert AutoModelForCausalLM.from_pretrained(output).config.model_type == "qwen3"
    if recipe.startswith("rlvr"):
        assert (output / "bank" / "bank.json").is_file()


#: What takes something that another recipe leaves runs after it, below: in this order.
CHAIN = ["prune.yaml", "recover.yaml", "opsd_pruned.yaml"]
FIRST = [name for name in RECIPES if name not in (*CHAIN, "opsd_bank.yaml")]


def run_here(hub: Path, words: list[str], monkeypatch) -> None:
    """Runs a command line in this process: the file, the options, the whole run. The launcher is left out."""
    module, arguments = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    monkeypatch.chdir(hub)
    try:
        importlib.import_module(f"{module}.__main__").main(list(map(str, arguments)))
    except SystemExit as end:
        assert end.code in (None, 0)


#: Those that differ from these in the data, or in the number of GPUs, alone are left to the slow tests, which run all.
QUICK = ["evaluate.yaml", "opsd.yaml", "rlvr.yaml", "rlvr_code_1gpu_lora.yaml", "rlvr_math_8gpu.yaml"]


@pytest.mark.parametrize("recipe", QUICK)
def test_the_command_of_a_recipe_runs(hub, tmp_path, monkeypatch, recipe):
    run_here(hub, train_of(hub, recipe, tmp_path / "out"), monkeypatch)
    check_output(recipe, tmp_path / "out")


@pytest.fixture
def after_rlvr(hub, tmp_path, monkeypatch):
    """A working folder as recipes/rlvr.yaml leaves it, with a bank of what an untrained model would never write."""
    for path in hub.iterdir():
        (tmp_path / path.name).symlink_to(path)
    teacher = tmp_path / "runs" / "rlvr"
    shutil.copytree(hub / "Qwen" / "Qwen3-1.7B", teacher)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    bank = RolloutBank(teacher / "bank", 1, Writer("me", hash_weights(str(teacher)), hash_vocabulary(tokenizer)))
    monkeypatch.chdir(tmp_path)
    rollouts, attempts = [], {}
    for row in load_prompts("dapo-math-17k"):
        text = f"<think>\nI add.\n</think>\n\n\\boxed{{{row['answer']}}}"
        attempts[prompt_id(row["prompt"])] = (1, 1)
        rollouts.append(
            {
                "prompt_id": prompt_id(row["prompt"]),
                "prompt": row["prompt"],
                "completion": [{"role": "assistant", "content": text}],
                "completion_ids": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id],
                "reward": 1.0,
            }
        )
    bank.add(0, rollouts, attempts)
    return tmp_path


def small_chain(folder: Path, recipe: str) -> list[str]:
    """As [`train_of`], with the folders that the recipe itself names."""
    changes = {"max_completion_length": 128} if recipe == "recover.yaml" else {}
    config = yaml.safe_load((ROOT / "recipes" / recipe).read_text())
    return [*train_of(folder, recipe, Path(config["output_dir"])), *small_options(**changes)]


def check_chain(folder: Path) -> None:
    sizes = [AutoModelForCausalLM.from_pretrained(folder / "runs" / name).num_parameters() for name in
             ("rlvr", "pruned", "recovered", "opsd_pruned")]  # fmt: skip
    assert abs(1 - sizes[1] / sizes[0] - 0.5) <= 0.01 and len(set(sizes[1:])) == 1
    weights = [hash_weights(str(folder / "runs" / name)) for name in ("pruned", "recovered")]
    assert weights[0] != weights[1]
    logs = json.loads((folder / "runs" / "recovered" / "opsd.json").read_text())["rows"]
    assert logs[0]["opsd/kl"] > 0  # on the rollouts of the bank, without a verifier


def test_pruning_recovering_and_distilling_run_in_order(after_rlvr, monkeypatch):
    for recipe in CHAIN:
        run_here(after_rlvr, small_chain(after_rlvr, recipe), monkeypatch)
    check_chain(after_rlvr)


def test_solutions_of_a_bank_run(after_rlvr, monkeypatch):
    run_here(after_rlvr, small_chain(after_rlvr, "opsd_bank.yaml"), monkeypatch)
    check_output("opsd_bank.yaml", after_rlvr / "runs" / "opsd_bank")


@pytest.mark.slow
def test_the_command_lines_of_pruning_recovering_and_distilling_end_well(after_rlvr):
    for recipe in CHAIN:
        run(after_rlvr, small_chain(after_rlvr, recipe))
    check_chain(after_rlvr)


def test_each_recipe_names_the_next_one_and_takes_what_the_last_one_leaves():
    configs = {name: yaml.safe_load((ROOT / "recipes" / name).read_text()) for name in RECIPES}
    for folder, rlvr in (("", "rlvr.yaml"), ("tiny/", "tiny/rlvr.yaml")):
        teacher = yaml.safe_load((ROOT / "recipes" / rlvr).read_text())["output_dir"]
        prune, recover, opsd = (yaml.safe_load((ROOT / "recipes" / folder / name).read_text()) for name in CHAIN)
        assert prune["model_name_or_path"] == teacher and prune["calibration_dataset"] == f"{teacher}/bank"
        assert recover["model_name_or_path"] == prune["output_dir"] and recover["dataset_name"] == f"{teacher}/bank"
        assert opsd["model_name_or_path"] == recover["output_dir"]
        assert recover["teacher_model_name_or_path"] == opsd["teacher_model_name_or_path"] == teacher
        heads = [(ROOT / "recipes" / folder / name).read_text().split("\n\n")[0] for name in CHAIN]
        assert all(f"recipes/{folder}{name}" in heads[0] for name in CHAIN[1:])
    assert configs["recover.yaml"]["max_completion_length"] >= configs["rlvr.yaml"]["max_completion_length"]
    assert set(RECIPES) == {*FIRST, *CHAIN, "opsd_bank.yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FIRST)
def test_the_command_line_of_a_recipe_ends_well(hub, tmp_path, recipe):
    run(hub, train_of(hub, recipe, tmp_path / "out"))
    check_output(recipe, tmp_path / "out")


@pytest.mark.vllm
@pytest.mark.parametrize(
    "recipe", [name for name in FIRST if "\nuse_vllm: true" in (ROOT / "recipes" / name).read_text()]
)
def test_the_command_line_of_a_recipe_ends_well_with_vllm(hub, tmp_path, recipe):
    # A CPU has no memory of a GPU to free
    here = ["--use_vllm", "true", "--vllm_max_model_length", "256", "--vllm_enable_sleep_mode", "false"]
    run(hub, [*train_of(hub, recipe, tmp_path / "out"), *here])
    check_output(recipe, tmp_path / "out")


def run(folder: Path, words: list[str]) -> str:
    """Runs a command line in a folder, with the programs of this environment, and looks at its exit status."""
    program, *rest = map(str, words)
    if "--num_processes" in rest:  # on a CPU there is one, and more are refused
        rest[rest.index("--num_processes") + 1] = "1"
    programs = {"python": [sys.executable], "accelerate": [sys.executable, "-m", "accelerate.commands.accelerate_cli"]}
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [*programs[program], *rest], cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


# The arithmetic

GIB = 2**30
PARAMETERS = 1_720_574_976  # of Qwen3-1.7B, embeddings tied
CACHED_BYTES = 28 * 2 * 8 * 128 * 2  # layers, keys and values, heads, width, bfloat16: of a token
GPU, OTHER = 79.2, 2.5  # GiB of an H100 of 80 GB, and what an engine holds beside weights and cache


def memory(recipe: str) -> list[str]:
    """A row of the table of recipes/README.md."""
    config = yaml.safe_load((ROOT / "recipes" / recipe).read_text())
    share = 0.5 if recipe == "opsd_pruned.yaml" else 1.0  # of the parameters, in the student
    named = re.search(r"--num_processes (\d)", " ".join(command_of(recipe)))
    steps = config.get("steps_per_generation", config["gradient_accumulation_steps"])
    rollouts = config["per_device_train_batch_size"] * steps
    engine = config["vllm_gpu_memory_utilization"] * GPU
    cached = (engine - 2 * share * PARAMETERS / GIB - OTHER) * GIB / CACHED_BYTES  # of the teacher, if it was pruned
    if config.get("use_peft"):
        kept, trained = 2 * PARAMETERS, 2 * PARAMETERS
    else:
        kept, trained = 12 * share * PARAMETERS, 16 * share * PARAMETERS  # float32 with AdamW; and gradients
    if "teacher_weights" in config:
        teacher = (2 if config["teacher_weights"] == "external" else 4) * PARAMETERS
        kept, trained = kept + teacher, trained + teacher
    assert engine + kept / GIB < GPU - 8, "nothing would be left for what is not counted"
    return [
        f"`{recipe}`",
        f"{int(named[1]) if named else 1}",
        f"{config['vllm_gpu_memory_utilization']}",
        f"{cached / 1e3:.0f}k",
        f"{rollouts}",
        f"{min(cached / rollouts, config['max_completion_length']):,.0f}",
        f"{engine + kept / GIB:.0f}",
        f"{trained / GIB:.0f}",
    ]


def test_the_memory_that_the_readme_states_is_that_of_the_recipes():
    page = (ROOT / "recipes" / "README.md").read_text()
    wanted = [name for name in RECIPES if "use_vllm" in (ROOT / "recipes" / name).read_text()]
    assert len(wanted) == 9
    for name in wanted:
        assert "| " + " | ".join(memory(name)) + " |" in page, memory(name)


@pytest.mark.slow
def test_the_tiny_reasoner_comes_back(tmp_path):
    """The recipes of the tiny reasoner in order, with their command lines: half of it, as right as before, and shorter."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for recipe in ("sft", "rlvr", "prune", "recover", "opsd_pruned"):
        head = (ROOT / "recipes" / "tiny" / f"{recipe}.yaml").read_text()
        (command,) = re.findall(
            rf"^#   .*?((?:python|accelerate) .*--config recipes/tiny/{recipe}\.yaml)$", head, re.MULTILINE
        )
        run(tmp_path, [*shlex.split(command), *(["--max_steps", "40"] if recipe == "rlvr" else [])])
    names = ("rlvr", "pruned", "recovered", "opsd_pruned")
    words = ["python", "-m", "trl_opsd.evaluate", "--config", "recipes/tiny/evaluate.yaml", "--prompt_only", "false"]
    words += ["--dataset_name", "runs/tiny/sft/data", "--max_samples", "512", "--decoding", "sampled"]
    run(
        tmp_path,
        [*words, "--output", "results.json", "--checkpoints", *(f"{name}=runs/tiny/{name}" for name in names)],
    )
    rows = {row["stage"]: row for row in json.loads((tmp_path / "results.json").read_text())["rows"]}
    assert rows["opsd_pruned"]["parameters"] < 0.52 * rows["rlvr"]["parameters"]
    assert rows["rlvr"]["accuracy"] > 0.95 and rows["pruned"]["accuracy"] < 0.3
    assert rows["recovered"]["accuracy"] > 0.8
    assert rows["opsd_pruned"]["accuracy"] > 0.85
    assert rows["opsd_pruned"]["mean_tokens"] < 0.7 * rows["recovered"]["mean_tokens"]
