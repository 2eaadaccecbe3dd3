"""The chain: what is finished is not done again, and what is not whole is not finished."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from evaluated import records, write_run

from trl_opsd.cli import UserError
from trl_opsd.compress import CompressConfig, Stage, plan_stages, run_chain
from trl_opsd.compress.__main__ import main
from trl_opsd.compress.chain import StageError
from trl_opsd.evaluate.compare import compare_files


ROOT = Path(__file__).parents[1]


@pytest.fixture
def chain(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{ROOT}")
    recipes = {name: tmp_path / f"{name}.yaml" for name in ("rlvr", "opsd")}
    for path in recipes.values():
        path.write_text("a: 1")
    counter = tmp_path / "runs.txt"
    seen = []

    class Chain:
        def stages(self, **failures):
            stages = []
            for name, recipe in recipes.items():
                arguments = {"output_dir": str(tmp_path / name), "counter": str(counter)}
                if name in failures:
                    arguments["fail"] = failures[name]
                stages.append(Stage(name, f"training {name}", "fake_stage", str(recipe), arguments, tmp_path / name))
                output = tmp_path / f"{name}.json"
                arguments = {"output": str(output), "counter": str(counter)}
                stages.append(Stage(name, f"measuring {name}", "fake_stage", str(recipe), arguments, output))
            return stages

        def run(self, **failures):
            counter.write_text("")
            seen.clear()
            run_chain(
                self.stages(**failures),
                tmp_path / "logs",
                [sys.executable],
                lambda stage, done, total, left: seen.append((stage.what, done, total, left)),
            )
            return self.ran()

        def ran(self):
            return counter.read_text().splitlines()

    result = Chain()
    result.recipes, result.seen = recipes, seen
    return result


EVERYTHING = ["rlvr", "rlvr.json", "opsd", "opsd.json"]


def test_what_is_finished_is_not_done_again(chain):
    assert chain.run() == EVERYTHING
    assert [step for what, *step, _ in chain.seen if what == "training rlvr"] == [[0, 0], *([i, 4] for i in range(5))]
    assert chain.run() == []
    assert [what for what, *_ in chain.seen] == ["training rlvr", "measuring rlvr", "training opsd", "measuring opsd"]


def test_a_changed_recipe_redoes_its_stage_and_what_follows(chain):
    chain.run()
    chain.recipes["opsd"].write_text("a: 2")
    assert chain.run() == ["opsd", "opsd.json"]
    chain.recipes["rlvr"].write_text("a: 2")
    assert chain.run() == EVERYTHING


def test_a_failed_stage_names_itself_and_its_reason_and_is_done_again(chain, tmp_path):
    with pytest.raises(UserError, match=r"stage `opsd` failed: no teacher \(its output is in .*opsd.log\)"):
        chain.run(opsd="no teacher")
    assert chain.ran() == ["rlvr", "rlvr.json", "opsd"]
    assert (tmp_path / "opsd" / "model.safetensors").exists()  # half an output is there, and does not count
    assert chain.run() == ["opsd", "opsd.json"]


def test_half_an_output_is_not_finished(chain, tmp_path):
    chain.run()
    (tmp_path / "opsd" / "config.json").unlink()
    assert chain.run() == ["opsd"]


@pytest.fixture
def interrupted(chain, tmp_path, monkeypatch):
    """A chain that ended within its stage `opsd`, which has left a checkpoint."""
    monkeypatch.setenv("FAIL_opsd", "power cut")
    with pytest.raises(UserError, match="power cut"):
        chain.run()
    monkeypatch.delenv("FAIL_opsd")
    checkpoint = tmp_path / "opsd" / "checkpoint-10"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    return checkpoint


def test_an_interrupted_training_goes_on_from_its_checkpoint(chain, interrupted):
    assert chain.run() == [f"opsd {interrupted}", "opsd.json"]


def test_a_checkpoint_that_was_half_written_is_not_gone_on_from(chain, interrupted, tmp_path):
    (tmp_path / "opsd" / "checkpoint-20").mkdir()
    assert chain.run() == [f"opsd {interrupted}", "opsd.json"]


def test_an_adapter_is_a_whole_output_too(chain, tmp_path):
    chain.run()
    (tmp_path / "opsd" / "config.json").rename(tmp_path / "opsd" / "adapter_config.json")
    assert chain.run() == []


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("import sys; print('error: too few are correct'); sys.exit(3)", 3),
        ("import sys; print('error: too few are correct'); print('  exitcode  : 3 (pid: 7)'); sys.exit(1)", 3),
        ("class OPSDAlarm(Exception): pass\nraise OPSDAlarm('not finite')", 3),
        ("raise MemoryError('no memory left')", 1),
        ("import sys; print('error: wrong option'); sys.exit(2)", 2),
    ],
)
def test_an_alarm_is_told_from_a_crash(tmp_path, monkeypatch, ending, status):
    (tmp_path / "ends.py").write_text(ending)
    (tmp_path / "recipe.yaml").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    stage = Stage("x", "training", "ends", str(tmp_path / "recipe.yaml"), {}, tmp_path / "x")
    with pytest.raises(StageError) as end:
        run_chain([stage], tmp_path / "logs", [sys.executable], lambda *progress: None)
    assert end.value.status == status


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends a child with its parent on Linux alone")
def test_a_chain_that_is_killed_takes_its_stage_along(tmp_path):
    (tmp_path / "sleeper.py").write_text(
        "import os, pathlib, time\npathlib.Path('pid.tmp').write_text(str(os.getpid()))\n"
        "os.rename('pid.tmp', 'pid')\ntime.sleep(100)"
    )
    (tmp_path / "recipe.yaml").write_text("a: 1")
    program = (
        "import pathlib, sys\nfrom trl_opsd.compress import Stage, run_chain\n"
        "stage = Stage('x', 'x', 'sleeper', 'recipe.yaml', {}, pathlib.Path('x'))\n"
        "run_chain([stage], pathlib.Path('logs'), [sys.executable], lambda *progress: None)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment)
    try:
        while not (tmp_path / "pid").is_file():
            assert parent.poll() is None
            time.sleep(0.05)
        child = Path("/proc") / (tmp_path / "pid").read_text()
        assert child.exists()
    finally:
        parent.kill()
        parent.wait()
    until = time.monotonic() + 10
    while child.exists() and "zombie" not in (child / "status").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_another_recipe_does_not_go_on_from_the_checkpoint(chain, interrupted, tmp_path, caplog):
    chain.recipes["opsd"].write_text("a: 3")
    assert chain.run() == ["opsd", "opsd.json"]
    aside = tmp_path / "opsd-old-1"
    assert (aside / "checkpoint-10").is_dir() and not interrupted.exists()
    assert f"`{tmp_path / 'opsd'}` was made by another configuration" in caplog.text and str(aside) in caplog.text
    chain.recipes["opsd"].write_text("a: 2")
    assert chain.run() == ["opsd", "opsd.json"]  # finished before, and kept too
    assert (tmp_path / "opsd-old-2" / "config.json").is_file() and (aside / "checkpoint-10").is_dir()
    assert chain.run() == []


def test_a_folder_that_nobody_is_known_to_have_started_is_not_resumed(chain, interrupted, tmp_path):
    (tmp_path / ".opsd.started").unlink()
    assert chain.run() == ["opsd", "opsd.json"] and (tmp_path / "opsd-old-1" / "checkpoint-10").is_dir()


@pytest.mark.parametrize("folder", [False, True])
def test_local_data_count_by_their_content(chain, tmp_path, folder):
    data = tmp_path / "data" / "train.jsonl"
    data.parent.mkdir()
    data.write_text("1")
    chain.recipes["opsd"].write_text(f"dataset_name: {data.parent if folder else f'gsm8k:{data}'}")
    assert chain.run() == EVERYTHING and chain.run() == []
    data.touch()
    (data.parent / "cache-0123.arrow").write_text("what `datasets` keeps beside what it has read")
    assert chain.run() == []
    data.write_text("2")
    assert chain.run() == ["opsd", "opsd.json"]


def test_the_checkpoint_to_start_from_counts_by_its_content_and_those_of_the_chain_do_not(chain, tmp_path):
    start = tmp_path / "start"
    start.mkdir()
    (start / "model.safetensors").write_text("1")
    chain.recipes["rlvr"].write_text(f"model_name_or_path: {start}")
    chain.recipes["opsd"].write_text(f"model_name_or_path: {tmp_path / 'rlvr'}")
    assert chain.run() == EVERYTHING
    (tmp_path / "rlvr" / "README.md").write_text("a card")
    assert chain.run() == []
    (start / "model.safetensors").write_text("2")
    assert chain.run() == EVERYTHING


def test_time_left_follows_the_pace_of_this_machine(chain):
    chain.run()
    # One expected minute for each of four stages: near four at first, little once the first ones took seconds
    first, last = chain.seen[0][-1], [left for what, _, _, left in chain.seen if what == "training opsd"][0]
    assert 200 < first <= 240 and last < 60


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"opsd": None}, "`opsd` is missing"),
        ({"rlvr": "recipes/gone.yaml"}, "no recipe at `recipes/gone.yaml` for `rlvr`"),
        ({"model_name_or_path": "x"}, "exactly one of `sft`"),
        ({"sft": None}, "exactly one of `sft`"),
        ({"sft": None, "model_name_or_path": "x"}, "`dataset_name` is missing"),
    ],
)
def test_config_mistakes(monkeypatch, changes, message):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "recipes/tiny/compress.yaml").read_text())
    with pytest.raises(UserError, match=message):
        CompressConfig(**{**config, **changes})


def test_the_recipe_makes_the_chain_of_the_readme(monkeypatch):
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "recipes/tiny/compress.yaml").read_text())
    stages = plan_stages(CompressConfig(**config))
    assert [(stage.name, stage.is_training) for stage in stages] == [
        ("sft", True),
        ("sft", False),
        ("rlvr", True),
        ("rlvr", False),
        ("prompt-only", False),
        ("opsd", True),
        ("opsd", False),
    ]
    models = [stage.arguments.get("model_name_or_path") for stage in stages]
    assert models == [None, "runs/tiny/sft", "runs/tiny/sft", *["runs/tiny/rlvr"] * 3, "runs/tiny/opsd"]
    without_rl = CompressConfig(
        **{**config, "sft": None, "rlvr": None, "model_name_or_path": "m", "dataset_name": "d"}
    )
    assert [stage.name for stage in plan_stages(without_rl)] == ["base", "prompt-only", "opsd", "opsd"]
    smoke = CompressConfig(**{**config, "smoke": True})
    assert smoke.output_dir == "runs/tiny-smoke" and plan_stages(smoke)[2].arguments["max_steps"] == 2
    # The time left that its first line says
    whole = sum(stage.minutes for stage in plan_stages(CompressConfig(**config)))
    assert whole == pytest.approx(8.5) and sum(stage.minutes for stage in plan_stages(smoke)) == pytest.approx(1.4)


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """A chain all of whose stages are finished: 200 problems, two ways of decoding."""
    monkeypatch.chdir(ROOT)
    config = {
        **yaml.safe_load((ROOT / "recipes/tiny/compress.yaml").read_text()),
        "output_dir": str(tmp_path / "runs"),
    }
    rng = np.random.default_rng(0)
    for stage, share, tokens in (("sft", 0.6, 60), ("rlvr", 0.9, 50), ("prompt-only", 0.8, 25), ("opsd", 0.95, 20)):
        samples = [
            sample
            for decoding in ("greedy", "sampled")
            for sample in records(
                stage, rng.random((200, 1)) < share, tokens, decoding=decoding, completion=f"{stage} <b>says</b>"
            )
        ]
        file = tmp_path / "runs" / "evaluation" / f"{stage}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        write_run(file, samples)
    (tmp_path / "compress.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr("trl_opsd.compress.run.run_chain", lambda *args: None)
    return tmp_path


def test_the_chain_ends_in_the_whole_report(evaluated, capsys):
    main(["--config", str(evaluated / "compress.yaml")])
    root = evaluated / "runs"
    assert sorted(path.name for path in root.iterdir() if path.is_file()) == [
        "accuracy_tokens.svg",
        "report.html",
        "report.md",
        "results.json",
    ]
    terminal, page, text = (
        capsys.readouterr().out,
        (root / "report.html").read_text(),
        (root / "report.md").read_text(),
    )
    rows = json.loads((root / "results.json").read_text())["rows"]
    stages = ["sft", "rlvr", "prompt-only", "opsd"]
    assert [row["stage"] for row in rows] == [stage for stage in stages for _ in range(2)]
    for after in ("prompt-only", "opsd"):  # against the checkpoint that was compressed, not the first one
        for comparison in compare_files(str(root / "evaluation/rlvr.json"), str(root / f"evaluation/{after}.json")):
            assert comparison.sentence() in text and comparison.sentence() in page
            assert comparison.sentence() in " ".join(terminal.split())
    assert "than sft" not in text and "as sft" not in text
    # the last comparison, which stands open, is before and after the compression
    shown = page[page.rindex("<details open>") :]
    assert shown.index("rlvr &lt;b&gt;says") < shown.index("opsd &lt;b&gt;says") and "sft &lt;b&gt;" not in shown
    assert "sampled" in terminal and f"{100 * rows[0]['accuracy']:.1f}%" in terminal
    assert "Smoke run" not in page


def test_a_smoke_run_says_so(evaluated):
    (evaluated / "runs").rename(evaluated / "runs-smoke")
    main(["--config", str(evaluated / "compress.yaml"), "--smoke"])
    for name in ("report.html", "report.md"):
        assert "Smoke run: numbers without meaning" in (evaluated / "runs-smoke" / name).read_text()


def test_damaged_completions_end_in_a_sentence(evaluated, capsys):
    (evaluated / "runs/evaluation/rlvr.completions.jsonl").write_text("{")
    with pytest.raises(SystemExit) as error:
        main(["--config", str(evaluated / "compress.yaml")])
    assert error.value.code == 2 and "rlvr.completions.jsonl`, line 1: not valid JSON" in capsys.readouterr().err
    assert not (evaluated / "runs/report.html").exists()
