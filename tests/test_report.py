import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from evaluated import CONFIG, records, write_run
from evaluation_world import save_checkpoint
from huggingface_hub import ModelCard

from trl_opsd.cli import UserError
from trl_opsd.evaluate.card import write_card
from trl_opsd.evaluate.checkpoint import open_checkpoint
from trl_opsd.evaluate.commands import card_command, report_command
from trl_opsd.evaluate.compare import compare_files
from trl_opsd.evaluate.report import TRACE_CHARACTERS, report_results, traces
from trl_opsd.evaluate.schema import to_json
from trl_opsd.evaluate.svg import Series, chart, mark, number, ticks
from trl_opsd.results import write_results


HOSTILE = "</pre></script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\" onload='x' {{ 12345 * 54321 }} ]]> |\n`"


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the texts."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self.inside = [], [], None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag

    def handle_data(self, data):
        if self.inside not in ("script", "style"):
            self.texts.append(data)

    def count(self, tag):
        return sum(element == tag for element, _ in self.elements)

    @property
    def text(self):
        return "".join(self.texts)


def label_boxes(drawn):
    """Left, top, right and bottom of the labels, as wide as an average letter of their font is."""
    found = re.findall(r'class="label" [^>]* x="(\S+)" y="(\S+)">([^<]*)<', drawn)
    return [(float(x), float(y) - 9, float(x) + 6.2 * len(text), float(y) + 2) for x, y, text in found]


def mark_boxes(drawn):
    """The same of the marks: a circle begins at its left, a square at its corner, the others at their top."""
    boxes = []
    for shape in re.findall(r'class="mark" [^>]* d="([^"]*)"', drawn):
        x, y = re.match(r"M(\S+) ([\d.]+)", shape).groups()
        kind = re.sub(r"^M\S+ [\d.]+", "", shape)[0]
        x, y = float(x), float(y)
        if kind == "a":
            x += 4.5
        elif kind == "h":
            x, y = x + 4, y + 4
        else:
            y += 5.5
        boxes.append((x - 4.5, y - 4.5, x + 4.5, y + 4.5))
    return boxes


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    files = []
    for stage, share, tokens, parameters in (
        ("rlvr", 0.9, 60, 1000),
        ("concise", 0.8, 30, 1000),
        ("opsd", 0.9, 25, 500),
    ):
        samples = records(stage, rng.random((200, 2)) < share, rng.integers(tokens - 9, tokens + 9, size=(200, 2)))
        files.append(write_run(tmp_path / f"{stage}.json", samples, parameters=parameters))
    return files


