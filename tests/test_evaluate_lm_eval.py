"""Tasks of lm-evaluation-harness: with a stand-in of the library here, and with the library in the slow tier."""

import json
import re
import types

import pytest
from evaluation_world import Adder, save_checkpoint

from trl_opsd.evaluate import EvaluateConfig, evaluate
from trl_opsd.evaluate import lm_eval as adapter
from trl_opsd.evaluate.plan import expand, plan


def mean(values):
    return sum(values) / len(values)


class Part:
    """A filter: the first number in a box, or the last anywhere."""

    def __init__(self, name, pattern, index):
        self.name, self.pattern, self.index = name, pattern, index

    def apply(self, instances):
        for instance in instances:
            found = re.findall(self.pattern, instance.resps[0])
            instance.filtered_resps[self.name] = found[self.index] if found else "[invalid]"


class Sums:
    """As much of a task as is used."""

    VERSION = 3.0

    def __init__(self, name="sums", sums=((3, 4), (3, 5), (12, 4), (12, 5)), **changes):
        generation = {"until": ["xx"], "max_gen_toks": 12, "do_sample": False} | changes.pop("generation", {})
        self.config = types.SimpleNamespace(task=name, generation_kwargs=generation, repeats=1)
        self.sums, self.changes = sums, changes
        self.UNSAFE_CODE = changes.get("unsafe", False)
        self.OUTPUT_TYPE = changes.get("output_type", "generate_until")
        self._filters = [Part("strict-match", r"\\boxed{(\d+)}", 0), Part("flexible-extract", r"\d+", -1)]

    def aggregation(self):
        return {"exact_match": self.changes.get("aggregation", mean)}

    def higher_is_better(self):
        return {"exact_match": True}

    def build_all_requests(self, apply_chat_template, fewshot_as_multiturn, chat_template):
        self.instances = []
        for number, (a, b) in enumerate(self.sums):
            messages = [{"role": "system", "content": "!"}, {"role": "user", "content": f"{a}+{b}"}]
            messages += [{"role": "assistant", "content": "x"}] * ("prefix" in self.changes)
            text = chat_template(messages, add_generation_prompt="prefix" not in self.changes)
            self.instances.append(types.SimpleNamespace(args=(text, {}), doc_id=number, doc={"target": str(a + b)}))

    def process_results(self, doc, results):
        return {"exact_match": self.changes.get("points", 1.0) * (results[0] == doc["target"])}


@pytest.fixture
def sums(monkeypatch):
    def install(*tasks):
        monkeypatch.setattr(adapter, "_load", lambda name: {task.config.task: task for task in tasks})
        for task in tasks:
            adapter._check(task.config.task, task)

    return install


class Half(Adder):
    """Boxes every second answer."""

    def completion(self, prompt_ids):
        ids = super().completion(prompt_ids)
        if self.answered % 2:
            return ids
        text = self.tokenizer.decode(ids).replace(r"\boxed{", "").replace("}", "")
        return self.tokenizer(text)["input_ids"]


def test_prompts_and_scoring_are_theirs_and_the_rest_is_ours(sums, tmp_path, monkeypatch):
    sums(Sums())
    seen = []

    class Seen(Half):
        def generate(self, requests, sampling, done=()):
            seen.append(sampling)
            return super().generate(requests, sampling, done)

    monkeypatch.setattr("trl_opsd.evaluate.run.load_engine", lambda *args: Seen())
    config = EvaluateConfig(
        model_name_or_path=save_checkpoint(tmp_path / "c"), tasks=["lm_eval:sums[:3]"], output=str(tmp_path / "r.json")
    )
    (row,) = evaluate(config, progress=lambda done, total: None)
    assert (row["task"], row["n"], row["task_version"]) == ("lm_eval:sums", 3, "3.0")
    assert row["accuracy"] == pytest.approx(2 / 3) and row["accuracy_flexible"] == 1.0
    assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]
    assert (seen[0].stop, seen[0].max_tokens, seen[0].temperature) == (("xx",), 12, 0.0)
    records = [json.loads(line) for line in (tmp_path / "r.completions.jsonl").open()]
    assert "3+4" in records[0]["question"]
    (again,) = evaluate(config, progress=lambda done, total: None)
    assert again["cached"] == 3


