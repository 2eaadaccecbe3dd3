import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from trl_opsd.cli import UserError
from trl_opsd.data import SOURCES, check_columns, decontaminate, hold_out, load_prompts, record_held_out
from trl_opsd.data.__main__ import main
from trl_opsd.data.contamination import HELD_OUT, normalize, problem_text
from trl_opsd.evaluate.tasks import TASKS


SHARED = Path(__file__).parents[2] / "shared" / "data"
ROWS = [{"prompt": "1+1", "answer": "2", "id": 7}, {"prompt": "2+2", "answer": "4", "id": 8}]
GSM8K = {
    "question": "How many clips in 2 boxes of 1,500?",
    "answer": "There are 2*1500=<<2*1500=3000>>3000 clips.\nSo $<<3000=3000>>3000.\n#### 3,000",
}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


class TestLocal:
    def test_jsonl(self, tmp_path):
        assert load_prompts(write_jsonl(tmp_path / "any.jsonl", ROWS)).to_list() == ROWS

    def test_json_list(self, tmp_path):
        (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
        assert load_prompts(str(tmp_path / "a.json"), "test", ["answer"]).to_list() == ROWS

    def test_parquet(self, tmp_path):
        Dataset.from_list(ROWS).to_parquet(tmp_path / "a.parquet")
        assert load_prompts(str(tmp_path / "a.parquet")).to_list() == ROWS

    def test_saved_dataset(self, tmp_path):
        Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
        assert load_prompts(str(tmp_path / "saved")).to_list() == ROWS

    def test_saved_dataset_dict(self, tmp_path):
        DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[1:])).save_to_disk(tmp_path / "saved")
        assert load_prompts(str(tmp_path / "saved"), "test").to_list() == ROWS[1:]
        with pytest.raises(UserError, match="no split `dev`: choose from train, test"):
            load_prompts(str(tmp_path / "saved"), "dev")

    def test_folder_with_a_file_per_split(self, tmp_path):
        write_jsonl(tmp_path / "train.jsonl", ROWS)
        Dataset.from_list(ROWS[1:]).to_parquet(tmp_path / "test.parquet")
        assert load_prompts(str(tmp_path)).to_list() == ROWS
        assert load_prompts(str(tmp_path), "test").to_list() == ROWS[1:]
        with pytest.raises(UserError, match="no file for the split `dev`: it has test.parquet, train.jsonl"):
            load_prompts(str(tmp_path), "dev")

    def test_a_column_that_some_rows_lack(self, tmp_path):
        rows = load_prompts(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "x"}, {"prompt": "y", "answer": "1"}]))
        assert rows["answer"][:] == [None, "1"]

    def test_line_separators_inside_strings(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"prompt": "a\u2028b"}\n\n', encoding="utf-8")
        assert load_prompts(str(tmp_path / "a.jsonl"))["prompt"][:] == ["a\u2028b"]


