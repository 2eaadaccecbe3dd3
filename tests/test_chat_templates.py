"""The boundary between prompt and completion, on the chat templates of real models: TRL's, and SmolLM2's beside it."""

from pathlib import Path

import pytest
import trl
from datasets import Dataset
from test_opsd_trainer import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from trl_opsd import OPSDConfig, OPSDTrainer


TEMPLATES = {
    path.stem: path.read_text()
    for folder in (Path(trl.__file__).parent, Path(__file__).parent)
    for path in (folder / "chat_templates").glob("*.jinja")
}
ROWS = Dataset.from_list(
    [
        {
            "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": "2+2?"}],
            "solution": "2+2=4",
            "answer": "4",
        },
        {
            "prompt": [
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": "2"},
                {"role": "user", "content": "and 3+3?"},
            ],
            "solution": "3+3=6",
            "answer": "6",
        },
    ]
)
# Arguments of the chat template, and what the prompt of either side must end in
ENDINGS = {
    "qwen3": ({}, "<|im_start|>assistant\n"),
    "qwen3 without thinking": ({"enable_thinking": False}, "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "qwen2_5": ({}, "<|im_start|>assistant\n"),
    "llama3": ({}, "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "gemma3": ({}, "<start_of_turn>model\n"),
    "phi3": ({}, "<|assistant|>\n"),
    "smollm2": ({}, "<|im_start|>assistant\n"),
}


def byte_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer that writes any text, byte by byte, with the chat template of a real model."""
    alphabet = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**alphabet, "<pad>": 256, "<eos>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<eos>",
        padding_side="left",
        chat_template=TEMPLATES[name],
    )


def build(tmp_path, name, **changes):
    config = Qwen3Config(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=4096,
    )
    batch = {"per_device_train_batch_size": len(ROWS), "gradient_accumulation_steps": 1}
    return OPSDTrainer(
        model=Qwen3ForCausalLM(config),
        args=OPSDConfig(**settings(tmp_path, **batch, **changes)),
        train_dataset=ROWS,
        processing_class=byte_tokenizer(name.split()[0]),
    )


@pytest.mark.parametrize("context", ["solution", "answer", "concise", "concise_by_difficulty"])
@pytest.mark.parametrize("name", ENDINGS)
def test_both_sides_end_in_the_generation_prompt(tmp_path, name, context):
    kwargs, ending = ENDINGS[name]
    trainer = build(tmp_path, name, teacher_context=context, chat_template_kwargs=kwargs)
    student_ids, _, _ = trainer._tokenize_prompts(list(ROWS["prompt"]))
    teacher = trainer._tokenize_teacher_prompts(list(ROWS), [None, None], 12)
    for row, student, ids, mask in zip(
        ROWS, student_ids, teacher["teacher_prompt_ids"], teacher["teacher_prompt_mask"], strict=True
    ):
        student_text = trainer._tokenizer.decode(student)
        teacher_text = trainer._tokenizer.decode(ids[mask.bool()])
        assert student_text.endswith(ending) and teacher_text.endswith(ending)
        problem = row["prompt"][-1]["content"]
        assert problem in student_text and problem in teacher_text
        # Earlier turns are on both sides, privileged text on the teacher's only
        assert row["prompt"][0]["content"] in teacher_text
        if context == "solution":
            assert row["solution"] in teacher_text and row["solution"] not in student_text


@pytest.mark.parametrize("student, teacher", [(True, False), (False, True)])
def test_thinking_on_one_side_only_is_an_error_that_shows_both_endings(tmp_path, student, teacher):
    with pytest.raises(ValueError) as end:
        build(
            tmp_path,
            "qwen3",
            teacher_context="concise",
            chat_template_kwargs={"enable_thinking": student},
            teacher_chat_template_kwargs={"enable_thinking": teacher},
        )
    closed = repr("<|im_start|>assistant\n<think>\n\n</think>\n\n")[1:-1]
    sides = str(end.value).split(" and the teacher's in ")
    assert [closed in side for side in sides] == [not student, not teacher]


@pytest.mark.parametrize(
    "name, default",
    [("smollm2", "You are a helpful AI assistant named SmolLM"), ("qwen2_5", "You are Qwen, created by")],
)
def test_a_default_system_prompt_is_on_both_sides_or_neither(tmp_path, name, default):
    """Some templates bring a system prompt where there is none: a context must not be what drops it."""

    def sides(trainer):
        student_ids, _, _ = trainer._tokenize_prompts(list(ROWS["prompt"]))
        teacher = trainer._tokenize_teacher_prompts(list(ROWS), [None, None], 12)
        teacher_ids = [
            ids[mask.bool()]
            for ids, mask in zip(teacher["teacher_prompt_ids"], teacher["teacher_prompt_mask"], strict=True)
        ]
        return trainer._tokenizer.batch_decode(student_ids), trainer._tokenizer.batch_decode(teacher_ids)

    for texts in sides(build(tmp_path, name, teacher_context="concise")):
        # The first row has a system prompt of its own, the second one does not
        assert [default in text for text in texts] == [False, True]
        assert ["Think." in text for text in texts] == [True, False]