def test_a_group_is_all_of_its_tasks(sums, tmp_path):
    sums(Sums("a"), Sums("b", sums=((1, 1), (2, 2))))
    config = EvaluateConfig(model_name_or_path=save_checkpoint(tmp_path / "c"), tasks=["lm_eval:both[:4]"])
    (job,) = plan(config)
    assert job.dataset["lm_eval_doc"] == ["a 0", "a 1", "b 0", "b 1"]  # equally many of each
    assert job.prompts[2][-1]["content"] == "1+1"
    (verifier,) = job.reward_funcs
    assert verifier([r"\boxed{2}", "<think>9</think>2", "3"], ["b 0"] * 3) == [1.0, 0.0, 0.0]
    assert verifier([r"\boxed{2}", "<think>9</think>2", "3"], ["b 0"] * 3, flexible=True) == [1.0, 1.0, 0.0]


def test_what_they_say_of_sampling(sums):
    sums(Sums(generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9, "until": [], "max_gen_toks": 7}))
    (config,) = expand(EvaluateConfig(model_name_or_path="c", tasks=["lm_eval:sums"], max_completion_length=9))
    assert (config.decoding, config.temperature, config.top_p, config.stop) == (["sampled"], 0.6, 0.9, None)
    assert config.max_completion_length == 9  # an option overrides it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_type": "multiple_choice"}, r"compares likelihoods \(`multiple_choice`\)"),
        ({"aggregation": max}, "`exact_match` of .* is no share of problems"),
        ({"unsafe": True}, "runs what a model writes in this process"),
        ({"prefix": True}, "begins the answer itself"),
        ({"points": 0.5}, r"gives parts of a point \(0.5\)"),
    ],
)
def test_what_cannot_be_measured(sums, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("trl_opsd.evaluate.run.load_engine", lambda *args: Adder())
    config = EvaluateConfig(model_name_or_path=save_checkpoint(tmp_path / "c"), tasks=["lm_eval:sums"])
    with pytest.raises(ValueError, match=message):
        sums(Sums(**changes))
        evaluate(config, progress=lambda done, total: None)


def test_reward_funcs_have_no_place(sums, tmp_path):
    sums(Sums())
    config = EvaluateConfig(
        model_name_or_path=save_checkpoint(tmp_path / "c"), tasks=["lm_eval:sums"], reward_funcs=["math_reward"]
    )
    with pytest.raises(ValueError, match="is scored by lm-evaluation-harness"):
        plan(config)


YAML = r"""
task: local_sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: PATH
output_type: generate_until
test_split: test
fewshot_split: test
num_fewshot: 1
description: "Add."
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs:
  until: ["xx"]
  max_gen_toks: 12
  do_sample: false
filter_list:
  - name: strict-match
    filter:
      - function: regex
        regex_pattern: "boxed.(\\d+)"
      - function: take_first
  - name: flexible-extract
    filter:
      - function: regex
        regex_pattern: "(\\d+)"
        group_select: -1
      - function: take_first
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
metadata:
  version: 3.0
"""


@pytest.mark.slow
class TestLibrary:
    """Needs the extra `ifeval`, which brings the library."""

    @pytest.fixture
    def task(self, tmp_path):
        pytest.importorskip("lm_eval", reason="the extra `ifeval`")
        rows = [{"question": f"{a}+{b}", "answer": str(a + b)} for a in (3, 12) for b in (4, 5)]
        (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = tmp_path / "sums.yaml"
        path.write_text(YAML.replace("PATH", str(tmp_path / "sums.jsonl")))
        return f"lm_eval:{path}"

    def test_a_local_task(self, task, tmp_path, monkeypatch):
        monkeypatch.setattr("trl_opsd.evaluate.run.load_engine", lambda *args: Half())
        config = EvaluateConfig(model_name_or_path=save_checkpoint(tmp_path / "c"), tasks=[task])
        (job,) = plan(config)
        assert job.prompts[0][0] == {"role": "system", "content": "Add."}
        roles = [message["role"] for message in job.prompts[0]]
        assert roles == ["system", "user", "assistant", "user"]  # one example, in turns
        assert job.prompts[0][-1]["content"] == "3+4"

    def test_its_verdicts(self, task):
        _, (verifier,) = adapter.load_lm_eval(task.removeprefix("lm_eval:"))
        texts = [r"\boxed{7}", "so 7", r"\boxed{8}", r"<think>\boxed{7}</think> 8"]
        docs = ["local_sums 0"] * 4
        assert verifier(texts, docs) == [1.0, 0.0, 0.0, 0.0]
        assert verifier(texts, docs, flexible=True) == [1.0, 1.0, 0.0, 0.0]

    def test_what_the_library_does_not_have(self):
        pytest.importorskip("lm_eval", reason="the extra `ifeval`")
        from trl_opsd.evaluate.tasks import find_task

        with pytest.raises(ValueError, match="cannot load the task `no_such_task`"):
            find_task("lm_eval:no_such_task")
