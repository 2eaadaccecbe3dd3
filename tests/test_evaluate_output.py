"""What `python -m trl_opsd.evaluate` prints of what it measured."""

import re

from evaluation_world import save_checkpoint, sum_rows, write_rows

from trl_opsd.evaluate.__main__ import main
from trl_opsd.evaluate.results_file import load_results


def test_concurrency_is_shown_where_it_is_run(tmp_path, capsys):
    data = write_rows(tmp_path / "sums.jsonl", sum_rows())
    options = ["--concurrency", "1", "2", "--max_completion_length", "3", "--output", str(tmp_path / "results.json")]
    main(["--model_name_or_path", save_checkpoint(tmp_path / "model"), "--dataset_name", data, *options])
    head, *lines = capsys.readouterr().out.splitlines()
    (measured,) = load_results(tmp_path / "results.json")
    assert len(lines) == len(measured.row.serving) == 2
    for line, level in zip(lines, measured.row.serving, strict=True):
        number = r"([\d.,e+-]+)"
        found = re.fullmatch(
            rf"  (\d+) at a time: first token p50 {number} s, answer p50 {number} s, p95 {number} s, {number} tokens/s, "
            rf"{number} answers/s",
            line,
        )
        concurrency, first, half, most, tokens, answers = (float(text.replace(",", "")) for text in found.groups())
        assert concurrency == level.concurrency and first == float(f"{level.first_token_p50_s:.3g}")
        assert (half, most) == (float(f"{level.total_p50_s:.3g}"), float(f"{level.total_p95_s:.3g}"))
        assert tokens == round(level.tokens_per_s) and answers == float(f"{level.requests_per_s:.3g}")


def test_lengths_of_what_was_cut_are_bounds(tmp_path, capsys):
    data = write_rows(tmp_path / "sums.jsonl", sum_rows())
    main(
        [
            "--model_name_or_path",
            save_checkpoint(tmp_path / "model"),
            "--dataset_name",
            data,
            "--max_completion_length",
            "3",
        ]
    )
    line = capsys.readouterr().out
    assert "tokens mean ≥ 3.0, p90 ≥ 3, truncated 100.0%" in line
