"""
Whatever comes in: properties that hold of any rollout, template, answer, protocol, cache line and results file.

Divergence and batches have theirs in `test_divergence` and `test_opsd_microbatch`, estimators in `test_estimators`.
"""

import json
import math
from string import Formatter

import pytest
import torch
from evaluated import records, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trl_opsd.cli import UserError
from trl_opsd.evaluate.cache import GenerationCache
from trl_opsd.evaluate.results_file import load_results
from trl_opsd.opsd.context import PRIVILEGED_FIELDS, TeacherContext
from trl_opsd.opsd.gate import judge, shortest, shortest_siblings
from trl_opsd.rewards.math import extract_answer, find_answer, math_reward
from trl_opsd.rewards.sandbox.backend import Collected
from trl_opsd.rewards.sandbox.run import same_output


quickly = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# The gate

groups = st.integers(1, 4).flatmap(
    lambda size: st.tuples(
        st.just(size),
        st.lists(
            st.tuples(st.sampled_from([0.0, 0.5, 1.0, None]), st.integers(0, 9), st.booleans()),
            min_size=size,
            max_size=4 * size,
        ).map(lambda rows: rows[: len(rows) // size * size]),
    )
)


@quickly
@given(groups, st.integers(1, 4))
def test_the_gate(case, number):
    size, rows = case
    rewards = torch.tensor([[math.nan if reward is None else reward] for reward, _, _ in rows])
    lengths, finished = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    verdicts = {
        gate: judge(rewards, lengths, finished, torch.ones(1), gate, 1.0) for gate in ("correct", "incorrect", "all")
    }
    expected = [reward == 1.0 and ended for reward, _, ended in rows]
    assert verdicts["correct"].passed.tolist() == expected
    assert verdicts["incorrect"].passed.tolist() == [
        reward is not None and not right for (reward, _, _), right in zip(rows, expected, strict=True)
    ]
    assert verdicts["all"].passed.all()
    kept = torch.tensor(expected)
    chosen = shortest(kept, lengths, size, number)
    siblings = shortest_siblings(kept, lengths, size)
    for start in range(0, len(rows), size):
        group = range(start, start + size)
        right = sorted((row for row in group if expected[row]), key=lambda row: rows[row][1])
        # What is not kept may be among the first where there are fewer that are
        assert [row for row in group if chosen[row] and expected[row]] == sorted(right[:number])
        for row in group:
            others = [rows[other][1] for other in right if other != row]
            assert (siblings[row] is None) == (not others)
            if others:
                assert siblings[row] in right and siblings[row] != row and rows[siblings[row]][1] == min(others)


# Templates

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@quickly
@given(texts, texts, st.sampled_from(["solution", "answer"]), texts)
def test_what_stands_in_a_row_is_text_to_a_template(prompt, privileged, field, around):
    """Braces, format specifications, and the names of fields."""
    template = f"{around.replace('{', '{{').replace('}', '}}')}{{prompt}}|{{{field}}}"
    context = TeacherContext(template)
    row = {"prompt": [{"role": "user", "content": prompt}], field: privileged}
    assert context.prompt(row) == [{"role": "user", "content": f"{around}{prompt}|{privileged}"}]


@quickly
@given(st.text(alphabet="{}!:.[]0_prompt answer", max_size=30))
def test_a_template_is_taken_or_refused_in_a_sentence(template):
    try:
        context = TeacherContext(template)
    except ValueError as error:
        assert "`teacher_prompt_template`" in str(error) and "\n" not in str(error).replace(template, "")
        return
    names = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    assert "prompt" in names and names <= {"prompt", *PRIVILEGED_FIELDS} and context.fields == names - {"prompt"}


# Answers

pieces = st.lists(
    st.sampled_from(
        [
            *"0123456789{}$%,.-+/\\ \n",
            r"\boxed{",
            "\\frac{1}{2}",
            "<think>",
            "</think>",
            "answer is",
            "**",
            "\x00",
            "𝟙",
        ]
    ),
    max_size=25,
).map("".join)


@quickly
@given(st.one_of(pieces, texts))
def test_an_answer_is_a_part_of_the_text_or_none(text):
    answer, form = find_answer(text)
    assert form in ("boxed", "marked", "last", "none") and (answer is None) == (form == "none")
    if form == "boxed":
        assert answer in text and "boxed" in text.rpartition("</think>")[2]
    strict = extract_answer(text)
    assert strict is None or form == "boxed"


@quickly
@given(pieces, st.integers(-999, 999), st.integers(-999, 999))
def test_a_boxed_number_is_right_if_it_is_the_number(before, answer, gold):
    """Whatever stands before it, if it is whole, and not in an open trace."""
    text = f"{before.replace('<think>', '').replace('</think>', '')} so \\boxed{{{answer}}}"
    found = math_reward([text], answer=[str(gold)])
    if find_answer(text)[0] == str(answer):
        assert found == [float(answer == gold)]
    assert math_reward([f"<think>{text}"], answer=[str(answer)]) == [0.0]


# The sandbox's protocol

messages = st.lists(
    st.one_of(
        st.just({"status": "ready"}),
        st.builds(lambda text: {"status": "case", "ended": "done", "printed": text}, texts),
        st.builds(lambda status: {"status": status, "detail": "x"}, st.sampled_from(["passed", "failed", "stopped"])),
    ),
    max_size=8,
)


@quickly
@given(messages, st.lists(st.integers(1, 30), max_size=20))
def test_a_verdict_does_not_depend_on_how_it_comes_in(said, sizes):
    data = b"".join(json.dumps(message).encode() + b"\n" for message in said)
    whole, parts = Collected(lambda message: True), Collected(lambda message: True)
    wanted = whole.feed(data)
    start = 0
    for size in [*sizes, len(data)]:
        more = parts.feed(data[start : start + size])
        start += size
    assert (parts.last, parts.is_started, more) == (whole.last, whole.is_started, wanted)
    verdicts = [message for message in said if message["status"] not in ("ready", "case")]
    assert whole.last == (verdicts[0] if verdicts else None)


@quickly
@given(texts, texts)
def test_what_is_printed_is_the_same_as_itself_and_as_nothing_else(printed, other):
    assert same_output(printed, printed) and same_output(printed + "\n \n", printed)
    if printed.split() != other.split() and not any(letter.isdigit() for letter in printed + other):
        assert not same_output(printed, other)


# The cache and the results


@quickly
@given(st.binary(max_size=80) | st.text("0123", max_size=2).map(str.encode), st.integers(0, 200), st.booleans())
def test_a_cache_gives_what_was_written_or_nothing(tmp_path, noise, place, replaces):
    path = tmp_path / "cache.jsonl"
    path.unlink(missing_ok=True)
    written = {f"{number:032x}": [number, 1, 2] for number in range(3)}
    cache = GenerationCache(path)
    for key, ids in written.items():
        cache.add(key, ids, 0.5)
    data = path.read_bytes()
    place = min(place, len(data))
    path.write_bytes(data[:place] + noise + data[place + len(noise) * replaces :])
    again = GenerationCache(path)
    for key, ids in written.items():
        assert again.get(key) in (None, (ids, 0.5))
    again.add("f" * 32, [7], 0.1)  # a line that was cut does not swallow the next
    assert GenerationCache(path).get("f" * 32) == ([7], 0.1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "run.json"
    write_run(path, records("after", [[1], [0]], [[5], [7]]))
    return path


@quickly
@given(st.data())
def test_a_results_file_is_read_as_it_stands_or_refused_in_a_sentence(run, tmp_path, data):
    results = json.loads(run.read_text())
    (before,) = load_results(run)
    row = results["rows"][0]
    name = data.draw(st.sampled_from(sorted(row)))
    value = data.draw(json_values)
    row[name] = value
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(results))
    try:
        (found,) = load_results(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        read = vars(found.row)
        assert read.get(name, value) == value or name in vars(before.row).get("at_k", {})
        assert all(read[other] == kept for other, kept in vars(before.row).items() if other not in (name, "at_k"))
