import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from kernels import KEEPS_SCORES
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from scripts.benchmarks.memory_plan import planned
from trl_opsd.plan.__main__ import main
from trl_opsd.plan.memory import Training, activations, cache_bytes, parts


ROOT = Path(__file__).parents[1]
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES),
    # Scores that SDPA cannot cap, and experts
    "gemma2": Gemma2Config(**SIZES),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}


def training(config=CONFIGS["qwen3"], **changes) -> Training:
    fields = {
        "student": config,
        "teacher": None,
        "dtype": torch.float32,
        "teacher_dtype": torch.float32,
        "autocast": False,
        "peft_config": None,
        "gradient_checkpointing": False,
        "rows": 3,
        "length": 40,
        "completion": 30,
        "several": False,
        "device": "cpu",
    }
    return Training(**fields | changes)


def really_kept(config, rows: int, length: int, autocast: bool, peft_config) -> int:
    """Bytes that autograd keeps of a forward with data, of every layer, in the trainer's form: without a mask."""
    # Where scores are capped all of them are kept; transformers 5.17 would not cap them by itself
    capped = "eager" if config.model_type == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=capped)
    if peft_config is not None:
        model = get_peft_model(model, peft_config).get_base_model()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(),
    ):
        out = model.get_decoder()(input_ids=torch.zeros((rows, length), dtype=torch.long), use_cache=False)
    del out
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_activations_are_those_that_autograd_keeps(name, lora, autocast):
    peft_config = LoraConfig(r=4, target_modules="all-linear") if lora else None
    found = activations(training(CONFIGS[name], peft_config=peft_config, autocast=autocast))
    assert found == pytest.approx(really_kept(CONFIGS[name], 3, 40, autocast, peft_config), rel=0.002)


def test_a_gpu_keeps_no_scores():
    # Whatever torch's kernel is on a CPU: that of 2.8 keeps them where heads share keys and values
    one, two = (activations(training(length=length, device="cuda")) for length in (512, 1024))
    assert two == pytest.approx(2 * one, rel=0.01)
    # The layers of a GPU keep what those of a CPU do, where it has a kernel without scores too
    assert activations(training(device="cuda")) <= activations(training(device="cpu"))


def test_activations_grow_with_rows_and_layers_and_not_with_checkpointing():
    one, two = (activations(training(rows=rows)) for rows in (1, 2))
    assert activations(training(rows=1.5)) == pytest.approx((one + two) / 2)
    few = activations(training(rows=64, gradient_checkpointing=True))
    assert few < 0.5 * activations(training(rows=64))
    # The residual stream in front of each layer is what stays
    assert few > 64 * 40 * 32 * 4 * 5


def test_weights_moments_and_gradients_are_counted():
    count = sum(p.numel() for p in AutoModelForCausalLM.from_config(CONFIGS["llama"]).parameters())
    found = parts(training(CONFIGS["llama"], teacher=CONFIGS["llama"], several=True))
    assert found["weights"] == found["teacher"] == found["gradients"] == 4 * count
    assert found["moments"] == 8 * count
    assert parts(training(CONFIGS["llama"], optim="adamw_8bit"))["moments"] == 2 * count
    assert parts(training(CONFIGS["llama"], dtype=torch.bfloat16))["weights"] == 2 * count