class TestSources:
    def test_gsm8k_row(self):
        row = SOURCES["gsm8k"].to_row(GSM8K)
        assert row["answer"] == "3000"
        assert row["solution"] == "There are 2*1500=3000 clips.\nSo $3000."
        (message,) = row["prompt"]
        assert message["role"] == "user"
        assert message["content"].startswith(GSM8K["question"]) and r"\boxed{}" in message["content"]
        assert set(row) == {"prompt", "answer", "solution"}

    def test_math_500_row_keeps_other_columns(self):
        raw = {"problem": "p", "answer": r"\frac12", "solution": "s", "level": 3}
        row = SOURCES["math-500"].to_row(raw)
        assert (row["answer"], row["solution"], row["level"]) == (r"\frac12", "s", 3)
        assert "solution" not in SOURCES["math-500"].to_row({"problem": "p", "answer": "1"})

    def test_dapo_row_has_no_solution(self):
        row = SOURCES["dapo-math-17k"].to_row({"prompt": "p", "solution": "34", "data_source": "d"})
        assert row["answer"] == "34" and row["data_source"] == "d" and "solution" not in row
        assert row["prompt"][0]["content"].startswith("p\n\n")

    @pytest.mark.parametrize(
        ("solution", "answer"),
        [
            (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
            (r"$\boxed{1}$, no, $\boxed{x^{2}}$", "x^{2}"),
            (r"so $\boxed 2$.", "2"),
            (r"so \fbox{3} {and}", "3"),
        ],
    )
    def test_math_row(self, solution, answer):
        row = SOURCES["math"].to_row({"problem": "p", "solution": solution, "level": "Level 5", "type": "Algebra"})
        assert (row["answer"], row["solution"], row["level"]) == (answer, solution, "Level 5")

    def test_mbpp_row(self):
        raw = {
            "task_id": 2,
            "text": "Write a function to find the shared elements.",
            "code": "import re\ndef help(a):\n  return set(a)\ndef shared(a, b):\n  return tuple(help(a) & help(b))",
            "test_list": ["assert set(shared((3, 4),(4, 5))) == set((4,))", "assert shared((), ()) == ()"],
            "test_setup_code": "import math",
            "challenge_test_list": [],
        }
        row = SOURCES["mbpp"].to_row(raw)
        assert row["entry_point"] == "shared" and raw["test_list"][0] in row["prompt"][0]["content"]
        assert raw["test_list"][1] not in row["prompt"][0]["content"]
        assert row["tests"] == "import math\n" + "\n".join(raw["test_list"]) + "\n"
        assert row["solution"] == f"```python\n{raw['code']}\n```"
        names = {}
        exec(raw["code"], names)
        exec(row["tests"], names)
        with pytest.raises(AssertionError):
            exec(row["tests"], {**names, "shared": lambda a, b: ()})

    def test_every_hub_name_is_asked_for(self, monkeypatch):
        asked = []

        def load(hub_id, config, split):
            asked.append((hub_id, config, split))
            return Dataset.from_list([{"input": "not True is", "target": "False"}])

        monkeypatch.setattr("trl_opsd.data.prompts.load_dataset", load)
        assert load_prompts("bbh:word_sorting", "test")["task"][:] == ["word_sorting"]
        assert asked == [("lukaemon/bbh", "word_sorting", "test")]
        assert len(load_prompts("bbh", "test")) == 27 == len({config for _, config, _ in asked})
        with pytest.raises(UserError, match="needs the column `question`"):
            load_prompts("gsm8k")
        assert asked[-1] == ("openai/gsm8k", "main", "train")

    def test_local_copy_of_a_source(self, tmp_path):
        write_jsonl(tmp_path / "test.jsonl", [GSM8K])
        for path in (tmp_path, tmp_path / "test.jsonl"):
            assert load_prompts(f"gsm8k:{path}", "test", ["solution"])["answer"][:] == ["3000"]

    def test_real_files(self):
        if not SHARED.is_dir():  # a checkout on its own has no benchmark data
            return
        for split, size in (("train", 7473), ("test", 1319)):
            dataset = load_prompts(f"gsm8k:{SHARED / 'gsm8k'}", split, ["answer", "solution"])
            assert len(dataset) == size
            assert all(answer.lstrip("-").isdigit() for answer in dataset["answer"])
            assert not any("<<" in text or "####" in text for text in dataset["solution"])
            assert min(map(len, dataset["solution"])) > 0
        dataset = load_prompts(f"math-500:{SHARED / 'math500' / 'test.jsonl'}", "test", ["answer"])
        assert len(dataset) == 500 and all(dataset["answer"])

    def test_real_code(self):
        if not SHARED.is_dir():
            return
        dataset = load_prompts(f"humaneval:{SHARED / 'humaneval'}", "test", ["tests", "entry_point", "solution"])
        assert len(dataset) == 164 and "canonical_solution" not in dataset.column_names
        for row in dataset:
            program = row["solution"].removeprefix("```python\n").removesuffix("```")
            assert f"def {row['entry_point']}(" in row["prompt"][0]["content"]
            compile(program + row["tests"], row["task_id"], "exec")
            if int(row["task_id"].split("/")[1]) % 20 == 0:
                exec(program + row["tests"], {})
                with pytest.raises((AssertionError, TypeError)):
                    exec(f"{program}\n{row['entry_point']} = lambda *_: None\n{row['tests']}", {})

    def test_real_tasks(self):
        if not SHARED.is_dir():
            return
        dataset = load_prompts(f"bbh:{SHARED / 'bbh'}", "test", ["answer", "task"])
        assert len(dataset) == 6511 and set(dataset["task"]) == set(SOURCES["bbh"].tasks)
        assert all(dataset["answer"])
        one = load_prompts(f"bbh:{SHARED / 'bbh' / 'snarks.json'}", "test")
        assert len(one) == 178 and set(one["task"]) == {"snarks"}


class TestReasoningGym:
    def test_parameters_and_seeds(self):
        short = load_prompts("reasoning-gym:chain_sum:size=20,min_terms=2,max_terms=2")
        assert len(short) == 20
        metadata = [json.loads(text) for text in short["metadata"]]
        assert {row["num_terms"] for row in metadata} == {2} and {row["source_dataset"] for row in metadata} == {
            "chain_sum"
        }
        assert short.to_list() == load_prompts("reasoning-gym:chain_sum:size=20,min_terms=2,max_terms=2").to_list()
        other = load_prompts("reasoning-gym:chain_sum:size=20,min_terms=2,max_terms=2,seed=1")
        assert other["prompt"][:19] == short["prompt"][1:]  # why splits are not neighbouring seeds
        test = load_prompts("reasoning-gym:chain_sum:size=20,min_terms=2,max_terms=2", "test")
        assert not {row["content"] for (row,) in test["prompt"]} & {row["content"] for (row,) in short["prompt"]}

    def test_lists(self):
        rows = load_prompts("reasoning-gym:basic_arithmetic:size=30,operators=['+','-']")
        assert not any("*" in row["content"] or "/" in row["content"] for (row,) in rows["prompt"])

    @pytest.mark.slow
    def test_every_task(self):
        from reasoning_gym.factory import DATASETS

        from trl_opsd.rewards import reasoning_gym_reward

        without = []
        for task in sorted(DATASETS.keys() - {"composite", "game_of_life_halting"}):
            rows = load_prompts(f"reasoning-gym:{task}:size=2")
            columns = {"answer": rows["answer"][:], "metadata": rows["metadata"][:]}
            if columns["answer"] == [None, None]:
                without.append(task)
                continue
            texts = [rf"\boxed{{{answer}}}" for answer in columns["answer"]]
            assert reasoning_gym_reward(texts, **columns) == [1.0, 1.0], task
            assert max(reasoning_gym_reward([r"\boxed{zzz}"] * 2, **columns)) < 1.0, task
        assert without == ["boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("reasoning-gym:chain_sums", "no task `chain_sums`: choose from ab, "),
            ("reasoning-gym:", "no task ``"),
            ("reasoning-gym:game_of_life_halting", "accepts any answer"),
            ("reasoning-gym:chain_sum:size", "`size` of `reasoning-gym:chain_sum` must be NAME=VALUE"),
            ("reasoning-gym:chain_sum:size=[1", "`size=\\[1` of `reasoning-gym:chain_sum` is not YAML"),
            ("reasoning-gym:chain_sum:seed=x", "does not take these parameters"),
            ("reasoning-gym:chain_sum:sizes=3", "does not take these parameters: .*sizes"),
            ("reasoning-gym:chain_sum:min_terms=5,max_terms=2", "does not take these parameters: .*max_terms"),
        ],
    )
    def test_errors(self, name, message):
        with pytest.raises(UserError, match=message):
            load_prompts(name)

    def test_split(self):
        with pytest.raises(UserError, match="no split `dev`: choose from train, test"):
            load_prompts("reasoning-gym:chain_sum", "dev")


