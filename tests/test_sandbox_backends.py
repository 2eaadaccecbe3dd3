"""One reward function, whatever isolates the programs."""

import base64
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from sandbox_server import run_code, serve

from trl_opsd.cli import UserError
from trl_opsd.rewards import code_reward, load_reward_funcs, sandbox
from trl_opsd.rewards.sandbox import Limits, require_isolation, run_cases, run_tests


SMALL = Limits(seconds=1.0, memory_bytes=256 << 20, folder_bytes=4 << 20, threads=16, output_bytes=1 << 16)
SHORT = replace(SMALL, seconds=0.4)
needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")


@pytest.fixture(params=["namespaces", "http", pytest.param("bubblewrap", marks=[needs_bubblewrap, pytest.mark.slow])])
def backend(request, monkeypatch):
    if request.param != "http":
        monkeypatch.setenv(sandbox.SANDBOX, request.param)
        yield request.param
    else:
        with serve() as server:
            monkeypatch.setenv(sandbox.SANDBOX, f"{server.url}/")
            yield "http"


def test_verdicts_are_the_same(backend):
    require_isolation()
    tests = "def test_f(capsys):\n    assert f([3, 1]) == [1, 3]\n    assert capsys.readouterr().out == 'ü\\n'"
    assert run_tests("def f(x): print('ü'); return sorted(x)", tests, limits=SMALL).score == 1.0
    assert (
        run_tests("def f(x): print('ü'); return x", tests, limits=SMALL).detail
        == "AssertionError at line 2 of the tests"
    )
    assert run_tests("print('said')", "assert f", limits=SMALL).output.split() == ["said"]
    assert run_tests("import os\nos._exit(0)", tests, limits=SMALL).detail == "the program ended"
    assert run_tests("while True: print('x' * 65536)", tests, limits=SMALL).score == 0.0
    assert run_tests("while True: pass", tests, limits=SHORT).status == "timeout"
    assert run_tests("import time\ntime.sleep(600)", tests, limits=SHORT).status == "timeout"
    assert run_tests("def f(x): return x", "assert f(1)\nimport pandas", limits=SMALL).status == "unserved"
    double = "for line in open(0): print(2 * int(line), 'ü')"
    assert run_cases(double, ["1\n2\n", "3"], ["2 ü\n4 ü", "6 ü\n"], limits=SMALL).score == 1.0
    assert run_cases(double, ["1\n2\n", "3"], ["2 ü\n4 ü", "5 ü\n"], limits=SMALL).detail == (
        "another output for input 2 of 2"
    )
    assert run_cases(double, ["1\n", "x", "3"], ["2 ü", "?", "6 ü"], True, SMALL).score == 2 / 3
    assert run_cases("while True: pass", ["1", "2"], ["1", "2"], limits=SHORT).status == "timeout"


def test_empty_tests_are_found_everywhere(backend):
    tests = ["def test(): pass", "assert f()"]
    assert code_reward(["def f(): return 1"] * 2, tests=tests) == [None, 1.0]


class TestServer:
    def test_form(self, monkeypatch):
        with serve() as server:
            monkeypatch.setenv(sandbox.SANDBOX, server.url)
            assert run_tests("def f(): return 1", "assert f() == 1").score == 1.0
        (question,) = server.asked
        assert question["language"] == "python" and question["run_timeout"] > 100
        assert set(question) == {"language", "code", "stdin", "compile_timeout", "run_timeout", "files", "fetch_files"}
        assert "assert f() == 1" not in question["code"]  # a program could read that file

    def test_what_the_server_does_wrong_is_no_program_s_fault(self, monkeypatch):
        right, tests = ["def f(): return 1"], ["assert f() == 1"]
        finished = {"status": "Finished", "return_code": 0, "stdout": "", "stderr": ""}
        answers = {
            "error": (500, {}),
            "busy": (429, {}),
            "broken": (200, {"status": "SandboxError", "message": "no disk", "run_result": None}),
            "another form": (200, ["?"]),
            "late": (200, {"status": "Failed", "run_result": {**finished, "status": "TimeLimitExceeded"}}),
        }
        monkeypatch.setattr(sandbox.server.time, "sleep", lambda seconds: None)
        logged = {}
        for name, answer in answers.items():
            with serve(lambda question, answer=answer: answer) as server:
                monkeypatch.setenv(sandbox.SANDBOX, server.url)
                if name != "late":
                    with pytest.raises(
                        UserError, match="No program can be judged here .unreachable: the sandbox server"
                    ):
                        load_reward_funcs(["code_reward"])
                assert code_reward(right, tests=tests, log_metric=lambda n, v: logged.update({n: v})) == [None], name
                assert logged["code_reward/infrastructure"] == 1.0
        with pytest.raises(UserError, match="unreachable: .*refused"):
            load_reward_funcs(["code_reward"])

    def test_it_is_asked_again(self, monkeypatch):
        monkeypatch.setattr(sandbox.server.time, "sleep", lambda seconds: None)
        with serve() as server:
            monkeypatch.setenv(sandbox.SANDBOX, server.url)
            server.answer = lambda question: (503, {}) if len(server.asked) == 1 else run_code(question)
            assert run_tests("def f(): return 1", "assert f() == 1").score == 1.0
            assert len(server.asked) == 2

    def test_wrong_address(self, monkeypatch):
        with serve() as server:
            monkeypatch.setenv(sandbox.SANDBOX, f"{server.url}/v1")
            with pytest.raises(UserError, match="refuses .HTTP status 404.: check TRL_OPSD_SANDBOX"):
                require_isolation()

    def test_server_without_seccomp(self, monkeypatch):
        refusing = base64.b64encode(b'{"status": "refused", "detail": "seccomp: Invalid argument"}\n')
        text = base64.b64decode(refusing).decode()
        answer = {"status": "Failed", "run_result": {"status": "Finished", "stdout": text, "stderr": ""}}
        with serve(lambda question: (200, answer)) as server:
            monkeypatch.setenv(sandbox.SANDBOX, server.url)
            with pytest.raises(UserError, match="cannot judge programs .seccomp: Invalid argument."):
                require_isolation()


class TestRefusals:
    @pytest.mark.parametrize(("works", "message"), [(True, "TRL_OPSD_SANDBOX=bubblewrap works here"),
                                                    (False, "bubblewrap does not either .*bwrap: no way")])  # fmt: skip
    def test_what_would_work_is_named(self, tmp_path, monkeypatch, works, message):
        monkeypatch.setattr(sandbox.local, "JAIL", tmp_path / "jail.py")
        # No such namespace; and a `bwrap` that starts what it is given without more ado
        broken = Path(sandbox.__file__).with_name("jail.py").read_text().replace("0x40000000\n", "0x40000001\n")
        sandbox.local.JAIL.write_text(broken)
        program = tmp_path / "bwrap"
        script = f'while [ "$1" != -- ]; do shift; done; shift; exec "$1" -I -S -X utf8 {sandbox.local.JAIL}'
        program.write_text("#!/bin/sh\n" + (script if works else "echo 'bwrap: no way' >&2; exit 1"))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.delenv(sandbox.SANDBOX, raising=False)
        with pytest.raises(UserError, match=f"unshare: Invalid argument.*{message}.*sandbox server"):
            load_reward_funcs(["code_reward"])

    def test_bubblewrap_that_is_not_there(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv(sandbox.SANDBOX, "bubblewrap")
        with pytest.raises(UserError, match="bubblewrap is not installed.*TRL_OPSD_SANDBOX=namespaces works here"):
            load_reward_funcs(["code_reward"])