def test_an_adapter_has_the_moments_of_an_adapter():
    peft_config = LoraConfig(r=4, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_config(CONFIGS["qwen3"]), peft_config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = parts(training(peft_config=peft_config, several=True))
    assert found["moments"] == 8 * trained
    assert found["gradients"] == 4 * trained
    assert found["weights"] == 4 * sum(p.numel() for p in model.parameters())


def test_gradients_count_beside_activations_only_where_they_are_there_with_them():
    # So few tokens that the gradients are more than the activations
    small = {"rows": 1, "length": 4, "completion": 2}
    one, several = (parts(training(several=several, **small)) for several in (False, True))
    assert one["gradients"] + one["activations"] == several["gradients"]
    assert parts(training())["gradients"] < several["gradients"]


@pytest.mark.parametrize("sharding", ["zero2", "zero3", "fsdp2"])
def test_more_processes_hold_less_each(sharding):
    two, eight = (
        parts(training(teacher=CONFIGS["qwen3"], sharding=sharding, processes=processes)) for processes in (2, 8)
    )
    assert eight["moments"] == two["moments"] // 4
    assert eight["gradients"] == two["gradients"] // 4
    assert (eight["teacher"] == two["teacher"]) is (sharding == "zero2")
    assert eight["activations"] == two["activations"]


def test_ddp_holds_the_gradients_a_second_time():
    alone, two = (parts(training(several=True, processes=processes)) for processes in (1, 2))
    assert two["gathered"] == two["gradients"]
    assert alone["gathered"] == 0


def test_the_cache_of_a_token():
    assert cache_bytes(CONFIGS["llama"], 2) == 2 * 5 * 2 * 16 * 2


MEASURED = json.loads((ROOT / "recipes/results/memory_plan/cpu.json").read_text())["rows"]


@pytest.mark.skipif(KEEPS_SCORES, reason="measured with a torch whose attention keeps no scores on a CPU")
@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row["case"])
def test_the_plan_is_within_a_tenth_of_what_was_measured(row):
    assert sum(planned(row["size"]).values()) == pytest.approx(row["peak_mib"], rel=0.1)


@pytest.fixture
def checkpoint_8b(tmp_path):
    """The configuration of an 8B, which is all that a plan reads."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=12288,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    return str(tmp_path)


def plan(*options: str, recipe: str = "recipes/opsd.yaml") -> None:
    main(["--config", str(ROOT / recipe), *options])


def test_a_recipe_that_does_not_fit_says_so_and_what_to_do(checkpoint_8b, capsys):
    with pytest.raises(SystemExit) as end:
        plan("--model_name_or_path", checkpoint_8b)
    assert end.value.code == 1
    out = capsys.readouterr().out
    assert "GiB too many" in out
    assert "fsdp2.yaml" in out


def test_eight_gpus_that_share_it_are_enough(checkpoint_8b, capsys):
    shared = str(ROOT / "recipes/accelerate_configs/fsdp2.yaml")
    plan("--model_name_or_path", checkpoint_8b, "--accelerate_config", shared)
    out = capsys.readouterr().out
    assert "fsdp2 on 8" in out
    assert out.count("fits") == 2


def test_an_adapter_is_enough_too(checkpoint_8b, capsys):
    plan("--model_name_or_path", checkpoint_8b, "--use_peft", "true", "--dtype", "bfloat16")
    assert "       teacher     0.00 GiB" in capsys.readouterr().out


def test_an_adapter_is_planned_as_its_base(checkpoint_8b, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": checkpoint_8b}))
    with pytest.raises(SystemExit) as end:
        plan("--model_name_or_path", str(tmp_path / "adapter"))
    assert end.value.code == 1
    assert "GiB too many" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--optim", "adafactor"], "`optim` is `adafactor`"),
        (["--load_in_4bit", "true"], "Quantised weights"),
        (["--accelerate_config", "nowhere.yaml"], "no file `nowhere.yaml`"),
        (["--model_name_or_path", "./nowhere"], "no folder `./nowhere`"),
        (["--num_processes", "0"], "`num_processes`"),
        (["--gpu_memory", "-1"], "`gpu_memory`"),
    ],
)
def test_a_mistake_is_one_sentence(checkpoint_8b, capsys, options, sentence):
    with pytest.raises(SystemExit) as end:
        plan("--model_name_or_path", checkpoint_8b, *options)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_model_of_several_modalities_is_refused(tmp_path, capsys):
    from transformers import Gemma3Config

    Gemma3Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SystemExit):
        plan("--model_name_or_path", str(tmp_path))
    assert "several modalities" in capsys.readouterr().err