class TestDecontaminate:
    TRAIN = ("What is $1 + 2$?", "what  is 1+2", "What is 1 - 2?", r"Find $\dfrac{1}{2}$.", "Find 1.5", "New", "New")
    EVALUATION = ("What is $1 + 2$?", r"Find $\frac{1}{2} $", "Find 15", "Other")

    def test_counts(self):
        train = Dataset.from_list([{"prompt": text, "id": number} for number, text in enumerate(self.TRAIN)])
        evaluation = Dataset.from_list(
            [SOURCES["math-500"].to_row({"problem": text, "answer": "1"}) for text in self.EVALUATION]
        )
        kept, counts = decontaminate(train, evaluation)
        assert kept["id"][:] == [2, 4, 5, 6]
        assert counts == {
            "train": 7,
            "evaluation": 4,
            "exact": 1,
            "normalized": 2,
            "overlapping": 0,
            "kept": 4,
            "evaluation_seen": 2,
        }

    @pytest.mark.parametrize("name", SOURCES)
    def test_the_wording_is_no_part_of_the_problem(self, name):
        prompt = SOURCES[name].prompt.replace("{problem}", "Prove it.")
        assert problem_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]) == (
            "Prove it."
        )

    def test_normalize(self):
        assert normalize(r"Let $x \, = \left( 1.5 \right)$, and  y!") == "letx=(1.5)andy"
        assert normalize("1-2") != normalize("1+2") and normalize("1.5") != normalize("15")
        for product in (r"2\*3", "2*3", "2 * 3", "2**3", "a_1"):
            assert normalize(product) not in ("23", "a1")
        assert normalize("**Find** the *sum* of __all__ _even_ 2*3.") == "findthesumofalleven2*3"

    LONG = (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips "
        "did Natalia sell altogether in April and May?"
    )
    SHORT = "What is the greatest prime factor of $3^4 + 11$?"

    @pytest.mark.parametrize(
        ("problem", "kept"),
        [
            (LONG, False),
            (f"{LONG} Explain each step in a sentence of its own.", False),
            (f"This is from a test. {LONG.replace('?', '')}", False),
            (LONG.partition(" How many")[0] + " What did she earn at 3 dollars a clip?", False),  # 20 of 29 words
            ("Natalia sold clips to 48 of her friends in April. What did she earn?", True),
            (LONG.replace("48", "52").replace("half as", "twice as"), True),  # another problem
            (SHORT + " Show that it is.", False),
            (SHORT.replace("11", "12"), True),
            (SHORT.replace("+", "-"), True),
            ("Find $x$ if $2x = 4$. Then find $3x$.", True),  # the evaluation problem of 6 words is part of it
        ],
    )
    def test_a_copy_with_something_around_it(self, problem, kept):
        evaluation = Dataset.from_dict({"prompt": [self.LONG, self.SHORT, "Find $x$ if $2x = 4$."]})
        train = Dataset.from_dict(
            {"prompt": [problem, "Something else entirely, as long as it has 13 words or more."]}
        )
        left, counts = decontaminate(train, evaluation)
        assert len(left) == 1 + kept and counts["evaluation_seen"] == 1 - kept

    def test_held_out(self, tmp_path, monkeypatch):
        train = Dataset.from_list([{"prompt": text} for text in (self.LONG, self.SHORT, "New")])
        raw = write_jsonl(tmp_path / "a.jsonl", [{"problem": self.LONG, "answer": "72"}])
        own = write_jsonl(tmp_path / "b.jsonl", [{"prompt": self.SHORT}])
        kept, names, line = hold_out(train, [f"math-500:{raw}", own])
        assert names == [f"math-500:{raw}", own]
        assert kept["prompt"][:] == ["New"] and line == f"held out: 2 of 3 rows (math-500:{raw} 1, {own} 1)"
        assert hold_out(train, ["none"])[0] is train
        with pytest.raises(UserError, match="There is no data at `c.jsonl`"):
            hold_out(train, ["c.jsonl"])
        with pytest.raises(UserError, match=r"All 1 training rows are also in .*b.jsonl: .* `--held_out none`"):
            hold_out(train.select([1]), [own])
        # By default: what an evaluation has left in the cache, as `datasets` names its folders
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
        kept, _, line = hold_out(train)
        assert len(kept) == 3 and line.startswith("held out: 0 of 3 rows; not compared with gsm8k, math-500, aime24")
        (tmp_path / "HuggingFaceH4___math-500").mkdir()
        loaded = load_prompts(f"math-500:{raw}")
        monkeypatch.setattr("trl_opsd.data.contamination.load_prompts", lambda name, split: loaded)
        kept, names, line = hold_out(train)
        assert len(kept) == 2 and names == ["math-500"]
        assert line.startswith("held out: 1 of 3 rows (math-500 1); not compared with gsm8k, aime24")

    @pytest.mark.parametrize(("began", "rows"), [([], 3), (["math-500"], 2), (["none"], 3)])
    def test_a_resumed_run_leaves_out_what_it_began_with(self, tmp_path, monkeypatch, began, rows):
        """Whatever has been evaluated on since: else the sampler would go on in other rows."""
        train = Dataset.from_list([{"prompt": text} for text in (self.LONG, self.SHORT, "New")])
        sets = {"math-500": [{"prompt": self.LONG}], "gsm8k": [{"prompt": self.SHORT}]}
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
        monkeypatch.setattr(
            "trl_opsd.data.contamination.load_prompts", lambda name, split: Dataset.from_list(sets[name])
        )
        for name in ("HuggingFaceH4___math-500", "openai___gsm8k"):
            (tmp_path / name).mkdir()
        assert len(hold_out(train)[0]) == 1
        record_held_out(str(tmp_path), began)
        checkpoint = str(tmp_path / "checkpoint-3")
        kept, names, line = hold_out(train, (), checkpoint)
        assert len(kept) == rows and names == began
        assert line.endswith(
            "as when the run began" if began == ["none"] else "when the run began (name them in `held_out`)"
        )
        assert len(hold_out(train, ["gsm8k"], checkpoint)[0]) == 2  # what is asked for now goes first

    def test_every_benchmark_is_held_out(self):
        assert {name: task.dataset_split for name, task in TASKS.items() if name != "reasoning-gym"} == HELD_OUT

    def test_command_line(self, tmp_path, capsys):
        train = write_jsonl(tmp_path / "a.jsonl", [{"prompt": text} for text in self.TRAIN])
        evaluation = write_jsonl(tmp_path / "b.jsonl", [{"prompt": text} for text in self.EVALUATION])
        for suffix in ("jsonl", "parquet"):
            output = tmp_path / "out" / f"clean.{suffix}"
            main(["--train", train, "--evaluation", evaluation, "--output", str(output)])
            assert "exact: 1\nnormalized: 2\noverlapping: 0\nkept: 4\n" in capsys.readouterr().out
            assert load_prompts(str(output))["prompt"][:] == [self.TRAIN[index] for index in (2, 4, 5, 6)]
        with pytest.raises(SystemExit):
            main(["--train", train, "--evaluation", train, "--output", str(tmp_path / "out" / "nothing.jsonl")])
        assert "error: All rows of" in capsys.readouterr().err
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clean.jsonl", "clean.parquet"]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--train", "a.jsonl"], "belong together"),
            (["--train", "a.jsonl", "--evaluation", "b.jsonl"], "There is no data at `a.jsonl`"),
            (["--train", "a", "--evaluation", "b", "--output", "c.csv"], "must end in .jsonl or .parquet"),
        ],
    )
    def test_mistakes(self, arguments, message, capsys):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err

    def test_table(self, capsys):
        main([])
        table = capsys.readouterr().out
        for name, source in SOURCES.items():
            (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} ")]
            assert source.licence in line and source.verifier in line and source.hub_id in line

    def test_real_files(self):
        if not SHARED.is_dir():
            return
        train = load_prompts(f"gsm8k:{SHARED / 'gsm8k'}", "train")
        test = load_prompts(f"gsm8k:{SHARED / 'gsm8k'}", "test")
        # Two trains that travel 3 hours beside one plane that does, in the same 24 words
        left, counts = decontaminate(train, test)
        assert counts["exact"] == counts["normalized"] == 0
        assert counts["overlapping"] == 2 and counts["evaluation_seen"] == 1
        kept, counts = decontaminate(test, test)
        assert len(kept) == counts["kept"] == 0 and counts["exact"] == 1319