class TestReport:
    def test_the_whole(self, files, tmp_path):
        report_results(files, tmp_path / "report")
        assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
            "accuracy_tokens.svg",
            "report.html",
            "report.md",
        ]
        text = (tmp_path / "report" / "report.md").read_text()
        page = Page((tmp_path / "report" / "report.html").read_text())
        for after in files[1:]:
            (comparison,) = compare_files(str(files[0]), str(after))
            assert comparison.sentence() in text and comparison.sentence() in page.text
            assert comparison.headline() in text and comparison.headline() in page.text
        for heading in ("accuracy (95% interval)", "pass@2", "maj@2", "tokens, mean", "p90", "right by strict only"):
            assert f"| {heading} |" in text and heading in page.text
        assert "not verifiable" not in text and "thinking tokens" not in text  # there is none
        assert page.count("figure") == 4  # against tokens and parameters, budget, lengths
        assert page.count("tr") == 2 + 1 + 3  # the grid of one task, and the table
        assert "What is 0 + 1?" in page.text or "wait, " in page.text

    def test_the_answer_comes_first(self, files, tmp_path):
        report_results(files, tmp_path)
        html = (tmp_path / "report.html").read_text()
        (comparison,) = compare_files(str(files[0]), str(files[2]))
        first = re.search(r"<p class=\"first (\w+)\">(.*?)</p>", html, re.DOTALL)
        assert first[1] == comparison.answer.name.lower()
        assert Page(first[2]).text.split() == f"{comparison.answer.sign} {comparison.headline()}".split()
        body = html[html.index("<body>") :]
        places = [
            body.index(part)
            for part in (
                'class="first',
                'class="scroll grid"',
                'class="numbers"',
                "<svg",
                "McNemar" if comparison.p_value else "95% interval of",
                "How to read",
            )
        ]
        assert places[0] < places[1] < places[2] < places[3]
        (other,) = compare_files(str(files[0]), str(files[1]))
        cells = re.findall(r'<td class="(\w+)"><b>(.*?)</b>', html)
        assert cells == [
            (item.answer.name.lower(), f"{item.answer.sign} {100 * item.difference[0]:+.1f}".replace("-", "−"))
            for item in (comparison, other)  # the last checkpoint first
        ]

    def test_rare_columns_are_there_when_asked_for(self, files, tmp_path):
        report_results(files, tmp_path)
        html = (tmp_path / "report.html").read_text()
        rare = re.findall(r'<th scope="col" class="rare"><button>(.*?)</button>', html)
        assert "p90" in rare and "pass@2" in rare and not {"accuracy (95% interval)", "truncated", "task"} & set(rare)
        assert html.count('class="rare"') == 4 * len(rare)  # the heading and three lines
        assert "#more:not(:checked) ~ .scroll .rare { display: none; }" in html and 'id="more"' in html

    def test_warnings_are_in_the_same_place(self, tmp_path):
        files = []
        for name in ("a", "b"):
            samples = records(name, np.ones((90, 1)), 10)
            for sample in samples[:9]:
                sample.update(truncated=True, correct=False)
            files.append(write_run(tmp_path / f"{name}.json", samples))
        report_results(files, tmp_path)
        html, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
        warning = "Completions cut at the limit, which count as wrong and have no length: a on sums, greedy 10.0%"
        assert html.index(warning) < html.index('class="scroll grid"') and f"- ! {warning}; b on sums" in text
        assert "| ≥ 10.0 (" in text and "some cut at the limit</text>" in html

    def test_opens_offline(self, files, tmp_path):
        report_results(files, tmp_path)
        html = (tmp_path / "report.html").read_text()
        for _, attributes in Page(html).elements:
            assert not attributes.keys() & {"src", "href", "srcset", "data", "action"}
        assert "url(" not in html and "@import" not in html
        assert set(re.findall(r"https?://[^\s<\"]+", html)) == set()

    def test_a_mark_lies_where_its_numbers_say(self):
        svg = chart([Series("a", 0, [0, 10, 40], [20, 40, 100], y_error=[(20, 40), (40, 40), (100, 100)])], "x", "y")
        marks = re.findall(r' class="mark" .*? d="M(\S+) (\S+?)a', svg)
        (x_a, x_b, x_c), (y_a, y_b, y_c) = np.array(marks, dtype=float).T
        assert (x_c - x_a) / (x_b - x_a) == pytest.approx(4, abs=0.01)
        assert (y_c - y_a) / (y_b - y_a) == pytest.approx(4, abs=0.01) and y_c < y_a  # up is more
        low, high = re.search(r' class="error" .*? d="M\S+ (\S+?)h8m-4 0V(\S+?)m', svg).groups()
        assert (float(low), float(high)) == pytest.approx((y_a, y_b))

    @pytest.mark.parametrize("seed", range(12))
    def test_no_label_lies_on_another_or_on_a_point(self, seed):
        rng = np.random.default_rng(seed)
        series = []
        for index in range(rng.integers(2, 7)):
            x, y = rng.choice([20.0, 21.0, 48.0], 2), rng.choice([99.8, 99.9, 100.0, 80.0], 2)
            error = [(value - 0.5, value + 0.1) for value in y]
            series.append(Series(f"checkpoint {index}", index, x, y, y_error=error, name=f"checkpoint {index}"))
        drawn = chart(series, "tokens", "accuracy, %", x_from=0, y_span=10, y_to=100)
        labels, marks = label_boxes(drawn), mark_boxes(drawn)
        assert len(labels) == len(series)
        for place, (left, top, right, bottom) in enumerate(labels):
            assert 0 <= left and right <= 340 and 0 <= top and bottom <= 250
            for other in [*labels[:place], *marks]:
                assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top

    def test_no_room_is_no_label(self):
        crowd = [Series(f"{'x' * 20}{i}", i, [i % 6], [i % 5], name=f"{'x' * 20}{i}") for i in range(60)]
        labels = label_boxes(chart(crowd, "x", "y"))
        assert 3 < len(labels) < 60

    def test_the_labels_of_the_first_page(self):
        picture = (Path(__file__).parents[1] / "recipes/results/tiny_chain/accuracy_tokens.svg").read_text()
        panels = re.findall(r'<svg x="[\d.]+" width.*?</svg>', picture, re.DOTALL)
        assert len(panels) == 2
        for panel in panels:
            labels, marks = label_boxes(panel), mark_boxes(panel)
            assert len(labels) == 3 and len(marks) == 9
            for place, (left, top, right, bottom) in enumerate(labels):
                for other in [*labels[:place], *marks]:
                    assert right <= other[0] or other[2] <= left or bottom <= other[1] or other[3] <= top

    @pytest.mark.parametrize("accuracy", [0.0, 1.2])
    def test_an_axis_does_not_go_below_zero(self, accuracy):
        drawn = chart([Series("model", 0, [50.0], [accuracy])], "tokens", "accuracy, %", y_span=10, y_to=100)
        labels = re.findall(r">([^<>]+)</text>", drawn)
        assert "0" in labels and "10" in labels and not any(label.startswith(("-", "−")) for label in labels)

    def test_many_checkpoints_are_told_apart(self):
        found = {re.sub(r"M\S+ \S+?(?=[ahl])", "", mark(index, 7, 7)) for index in range(32)}
        assert len(found) == 32

    @pytest.mark.parametrize(("low", "high"), [(0, 1), (97.3, 100), (0, 8192), (0.001, 0.0023), (-5, 5)])
    def test_ticks_are_few_and_inside(self, low, high):
        found = ticks(low, high)
        assert 2 <= len(found) <= 8 and low - 1e-9 <= found[0] and found[-1] <= high * (1 + 1e-9)
        assert np.allclose(np.diff(found), found[1] - found[0])
        assert len({number(tick) for tick in found}) == len(found)

    def test_every_change_of_verdict_is_counted(self, files):
        completions = files[2].with_suffix(".completions.jsonl")
        completions.write_text("\n".join(completions.read_text().splitlines()[::-1]))  # problems in another order
        (comparison,) = compare_files(str(files[0]), str(files[2]))
        kinds = traces(comparison)
        before, after = comparison.before.samples.correct[:, 0], comparison.after.samples.correct[::-1, 0]
        assert {kind["kind"]: kind["count"] for kind in kinds} == {
            "right before, wrong after": (before & ~after).sum(),
            "wrong before, right after": (~before & after).sum(),
            "right both times": (before & after).sum(),
            "wrong both times": (~before & ~after).sum(),
        }
        for kind in kinds:
            for old, new in kind["pairs"]:
                assert old.id == new.id and (old.stage, new.stage) == ("rlvr", "opsd")

    def test_without_completions(self, tmp_path):
        rows = [write_run(tmp_path / f"{s}.json", records(s, np.ones((9, 1)), 10), save=False) for s in ("a", "b")]
        report_results(rows, tmp_path)
        page = Page((tmp_path / "report.html").read_text())
        assert page.count("figure") == 1 and "were not saved" in page.text
        sentence = "? undecided: b against a on sums, greedy: +0.00 points (95% interval -29.91 to +29.91"
        assert f"{sentence}, margin 1, 9 problems, not paired" in page.text

    def test_latency_against_concurrency(self, tmp_path):
        serving = [{"concurrency": c, "total_p50_s": 0.1 * c, "tokens_per_s": 50.0 * c} for c in (1, 4, 16)]
        report_results([write_run(tmp_path / "a.json", records("a", np.ones((9, 1)), 10), serving=serving)], tmp_path)
        text = Page((tmp_path / "report.html").read_text()).text
        assert "Latency against concurrency" in text and "Throughput against concurrency" in text

    def test_costs_and_backends(self, tmp_path):
        samples = records("a", np.arange(10)[:, None] < 5, 10)
        values = {"non_embedding_parameters": 7, "peak_memory_bytes": 3 * 2**20, "generation_s": 2.0}
        files = [
            write_run(tmp_path / f"{backend}.json", samples, backend=backend, **values)
            for backend in ("transformers", "vllm")
        ]
        assert report_command(["--report", *map(str, files), "--output_dir", str(tmp_path), "--price", "50"]) == 0
        text = (tmp_path / "report.md").read_text()
        flops, cost = 1000 * 20 * 2 * 7, 1000 * 20 * 50 / 1e6  # 20 tokens for each right answer
        assert f"| {flops:.2e} | {cost:g} | 3.0 | 2 |" in text and "at a price of 50" in text
        assert "| a | sums |" in text and "| a, vllm | sums |" in text

    def test_a_report_is_whole_or_not_there(self, files, tmp_path, capsys):
        files[1].with_suffix(".completions.jsonl").write_text("{")
        with pytest.raises(SystemExit) as error:
            report_command(["--report", *map(str, files), "--output_dir", str(tmp_path / "report")])
        assert error.value.code == 2 and "line 1: not valid JSON" in capsys.readouterr().err
        assert not (tmp_path / "report").exists()

    def test_where_no_report_can_be_written(self, files, capsys):
        with pytest.raises(SystemExit) as error:
            report_command(["--report", *map(str, files), "--output_dir", str(files[0])])
        said = capsys.readouterr().err
        assert error.value.code == 2 and said.startswith(f"error: `output_dir`: the folder `{files[0]}` cannot be")
        assert said.count("\n") == 1

    def test_two_rows_of_one_name(self, files, tmp_path):
        with pytest.raises(UserError, match="there is another rlvr on sums, greedy"):
            report_results([files[0], files[0]], tmp_path)

    def test_before(self, files, tmp_path):
        report_results(files, tmp_path, before="concise")
        assert "✓ as good: opsd against concise on" in (tmp_path / "report.md").read_text()
        with pytest.raises(UserError, match="There is no `sft` to compare with: the results hold rlvr, concise, opsd"):
            report_results(files, tmp_path, before="sft")

    def test_a_p_value_is_no_smaller_than_anyone_reads(self, tmp_path):
        files = [
            write_run(tmp_path / f"{name}.json", records(name, np.full((99, 1), right), 10))
            for name, right in (("a", True), ("b", False))
        ]
        report_results(files, tmp_path)
        assert "99 problems, McNemar p < 0.0001)" in Page((tmp_path / "report.html").read_text()).text

    def test_before_by_stage(self, tmp_path):
        samples = {name: records(name, np.ones((9, 1)), 10) for name in ("a", "b")}
        files = [write_run(tmp_path / f"{n}.json", samples[n], backend="vllm") for n in samples]
        report_results(files, tmp_path, before="b")
        assert "? undecided: a, vllm against b, vllm on" in (tmp_path / "report.md").read_text()
        files.insert(0, write_run(tmp_path / "t.json", samples["b"]))
        report_results(files, tmp_path, before="b")  # a label says it more exactly than a stage
        assert "? undecided: a, vllm against b on" in (tmp_path / "report.md").read_text()


