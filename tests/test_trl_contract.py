"""Every private name of TRL that we rely on, so that an upgrade fails here, with that name."""

import inspect
import re
from pathlib import Path

import pytest
import trl.trainer.utils
from trl import DistillationTrainer, GRPOTrainer, SFTTrainer
from trl._lazy_module import _LazyModule
from trl.generation.vllm_generation import VLLMGeneration
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.models.utils import _ForwardRedirection
from trl.trainer import distillation_trainer, grpo_trainer

import trl_opsd
from trl_opsd.opsd.verify import Verifiers


def test_the_tokens_of_sft_are_counted_where_we_go_on_with_them():
    source = inspect.getsource(SFTTrainer)
    assert "self._total_train_tokens = 0" in source and "self._total_train_tokens += " in source


def test_packages_import_lazily_as_those_of_trl_do():
    """`opsd/` is to move into TRL, where this is how a package does it; transformers' own takes a second to import."""
    parameters = list(inspect.signature(_LazyModule).parameters)
    assert parameters == ["name", "module_file", "import_structure", "module_spec", "extra_objects"]
    for package in (trl_opsd, trl_opsd.opsd, trl_opsd.rlvr):
        assert isinstance(package, _LazyModule) and all(getattr(package, name) for name in package.__all__)


@pytest.mark.parametrize(
    "owner, name, parameters",
    [
        (DistillationTrainer, "_generate_and_score_completions", ["self", "inputs"]),
        (
            DistillationTrainer,
            "_generate_single_turn",
            ["self", "prompt_ids", "images", "multimodal_fields", "has_tool_images"],
        ),
        (
            DistillationTrainer,
            "_tool_call_loop",
            ["self", "prompts", "prompt_ids", "completion_ids", "completions", "images", "multimodal_fields"],
        ),
        (DistillationTrainer, "_load_optimizer_and_scheduler", ["self", "checkpoint"]),
        (DistillationTrainer, "_save_checkpoint", ["self", "model", "trial"]),
        (DistillationTrainer, "_get_train_sampler", ["self", "dataset"]),
        (DistillationTrainer, "_clip_grad_norm", ["self", "model"]),
        (DistillationTrainer, "_get_grad_norm", ["self", "model", "grad_norm"]),
        (DistillationTrainer, "_determine_best_metric", ["self", "metrics", "trial"]),
        (DistillationTrainer, "_tokenize_prompts", ["self", "prompts"]),
        (DistillationTrainer, "_compute_loss", ["self", "unwrapped_student", "inputs", "num_items_in_batch"]),
        (
            DistillationTrainer,
            "_get_last_hidden_state",
            [
                "self",
                "unwrapped_model",
                "input_ids",
                "attention_mask",
                "logits_to_keep",
                "pixel_values",
                "image_grid_thw",
                "pixel_attention_mask",
                "spatial_shapes",
                "image_sizes",
                "token_type_ids",
                "mm_token_type_ids",
                "image_position_ids",
            ],
        ),
        # What follows is RLVR's
        (GRPOTrainer, "_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        (GRPOTrainer, "_generate_and_score_completions", ["self", "inputs"]),
    ],
)
def test_private_methods_have_the_parameters_we_know(owner, name, parameters):
    method = inspect.unwrap(getattr(owner, name))
    if parameters is not None:
        assert list(inspect.signature(method).parameters) == parameters


@pytest.mark.parametrize(
    "name",
    [
        "_forward_redirection",
        "_is_vlm",
        "_metrics",
        "_tokenizer",
        "accelerator",
        "beta",
        "chat_template",
        "chat_template_kwargs",
        "eos_token_ids",
        "log_completions",
        "pad_to_multiple_of",
        "processing_class",
        "shuffle_dataset",
        "teacher_model",
        "temperature",
        "tools",
    ],
)
def test_the_base_class_sets_or_reads_the_attributes_we_know(name):
    assert f"self.{name}" in inspect.getsource(DistillationTrainer)


def test_an_engine_says_that_it_sleeps_as_we_know_it():
    """`engine.py` wakes it once for several calls of `generate`, each of which would wake it and let it sleep."""
    source = inspect.getsource(VLLMGeneration.generate)
    assert 'if self.mode == "colocate" and self.enable_sleep_mode and self._llm_weights_sleeping:' in source
    assert source.count("self.enable_sleep_mode") == 3 and 'self.llm.wake_up(tags=["kv_cache"])' in source
    assert "self.llm.sleep(level=2)" in source and "self._llm_weights_sleeping = True" in source
    for trainer in (DistillationTrainer, GRPOTrainer):
        assert "self.vllm_generation.sync_weights()" in inspect.getsource(trainer._generate_single_turn)


def test_verifiers_are_called_as_grpo_calls_its_reward_functions():
    """The keyword arguments that a reward function of GRPO may rely on, by the lines that set them."""
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    assert set(re.findall(r'(?<!_)reward_kwargs\["(\w+)"\] = ', source)) == {
        "trainer_state",
        "log_extra",
        "log_metric",
        "environments",  # which `DistillationTrainer` does not have
    }
    assert 'key not in ["prompt", "completion", "completion_ids"]' in source
    call = "prompts=prompts, completions=completions, completion_ids=completion_ids_list, **reward_kwargs"
    assert source.count(call) == 2  # of the synchronous and of the others
    ours = inspect.getsource(Verifiers.score)
    assert all(f'"{name}"' in ours for name in ("prompts", "completions", "completion_ids", "trainer_state"))
    assert all(f'"{name}"' in ours for name in ("log_extra", "log_metric"))


def test_the_engine_is_started_where_and_as_we_know():
    for module in (distillation_trainer, grpo_trainer):
        assert "self.vllm_generation = VLLMGeneration(" in inspect.getsource(module)
    start = inspect.getsource(VLLMGeneration._init_vllm)
    assert "self.llm = LLM(" in start and "ensure_master_addr_port()" in start
    # What is passed beside it would be passed twice
    assert not re.search(r"\b(dtype|enforce_eager)=", start)
    for name in ("_init_vllm", "sync_weights", "generate"):
        assert callable(getattr(VLLMGeneration, name))
    output = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert all(f'output["{name}"]' in output for name in ("old_per_token_logps", "sampling_per_token_logps"))


def test_the_loss_of_a_wrapped_teacher_is_redirected_as_the_base_class_does():
    parameters = list(inspect.signature(_ForwardRedirection.__call__).parameters)
    assert parameters == ["self", "wrapper_module", "original_module", "method", "args", "kwargs"]


def test_no_private_name_of_accelerate_is_used():
    """What there is no public way for is above, and all of it is TRL's."""
    for path in (Path(trl_opsd.__file__).parent / "opsd").glob("*.py"):
        assert not re.search(r"(accelerator|gradient_state|state)\._\w+", path.read_text()), path


@pytest.mark.parametrize(
    "name",
    [
        "RepeatSampler",
        "create_model_from_path",
        "get_callable_name",
        "get_config_model_id",
        "is_async_callable",
        "maybe_gather_lm_head_ctx",
        "pad",
        "print_prompt_completions_sample",
        "shutdown_event_loop_in_daemon",
        "split_pixel_values_by_grid",
        "start_event_loop_in_daemon",
        "unsplit_pixel_values_by_grid",
        "use_adapter",
    ],
)
def test_helpers_are_where_we_import_them(name):
    assert callable(getattr(trl.trainer.utils, name))


def test_the_chunked_kernel_takes_the_arguments_we_give_it():
    names = list(inspect.signature(ChunkedDivergenceFunction.forward).parameters)
    assert names[:9] == [
        "ctx",
        "student_hidden",
        "student_weight",
        "student_bias",
        "teacher_hidden",
        "teacher_weight",
        "teacher_bias",
        "beta",
        "temperature",
    ]
    assert names[9:] == [
        "student_logit_scale",
        "student_final_logit_softcapping",
        "teacher_logit_scale",
        "teacher_final_logit_softcapping",
    ]


def test_image_fields_are_those_of_the_base_class():
    from trl_opsd.opsd.batches import MULTIMODAL_FIELDS

    source = inspect.getsource(distillation_trainer.DistillationTrainer._compute_loss)
    listed = source.split("multimodal_keys = (")[1].split(")")[0]
    assert [word.strip().strip('"') for word in listed.split(",") if word.strip()] == list(MULTIMODAL_FIELDS)


def test_the_logit_transforms_are_those_of_the_base_class():
    from trl_opsd.opsd.head import logit_transform

    source = inspect.getsource(distillation_trainer.DistillationTrainer._compute_loss)
    for name in (
        "logit_scale",
        "output_multiplier",
        "lm_head_multiplier",
        "logits_scaling",
        "final_logit_softcapping",
    ):
        assert f'"{name}"' in source and f'"{name}"' in inspect.getsource(logit_transform)