class TestErrors:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "has no rows"),
            ('{"prompt": "a"}\n{"prompt": \n', "line 2: not valid JSON"),
            ("[1, 2]", "row 1: a row must be a JSON object"),
            ('[{"prompt": "a"}', "not valid JSON"),
            ('{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": "x"}', "one type per column"),
            ('{"question": "a", "answer": "#### 1"}', r"`prompt`; .*`question`, `answer`.*write `gsm8k:PATH`"),
        ],
    )
    def test_broken_file(self, tmp_path, content, message):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            load_prompts(str(tmp_path / "a.jsonl"))

    def test_not_text(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match="not UTF-8"):
            load_prompts(str(tmp_path / "a.jsonl"))

    def test_not_parquet(self, tmp_path):
        (tmp_path / "a.parquet").write_text("no")
        with pytest.raises(UserError, match="cannot be read"):
            load_prompts(str(tmp_path / "a.parquet"))

    def test_unknown_file_type(self, tmp_path):
        (tmp_path / "a.csv").write_text("prompt\n1")
        with pytest.raises(UserError, match=r"is none of \.jsonl, \.json, \.parquet"):
            load_prompts(str(tmp_path / "a.csv"))

    def test_empty_folder(self, tmp_path):
        with pytest.raises(UserError, match="neither a saved Dataset nor"):
            load_prompts(str(tmp_path))

    @pytest.mark.parametrize("name", ["no/such.jsonl", "./nowhere", "gsm8k:no/such/folder"])
    def test_missing_file(self, name):
        with pytest.raises(UserError, match="There is no data at"):
            load_prompts(name)

    def test_missing_split_of_a_source(self):
        with pytest.raises(UserError, match="`math-500` has no split `train`: choose from test"):
            load_prompts("math-500")

    def test_missing_column(self):
        with pytest.raises(UserError, match="The gate needs the column `tests`; the columns found are `prompt`"):
            check_columns(Dataset.from_list([{"prompt": "a"}]), ["prompt", "tests"], "The gate")

    def test_raw_rows_of_another_source(self, tmp_path):
        path = write_jsonl(tmp_path / "a.jsonl", [{"problem": "p", "answer": "1"}])
        with pytest.raises(UserError, match="The source `gsm8k` needs the column `question`"):
            load_prompts(f"gsm8k:{path}")

    @pytest.mark.parametrize(("name", "hub_id"), [("gsm8k", "openai/gsm8k"), ("some/where", "some/where")])
    def test_hub_out_of_reach(self, name, hub_id, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
        with pytest.raises(UserError, match=f"split `train` of `{hub_id}` cannot be loaded from the Hub") as info:
            load_prompts(name)
        assert "or give the path of a local file" in str(info.value)

    def test_name_misspelt(self, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
        with pytest.raises(UserError, match=r"check the name \(did you mean `gsm8k`\?\)"):
            load_prompts("gsm9k")
