import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from trl_opsd.cli import UserError
from trl_opsd.data import SOURCES, check_columns, load_prompts


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
