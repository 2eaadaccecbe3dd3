import pytest

from trl_opsd.opsd.context import TEACHER_PROMPT_TEMPLATES, TeacherContext


CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "2+{2}?"}]


def test_only_the_last_user_turn_changes():
    context = TeacherContext("{prompt} [{answer}] {{literal}}")
    assert context.fields == {"answer"}
    prompt = context.prompt({"prompt": CHAT, "answer": "4{x}"})
    assert prompt == [CHAT[0], {"role": "user", "content": "2+{2}? [4{x}] {literal}"}]
    assert CHAT[1]["content"] == "2+{2}?"
    assert context.prompt({"prompt": "2+2?", "answer": "4"}) == "2+2? [4] {literal}"


def test_privileged_context_stands_in_for_solution_and_answer():
    context = TeacherContext("{prompt} {solution}")
    assert context.prompt({"prompt": "p", "solution": "s", "privileged_context": "x"}) == "p x"
    assert context.prompt({"prompt": "p", "solution": "s", "privileged_context": None}) == "p s"
    context.check_columns(["prompt", "privileged_context"])
    with pytest.raises(ValueError, match=r"column `solution`, and the dataset has \['answer', 'prompt'\]"):
        context.check_columns(["prompt", "answer"])


def test_an_empty_field_names_the_row():
    with pytest.raises(ValueError, match="`solution`, and it is empty in the row with the prompt 'why"):
        TeacherContext("{prompt} {solution}").prompt({"prompt": "why", "solution": None})


@pytest.mark.parametrize(
    "last", [{"role": "assistant", "content": "so"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}]
)
def test_prompts_end_in_a_user_turn_of_text(last):
    with pytest.raises(ValueError, match="end in a user turn of plain text"):
        TeacherContext("{prompt} short").prompt({"prompt": [*CHAT, last]})


def test_the_shipped_templates_take_what_their_names_say():
    assert {name: TeacherContext(text).fields for name, text in TEACHER_PROMPT_TEMPLATES.items()} == {
        "solution": {"solution"},
        "answer": {"answer"},
        "concise": set(),
        "concise_by_difficulty": set(),
        "sibling": {"sibling"},
    }


@pytest.mark.parametrize("template", ["{prompt.__class__}", "{0}", "{}", "{prompt[0]}"])
def test_templates_reach_nothing_but_their_fields(template):
    with pytest.raises(ValueError, match="unknown placeholder"):
        TeacherContext(template)


def test_a_sibling_is_given_and_nothing_stands_in_for_it():
    context = TeacherContext("{prompt} {sibling}")
    context.check_columns(["prompt"])
    example = {"prompt": "p", "privileged_context": "x"}
    assert context.prompt(example, context.privileged_texts(example, sibling="s")) == "p s"
    with pytest.raises(ValueError, match="needs `sibling`"):
        context.prompt(example)


def test_earlier_turns_are_kept():
    turns = [*CHAT, {"role": "assistant", "content": "4"}, {"role": "user", "content": "and 3+3?"}]
    assert TeacherContext("{prompt} short").prompt({"prompt": turns}) == [
        *turns[:-1],
        {"role": "user", "content": "and 3+3? short"},
    ]
