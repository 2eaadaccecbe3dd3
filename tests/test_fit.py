"""What the check of the prompts must not refuse, and what it may cost. What it does refuse is in `test_bad_input`."""

import pytest
from datasets import Dataset
from transformers import BloomConfig, LlamaConfig, MambaConfig, MptConfig, Qwen2Config

from trl_opsd.cli import UserError
from trl_opsd.data import check_fit, write_rows
from trl_opsd.opsd import OPSDConfig
from trl_opsd.positions import positions_of


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "rope_theta": 5e5,
}


@pytest.mark.parametrize(
    "config, positions",
    [
        (Qwen2Config(max_position_embeddings=32768), 32768),
        # As the cards of Qwen say it, and as gpt-oss has it
        (Qwen2Config(max_position_embeddings=32768, rope_parameters=YARN), 131072),
        (Qwen2Config(max_position_embeddings=131072, rope_parameters=YARN), 131072),
        (LlamaConfig(max_position_embeddings=4096, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), 8192),
        (LlamaConfig(max_position_embeddings=131072, rope_parameters=LLAMA3), 131072),
        (LlamaConfig(max_position_embeddings=131072, rope_parameters={**LLAMA3, "factor": 32.0}), 131072),
        (BloomConfig(), None),
        (MptConfig(), None),
        (MambaConfig(), None),
    ],
)  # fmt: skip
def test_scaled_positions_count(config, positions):
    assert positions_of(config) == positions


def chats(*contents):
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": content}] for content in contents]})


def test_what_the_template_leaves_out_takes_no_room(tokenizer, monkeypatch):
    # As the thoughts of earlier turns, which templates of reasoners drop
    monkeypatch.setattr(
        tokenizer, "chat_template", "{% for m in messages %}{{ m.content.split('=')[-1] }}{% endfor %}"
    )
    check_fit(chats("3" * 40 + "=3"), "d", tokenizer, 20, 10)
    with pytest.raises(UserError, match="in 1 of 2 rows .*row 2 has 11 or more"):
        check_fit(chats("3", "3=" + "3" * 11), "d", tokenizer, 20, 10)


def test_what_a_template_raises_on_is_named_by_its_row(tokenizer, monkeypatch):
    refuses = "{% if '4' in messages[0].content %}{{ raise_exception('no 4') }}{% endif %}{{ messages[0].content }}"
    monkeypatch.setattr(tokenizer, "chat_template", refuses)
    monkeypatch.setattr(
        "trl_opsd.data.fit._can_write", lambda tokenizer, text: True
    )  # so that one of an order is asked
    assert write_rows(chats("3", "33")["prompt"], "d", tokenizer) == tokenizer(["3", "33"])["input_ids"]
    with pytest.raises(
        UserError, match="`d`, row 3: the tokenizer of .* in the context 'c' .*no 4.* another context or"
    ):
        write_rows(chats("3", "33", "34")["prompt"], "d", tokenizer, context="c")


def test_prompts_are_written_many_at_once(tokenizer, monkeypatch):
    calls, write = [], tokenizer.apply_chat_template

    def counted(prompts, **kwargs):
        calls.append(len(prompts))
        return write(prompts, **kwargs)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    with pytest.raises(UserError, match=r"in 1 of 2500 rows .*row 2300 has \d+"):
        check_fit(chats(*["3" * 10] * 2299, "3" * 30, *["3" * 10] * 200), "d", tokenizer, 30, 10)
    assert sum(calls) == 2500 and len(calls) == 3


def test_the_row_that_cannot_be_written_is_named(tokenizer, monkeypatch):
    monkeypatch.setattr(
        tokenizer,
        "chat_template",
        ("{% if 'x' in messages[0].content %}{{ raise_exception('no x') }}{% endif %}{{ messages[0].content }}"),
    )
    with pytest.raises(UserError, match="row 7: .* cannot write this `prompt` .*no x"):
        check_fit(chats(*["3" * 10] * 6, "x" * 10, "3"), "d", tokenizer, 30, 10)


KNOWS_TWO = "{% for m in messages %}{% if m.role in ['user', 'ipython'] %}{{ m.content }}{% endif %}{% endfor %}"


def test_a_role_that_the_template_leaves_out_is_named(tokenizer, monkeypatch):
    """Llama 3.1 says `ipython` of what a tool has answered; others say nothing at all where it stands."""
    monkeypatch.setattr(tokenizer, "chat_template", KNOWS_TWO)
    rows = [
        [{"role": "user", "content": "3"}, {"role": role, "content": "4"}] for role in ("ipython", "ipython", "tool")
    ]
    check_fit(Dataset.from_dict({"prompt": rows[:2]}), "d", tokenizer, 20, 10)
    with pytest.raises(UserError, match="row 3: the chat template of .* leaves out what the role 'tool' says"):
        check_fit(Dataset.from_dict({"prompt": rows}), "d", tokenizer, 20, 10)


def test_what_is_far_too_long_is_known_by_its_beginning(tokenizer, monkeypatch):
    seen, write = [], tokenizer.apply_chat_template

    def watched(prompts, **kwargs):
        seen.extend(prompts)
        return write(prompts, **kwargs)

    monkeypatch.setattr(tokenizer, "apply_chat_template", watched)
    with pytest.raises(UserError, match="in 1 of 3 rows .*row 2 has 1280 or more"):
        check_fit(chats("3", "3" * 100_000, "3"), "d", tokenizer, 30, 10)
    assert [prompt[0]["content"] for prompt in seen] == ["3", "3"]


def test_plain_strings_skip_the_chat_template_and_it_is_said(tokenizer, monkeypatch, caplog):
    write_rows([[{"role": "user", "content": "3"}]], "d", tokenizer)
    assert not caplog.text
    assert write_rows(["3", "4"], "d", tokenizer) == [tokenizer("3")["input_ids"], tokenizer("4")["input_ids"]]
    assert caplog.text.count("The prompts are plain strings, so the chat template") == 1
    caplog.clear()
    monkeypatch.setattr(tokenizer, "chat_template", None)
    write_rows(["3"], "d", tokenizer)
    assert not caplog.text


def test_opsd_says_that_it_needs_a_limit(tmp_path):
    with pytest.raises(ValueError, match="`max_completion_length` is None"):
        OPSDConfig(str(tmp_path), max_completion_length=None, use_cpu=True)