class TestHostileTexts:
    @pytest.fixture
    def page(self, tmp_path):
        files = []
        for name in ("a", "b"):
            samples = records(name + HOSTILE, np.ones((9, 1)), 10, completion=HOSTILE, question=HOSTILE, task=HOSTILE)
            files.append(write_run(tmp_path / f"{name}.json", samples, config={**CONFIG, "note": HOSTILE}))
        report_results(files, tmp_path, title=HOSTILE)
        return tmp_path

    def test_nothing_of_theirs_runs(self, page):
        html = (page / "report.html").read_text()
        seen = Page(html)
        assert seen.count("script") == 1 and seen.count("img") == 0 and html.count("<script") == 1
        assert not [name for _, attributes in seen.elements for name in attributes if name.startswith("on")]
        assert seen.text.count(HOSTILE) >= 4  # shown as it is: question, completion before and after, labels
        assert "670592745" not in seen.text  # which a commit or a time does not hold by chance

    def test_the_page_forbids_every_script_but_its_own(self, page):
        import base64
        import hashlib

        html = (page / "report.html").read_text()
        script = re.search(r"<script>(.*?)</script>", html, re.DOTALL).group(1)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        (policy,) = [attributes["content"] for tag, attributes in Page(html).elements if "http-equiv" in attributes]
        assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"

    def test_the_picture_and_the_table(self, page):
        assert Page((page / "accuracy_tokens.svg").read_text()).count("script") == 0
        lines = (page / "report.md").read_text().splitlines()
        tables = re.findall(r"(?:^\|.*\n)+", "\n".join(lines), flags=re.MULTILINE)
        assert len(tables) == 3 and "<script" not in "".join(lines)  # the grid, the first columns, and all of them
        for table in tables:
            assert len({re.sub(r"\\\|", "", line).count("|") for line in table.splitlines()}) == 1

    def test_long_and_odd_texts(self, tmp_path):
        files = []
        for name in ("a", "b"):
            samples = records(
                name, np.ones((9, 1)), 10, completion="x" * (TRACE_CHARACTERS + 5), question="\ud800\u202e"
            )
            files.append(write_run(tmp_path / f"{name}.json", samples))
        report_results(files, tmp_path)
        assert "[… 5 more characters]" in (tmp_path / "report.html").read_text(encoding="utf-8")


class TestCard:
    @pytest.fixture
    def folder(self, tmp_path):
        """A checkpoint that OPSD has left, from one that RLVR has left, from a model on the Hub."""
        folder, start = tmp_path / "small", tmp_path / "start"
        save_checkpoint(folder)
        start.mkdir()
        config = {"gate": "correct", "beta": 1.0, "dataloader_num_workers": 3, "seed": 4}
        write_results(
            folder / "opsd.json", [], {**config, "model_name_or_path": str(start), "dataset_name": "gsm8k:a.jsonl"}
        )
        write_results(start / "rlvr.json", [], {"model_name_or_path": "some/model", "dataset_name": "their/data"})
        (start / "README.md").write_text("---\nlicense: mit\n---\n\nBy hand.\n")
        return folder

    @pytest.fixture
    def measured_files(self, files, folder):
        """Results in which `opsd` is the checkpoint of that folder."""
        for file in files:
            results = json.loads(file.read_text())
            for row in results["rows"]:
                row["checkpoint_hash"] = open_checkpoint(str(folder)).hash if row["stage"] == "opsd" else "0" * 64
            file.write_text(json.dumps(results))
        return files

    def test_parses_back(self, measured_files, folder):
        files = measured_files
        assert card_command(["--card", *map(str, files), "--output_dir", str(folder), "--before", "rlvr"]) == 0
        card = ModelCard.load(folder / "README.md")
        assert card.data.model_name == "small" and "trl-opsd" in card.data.tags
        results = {result.metric_name: result for result in card.data.eval_results}
        assert {result.dataset_name for result in results.values()} == {"sums"}
        (comparison,) = compare_files(str(files[0]), str(files[2]))
        row = to_json(comparison.after.row)
        assert results["mean@2, strict, greedy"].metric_value == row["accuracy"]
        assert results["mean@2, strict, greedy"].metric_args == {
            "problems": 200,
            "low": row["accuracy_low"],
            "high": row["accuracy_high"],
        }
        assert results["pass@2, greedy"].metric_value == row["pass@2"]
        assert results["completion tokens, mean, greedy"].metric_value == row["mean_tokens"]
        assert comparison.sentence() in card.text
        assert "gate: correct\nbeta: 1.0\nseed: 4" in card.text and "dataloader" not in card.text

    def test_licence_base_model_and_data(self, measured_files, folder):
        card = ModelCard.load(write_card(measured_files, folder))
        assert (card.data.base_model, card.data.license) == ("some/model", "mit")
        assert card.data.datasets == ["openai/gsm8k", "their/data"]
        assert "opsd on `openai/gsm8k`; rlvr on `their/data`" in card.text and "Licence: mit." in card.text
        assert (
            card_command(["--card", *map(str, measured_files), "--output_dir", str(folder), "--licence", "gemma"]) == 0
        )
        assert ModelCard.load(folder / "README.md").data.license == "gemma"

    def test_what_is_not_recorded_is_not_claimed(self, measured_files, folder):
        (folder / "opsd.json").unlink()
        card = ModelCard.load(write_card(measured_files, folder))
        assert card.data.base_model is card.data.license is card.data.datasets is None
        assert "Licence: not recorded" in card.text and "no record of the stage" in card.text

    @pytest.mark.parametrize("changed", [False, True])
    def test_its_own_card_is_replaced_until_a_person_changes_it(self, measured_files, folder, changed, capsys):
        path = write_card(measured_files, folder, before="concise")
        if changed:
            path.write_text(path.read_text().replace("## Recipe", "I tried it at home.\n\n## Recipe"))
        text = path.read_text()
        arguments = ["--card", *map(str, measured_files), "--output_dir", str(folder)]
        if changed:
            with pytest.raises(SystemExit) as error:
                card_command(arguments)
            assert error.value.code == 2 and "by a person, and is not overwritten" in capsys.readouterr().err
            assert path.read_text() == text
        else:
            assert card_command(arguments) == 0 and path.read_text() != text

    @pytest.mark.parametrize("text", ["# My model\n", "", "---\nlicense: mit\n---\n\nBy hand.\n", "---\n: [\n---\n"])
    def test_a_readme_of_a_persons_stays(self, measured_files, folder, text):
        (folder / "README.md").write_text(text)
        with pytest.raises(UserError, match="by a person, and is not overwritten"):
            write_card(measured_files, folder)
        assert (folder / "README.md").read_text() == text

    def test_the_card_of_the_trainer_is_kept(self, measured_files, folder):
        theirs = "---\ntags:\n- generated_from_trainer\nlicense: apache-2.0\n---\n\nTrained.\n"
        (folder / "README.md").write_text(theirs)
        card = ModelCard.load(write_card(measured_files, folder))
        assert card.data.license == "apache-2.0" and (folder / "README.trl.md").read_text() == theirs

    def test_of_other_weights_nothing_is_said(self, measured_files, folder):
        save_checkpoint(folder, seed=1)  # trained on since
        with pytest.raises(UserError, match="has measured other weights as `opsd` than those in"):
            write_card(measured_files, folder)
        with pytest.raises(UserError, match="has measured other weights as `rlvr` than those in"):
            write_card(measured_files, folder, stage="rlvr")
        assert not (folder / "README.md").exists()

    def test_weights_that_are_not_named(self, files, folder):
        with pytest.raises(UserError, match="does not say which weights `opsd` are"):
            write_card(files, folder)

    def test_limitations_come_from_the_rows(self, tmp_path, folder):
        samples = records("a", np.array([[True], [None], [False], [False]], dtype=object), 10)
        samples[2].update(truncated=True)
        samples[3].update(correct_flexible=True)
        (folder / "opsd.json").unlink()
        file = write_run(tmp_path / "a.json", samples, checkpoint_hash=open_checkpoint(str(folder)).hash)
        text = write_card([file], folder).read_text()
        assert "33.3% of the completions had not ended" in text and "1 problems could not be verified" in text
        assert "disagree on 1 completions" in text and "no record of the stage" in text
        assert "completion tokens, mean, greedy, at least (some were cut at the limit)" in text

    def test_hostile_labels(self, tmp_path, folder):
        samples = records(HOSTILE, np.ones((9, 1)), 10, task=HOSTILE)
        file = write_run(tmp_path / "a.json", samples, checkpoint_hash=open_checkpoint(str(folder)).hash)
        text = Path(write_card([file], folder)).read_text()
        assert ModelCard(text).data.eval_results[0].dataset_name == HOSTILE
        assert "<script" not in ModelCard(text).text

    @pytest.mark.parametrize("recorded", ["", "[]", '{"run": {"config": []}}', "{"])
    def test_a_damaged_record(self, measured_files, folder, recorded):
        (folder / "opsd.json").write_text(recorded)
        with pytest.raises(UserError, match="is damaged: it is no record of a stage"):
            write_card(measured_files, folder)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--output_dir", "nowhere"], "There is no checkpoint at `nowhere`"),
            (
                ["--output_dir", ".", "--stage", "sft"],
                "There is no `sft` in the results: they hold rlvr, concise, opsd",
            ),
        ],
    )
    def test_refuses(self, files, arguments, message, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as error:
            card_command(["--card", *map(str, files), *arguments])
        assert error.value.code == 2 and message in capsys.readouterr().err
        assert not Path("README.md").exists()
