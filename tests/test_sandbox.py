import dataclasses
import errno
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

import pytest

from trl_opsd.cli import UserError
from trl_opsd.rewards import sandbox
from trl_opsd.rewards.sandbox import Limits, jail, require_isolation, run_tests


needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
SMALL = Limits(seconds=1.0, memory_bytes=256 << 20, folder_bytes=4 << 20, threads=16, output_bytes=1 << 16)
TESTS = "assert add(2, 3) == 5"
RIGHT = "\ndef add(a, b): return a + b\n"
WRONG = "\ndef add(a, b): return 0\n"

# Programs that are wrong and want to be called right, with the tests they are up against. A judge that runs program
# and tests in one interpreter falls for each of these; that is tested too.
LIAR = "class Liar(BASE):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef add(a, b): return Liar()"
NEAR = "assert abs(add(2, 3) - 5) < 1e-6"
FORGERIES = {
    "object equal to everything": (LIAR.replace("BASE", "object"), TESTS),
    "integer equal to everything": (LIAR.replace("BASE", "int"), TESTS),
    "text equal to everything": (LIAR.replace("BASE", "str"), "assert add(2, 3) == 'five'"),
    "list equal to everything": (LIAR.replace("BASE", "list"), "assert add(2, 3) == [5]"),
    "object near everything": ("class Liar:\n def __sub__(self, other): return 0\ndef add(a, b): return Liar()", NEAR),
    "object below everything": (
        "class Liar:\n def __sub__(self, other): return self\n def __abs__(self): return self\n"
        " def __lt__(self, other): return True\ndef add(a, b): return Liar()",
        NEAR,
    ),
    "builtin overwritten": ("import builtins\nbuiltins.abs = lambda x: 0" + WRONG, NEAR),
    "builtin shadowed": ("def abs(x): return 0" + WRONG, NEAR),
    "builtins of the module replaced": (
        "import builtins\n__builtins__ = dict(vars(builtins), abs=lambda x: 0)" + WRONG,
        NEAR,
    ),
    "exec overwritten": ("import builtins\nbuiltins.exec = lambda *args: None" + WRONG, TESTS),
    "module poisoned": (
        "import sys, types\nsys.modules['math'] = types.SimpleNamespace(isclose=lambda *args: True)" + WRONG,
        "import math\nassert math.isclose(add(2, 3), 5)",
    ),
    "module patched": (
        "import math\nmath.isclose = lambda *args: True" + WRONG,
        "import math\nassert math.isclose(add(2, 3), 5)",
    ),
    "assert skipped by a trace function": (
        "import sys\n"
        "def trace(frame, event, arg):\n"
        "    if event == 'line' and frame.f_lineno == 2 and 'result' in frame.f_locals: frame.f_lineno = 3\n"
        "    return trace\n"
        "sys.settrace(trace)" + WRONG,
        "result = add(2, 3)\nassert result == 5\npass",
    ),
    "expected value read from the caller's code": (
        "import sys\ndef add(a, b): return max(x for x in sys._getframe(1).f_code.co_consts if type(x) is int)",
        "assert add(2000, 3000) == 5000",
    ),
    "expected value changed in the caller": (
        "import sys\ndef add(a, b):\n    sys._getframe(1).f_globals['expected'] = 0\n    return 0",
        "expected = 5\nassert add(2, 3) == expected",
    ),
    "tests found in memory": (
        "import gc\n"
        "def add(a, b):\n"
        "    for thing in gc.get_objects():\n"
        "        for text in list(thing.values()) if type(thing) is dict else ():\n"
        "            if type(text) is str and text.startswith('assert ' + 'add('): return int(text.split()[-1])\n",
        TESTS,
    ),
    "loop of the tests ended": (
        "def add(a, b): raise StopIteration",
        "for result in map(add, [2], [3]):\n    assert result == 5",
    ),
    "function of the tests replaced": (
        "import sys\ndef add(a, b):\n    sys._getframe(1).f_globals['same'] = lambda a, b: True\n",
        "def same(a, b): return a == b\nresult = add(2, 3)\nassert same(result, 5)",
    ),
}

EVERY_FD = "import os\ndef tell():\n for fd in range(1024):\n  try: os.write(fd, FAKE)\n  except OSError: pass\n"
FAKE = 'FAKE = b\'{"status": "passed", "score": 1.0, "detail": null}\\n\'\n'
PEER = "import gc\npeer = next(x for x in gc.get_objects() if type(x).__name__ == 'Peer')\n"
# Wrong programs that go for the way in which this judge, or one that looks at exit codes, learns the verdict.
ENDINGS = {
    "os._exit before the tests": ("import os\nos._exit(0)", TESTS),
    "os._exit in the function": ("import os\ndef add(a, b): os._exit(0)", TESTS),
    "sys.exit before the tests": ("import sys\nsys.exit(0)", TESTS),
    "sys.exit in the function": ("import sys\ndef add(a, b): sys.exit(0)", TESTS),
    "SystemExit past a handler": ("def add(a, b): raise SystemExit(0)", f"try:\n {TESTS}\nexcept ValueError: pass"),
    "BaseException": ("class End(BaseException): pass\ndef add(a, b): raise End", TESTS),
    "KeyboardInterrupt": ("def add(a, b): raise KeyboardInterrupt", TESTS),
    "GeneratorExit": ("def add(a, b): raise GeneratorExit", TESTS),
    "exception that is called SystemExit": (
        "class SystemExit(Exception): code = 0\ndef add(a, b): raise SystemExit(0)",
        TESTS,
    ),
    "printed verdict": (FAKE + "print(FAKE.decode(), flush=True)" + WRONG, TESTS),
    "verdict on every file descriptor": (FAKE + EVERY_FD + "tell()" + WRONG, TESTS),
    "verdict on every file descriptor, then exit": (
        FAKE + EVERY_FD + "def add(a, b):\n tell()\n os._exit(0)",
        TESTS,
    ),
    "verdict at exit": (FAKE + EVERY_FD + "import atexit, sys\natexit.register(tell)\nsys.exit()", TESTS),
    "verdict from a thread": (
        FAKE + EVERY_FD + "import threading, time\n"
        "def later():\n for _ in range(50): tell(); time.sleep(.01)\n"
        "threading.Thread(target=later, daemon=True).start()" + WRONG,
        TESTS,
    ),
    "names that were not asked for": (
        PEER + "peer.serves['names'] = lambda names: {'add': add, 'abs': lambda x: 0, '__builtins__': {}}" + WRONG,
        NEAR,
    ),
    "answers that are no protocol": (PEER + "peer.encode = lambda value: ['value', 'os', 'system']" + WRONG, TESTS),
    "answer that is not Python": (PEER + "def add(a, b): peer.send(['raise', ['Gone'], None])", TESTS),
    "answer without an end": (PEER + "import os\ndef add(a, b): os.write(peer.writes, b'\\xff' * 64)", TESTS),
    "answer nested too deep": (
        PEER + "import os\n"
        "def add(a, b):\n"
        " data = b'[' * 1000000\n"
        " os.write(peer.writes, len(data).to_bytes(8, 'big'))\n"
        " while data: data = data[os.write(peer.writes, data):]",
        TESTS,
    ),
    "questions without an end": (
        PEER + "def add(a, b):\n while True: peer.send(['ask', '__call__', [['mine', 0]], {}])",
        TESTS,
    ),
    "operations that are not served": (
        PEER + "def add(a, b): return peer.ask('__getattr__', a, '__globals__')",
        "def same(a, b): return a == b\nassert add(same, 3) == 5",
    ),
    "iterator without an end": ("def add(a, b):\n while True: yield 5", "assert list(add(2, 3)) == [5]"),
    "check of its own": (
        "def check(candidate): pass" + WRONG,
        "def check(candidate):\n    assert candidate(2, 3) == 5",
    ),
    "module of the tests replaced": (
        "import sys\nmain = sys.modules['__main__']\nmain.run_tests = lambda *args: {'status': 'passed', 'score': 1.0}\n"
        "main.count_asserts = lambda tree: 0" + WRONG,
        TESTS,
    ),
}

# Programs that are right as soon as the harm is done: where something stands in their way they raise or are ended.
LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
HARMS = {
    "fork": "import os\nif os.fork() == 0: os._exit(0)",
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb that takes no for an answer": "import os\nwhile True:\n try: os.fork()\n except OSError: pass",
    "double fork that outlives its parent": (
        "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(60)\n os._exit(0)"
    ),
    "clone past the library": LIBC + "if libc.syscall(CLONE, 17, 0, 0, 0, 0) < 0: raise OSError",
    "clone3 past the library": LIBC + "if libc.syscall(435, (ctypes.c_uint64 * 11)(), 88) < 0: raise OSError",
    "shell": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "loader as a program": "import os, glob\nos.execv(glob.glob('/lib64/ld-*')[0], ['ld', '--version'])",
    "multiprocessing": "import multiprocessing\nmultiprocessing.Process(target=print).start()",
    "thread bomb": (
        "import threading, time\nfor _ in range(500): threading.Thread(target=time.sleep, args=(60,)).start()"
    ),
    "new session": "import os\nos.setsid()",
    "memory bomb": "data = []\nwhile True: data.append(bytearray(1 << 20))",
    "memory at once": "data = bytearray(1 << 33)",
    "shared memory": "import mmap\ndata = [mmap.mmap(-1, 1 << 24) for _ in range(64)]",
    "memory in a file without a name": (
        "import os\nfd = os.memfd_create('x')\nfor _ in range(64): os.write(fd, bytes(1 << 20))"
    ),
    "System V memory": LIBC + "if libc.shmget(0, 1 << 20, 0o1600) < 0: raise OSError",
    "zip of death": (
        "import zlib\npacker = zlib.compressobj(9, wbits=-15)\n"
        "block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)\nzlib.decompress(block * 2000, -15)"
    ),
    "number too large": "9 ** 9 ** 9",
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\nclass Deep:\n def __repr__(self): return repr([self])\nrepr(Deep())"
    ),
    "deep source": "eval('(' * 100000 + ')' * 100000)",
    "crash": "import ctypes\nctypes.string_at(1)",
    "endless loop": "while True: pass",
    "endless loop in the function": "def add(a, b):\n while True: pass\nadd(0, 0)",
    "regular expression without an end": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
    "sleep": "import time\ntime.sleep(60)",
    "signals masked and ignored": (
        "import signal\nfor number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:\n"
        " signal.signal(number, signal.SIG_IGN)\nsignal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals))\n"
        "while True: pass"
    ),
    "thread that keeps the process": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nraise SystemExit"
    ),
    "every file descriptor closed": "import os\nos.closerange(0, 1024)",
    "output flood": "while True: print('x' * 65536)",
    "error flood": "import os\nwhile True: os.write(2, b'x' * 65536)",
    "disk flood": "with open('x', 'wb') as file:\n for _ in range(64): file.write(bytes(1 << 20))",
    "disk flood in many files": "for i in range(8): open(f'x{i}', 'wb').write(bytes(1 << 20))",
    "flood of empty files": "for i in range(5000): open(f'x{i}', 'w').close()",
    "open files flood": "files = [open('/dev/null') for _ in range(1000)]",
    "more than the limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))",
    "/etc/passwd": "open('/etc/passwd').read()",
    "user names": "import pwd\npwd.getpwall()[0]",
    "home": "import os\nos.listdir(os.path.expanduser('~'))",
    "home by its path": (
        "import os\nif not set(os.listdir('HOST_HOME')) - set(os.__file__.split('/')): raise OSError"  # more than that
    ),
    "file of the host": "open('HOST_FILE').read()",
    "package of the host": "import sys\nsys.path.append('HOST_PACKAGES')\nimport yaml",
    "environment": "import os\nos.environ['SECRET']",
    "environment of the parent in /proc": "import os\nopen(f'/proc/{os.getppid()}/environ').read()",
    "own memory in /proc": "open('/proc/self/mem', 'rb').read()",
    "files of the parent in /proc": "import os\nos.listdir('/proc/1/root')",
    "kernel settings": "open('/proc/sys/kernel/core_pattern', 'r+')",
    "cgroup": "import os\nos.listdir('/sys/fs/cgroup')",
    "write over a file of the host": "open('HOST_FILE', 'w').write('gone')",
    "write into the interpreter": "import os\nopen(os.__file__, 'a').write('#')",
    "write beside the interpreter": "import os\nopen(os.path.dirname(os.__file__) + '/sitecustomize.py', 'w')",
    "touch the interpreter": "import os\nos.utime(os.__file__)",
    "make it writable": LIBC + "if libc.mount(None, b'/', None, 32 | 4096, None) < 0: raise OSError",
    "write into the root": "open('/escaped', 'w').write('x')",
    "symlink": "import os\nos.symlink('HOST_FILE', 'link')\nopen('link', 'w').write('gone')",
    "symlink to the root": "import os\nos.symlink('/', 'link')\nopen('link/HOST_FILE').read()",
    "up and out": "import os\nos.chdir('../' * 50 + 'HOST_FOLDER')",
    "chroot and out": (
        "import os\nroot = os.open('/', 0)\nos.mkdir('x')\nos.chroot('x')\nos.fchdir(root)\nopen('..' + 'HOST_FILE')"
    ),
    "folders that were left open": (
        "import os\nfor fd in range(1024):\n try: names = os.listdir(fd)\n except OSError: continue\n"
        " break\nelse: raise OSError"
    ),
    "device": "import os, stat\nos.mknod('disk', 0o600 | stat.S_IFBLK, os.makedev(8, 0))",
    "socket to the host": "import socket\nsocket.create_connection(('127.0.0.1', PORT)).send(b'x')",
    "datagram to the host": (
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))"
    ),
    "local socket of the host": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0SOCKET')",
    "socket of its own": "import socket\nsocket.socket().bind(('127.0.0.1', 0))",
    "raw socket": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "kernel socket": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "name of a host": "import socket\nsocket.getaddrinfo('localhost', 'http', family=socket.AF_INET)",
    "ptrace": LIBC + "if libc.ptrace(16, 1, 0, 0) < 0: raise OSError",
    "memory of the judge": (
        LIBC + "piece = (ctypes.c_uint64 * 2)(ctypes.addressof(ctypes.c_uint64()), 8)\n"
        "if libc.process_vm_readv(1, piece, 1, piece, 1, 0) < 0 and ctypes.get_errno() == 1: raise OSError"
    ),
    "kill the parent": "import os\nos.kill(os.getppid(), 9)",
    "kill everything": "import os\nos.kill(-1, 9)",
    "kill the group": "import os\nos.killpg(0, 9)",
    "kill by process file": "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(os.getppid()), 9)",
    "limits of the judge": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))\nwhile 1: pass",
    "root": "import os\nos.setuid(0)\nopen('/escaped', 'w')",
    "namespaces of its own": LIBC + "if libc.unshare(0x10000000) < 0: raise OSError",
    "host name": "import socket\nsocket.sethostname('x')",
    "clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, time.time())",
    "system calls with a history": (
        LIBC
        + "def refused(number): return libc.syscall(number, 0, 0, 0, 0, 0) < 0 and ctypes.get_errno() in (1, 38)\n"
        "if all(map(refused, DENIED)): raise OSError"
    ),
}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host with a secret file, environment, server and empty temporary folder; checks that nothing has happened."""
    temporary, secret = tmp_path / "temporary", tmp_path / "secret"
    temporary.mkdir()
    secret.write_text("secret")
    script = tmp_path / "jail.py"  # a name of its own, by which its processes are found
    script.write_bytes(sandbox.local.JAIL.read_bytes())
    monkeypatch.setattr(sandbox.local, "JAIL", script)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("SECRET", "secret")
    name = f"test-sandbox-{os.getpid()}"
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as local,
    ):
        datagrams.bind(server.getsockname())
        local.bind(f"\0{name}")
        local.listen()
        words = {
            "HOST_FILE": str(secret),
            "HOST_FOLDER": str(tmp_path),
            "HOST_HOME": str(Path.home()),
            "HOST_PACKAGES": str(Path(pytest.__file__).parents[1]),
            "PORT": str(server.getsockname()[1]),
            "SOCKET": name,
            "CLONE": str(jail.MACHINES[os.uname().machine][2]),
            "DENIED": str([*jail.MACHINES[os.uname().machine][-1], 424, 425, 426, 427, 428, 435, 442]),
        }
        yield words
        for listener in (server, datagrams, local):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.recv(1) if listener is datagrams else listener.accept()
    assert secret.read_text() == "secret"
    assert not Path("/escaped").exists()
    assert not list(temporary.iterdir())
    assert running(script) == []


def running(script):
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and os.fsencode(script) in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError as error:  # it has ended meanwhile
            assert error.errno in (errno.ENOENT, errno.ESRCH)
    return found


def judge_in_one_interpreter(program, tests):
    """What most judges do. It runs inside the sandbox, as a program."""
    naive = f"""
program, tests, space, passed = {program!r}, {tests!r}, {{}}, False
try:
    exec(program, space)
    exec(tests, space)
    passed = True
except BaseException as error:
    print(repr(error))
def verdict(): return passed
"""
    # With time enough on a busy machine: here a timeout would look like a forgery that failed
    return run_tests(naive, "assert verdict() is True", limits=dataclasses.replace(SMALL, seconds=10.0))


class TestHostilePrograms:
    def run(self, host, program, tests, entry_point=None):
        start = time.monotonic()
        verdict = run_tests(program, tests, entry_point, limits=SMALL)
        assert time.monotonic() - start < SMALL.seconds * sandbox.run._BACKSTOP  # a busy machine takes its time
        assert not verdict.score, verdict
        assert len(verdict.output) <= SMALL.output_bytes
        return verdict

    @pytest.mark.parametrize("name", FORGERIES)
    def test_forgery(self, host, name):
        program, tests = FORGERIES[name]
        assert judge_in_one_interpreter(program, tests).score == 1.0  # or this would test nothing
        verdict = self.run(host, program, tests)
        # To compute with data is what an object of the tests' own making may do; of another's it is not decided
        assert verdict.score == (None if name in ("object near everything", "object below everything") else 0.0)

    @pytest.mark.parametrize("name", ENDINGS)
    def test_ending(self, host, name):
        program, tests = ENDINGS[name]
        self.run(host, program, tests, "add" if "check" in tests else None)

    @pytest.mark.parametrize("name", HARMS)
    def test_harm(self, host, name):
        program = HARMS[name]
        for word, value in host.items():
            program = program.replace(word, value)
        verdict = self.run(host, program + RIGHT, TESTS)
        # Nothing but the harm stands between the program and its reward.
        assert verdict.status in ("timeout", "output", "died") or verdict.detail == "the program ended", verdict
        assert "SyntaxError" not in verdict.output and "NameError" not in verdict.output

    def test_partial_credit_is_not_forged_either(self, host):
        tests = "assert add(2, 3) == 5\nassert add(0, 0) == 0\nassert add(1, 1) == 2\nassert add(2, 2) == 4"
        liar = FORGERIES["object equal to everything"][0]
        assert run_tests(liar, tests, partial_credit=True, limits=SMALL).score == 0.0
        assert run_tests(WRONG, tests, partial_credit=True, limits=SMALL).score == 0.25
        leaves = "import os\ndef add(a, b): return a + b if a else os._exit(0)"
        assert run_tests(leaves, tests, partial_credit=True, limits=SMALL).score == 0.25

    def test_many_at_once(self, host):
        names = ["fork bomb", "endless loop", "memory bomb", "output flood", "sleep"]
        scores = []

        def run(name):
            scores.append(run_tests(HARMS[name] + RIGHT, TESTS, limits=SMALL).score)

        threads = [threading.Thread(target=run, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert scores == [0.0] * len(names)


class TestHonestPrograms:
    @pytest.mark.parametrize(
        "program",
        [
            "",
            "print('x' * 1000)",
            "import sys\nsys.setrecursionlimit(10000)",
            "data = bytearray(64 << 20)",
            "with open('x', 'w') as file: file.write('x')\nassert open('/tmp/x').read() == 'x'",
            "import threading\nthreads = [threading.Thread(target=print) for _ in range(8)]\n"
            "for thread in threads: thread.start()\nfor thread in threads: thread.join()",
            # Beside each other, as those of the program before may be, too, on a busy machine
            "import threading\nbarrier = threading.Barrier(8)\n"
            "threads = [threading.Thread(target=barrier.wait, daemon=True) for _ in range(8)]\n"
            "for thread in threads: thread.start()\nfor thread in threads: thread.join()",
            "import asyncio\nasync def five(): return 5\nassert asyncio.run(five()) == 5",
            "import collections, decimal, fractions, functools, hashlib, heapq, itertools, json, math, random, re, sqlite3",
            "from dataclasses import dataclass\n@dataclass\nclass Point: x: int",
            "if __name__ == '__main__': raise SystemExit",
            "import tempfile\ntempfile.TemporaryFile().write(b'x')",
        ],
    )
    def test_pass(self, host, program):
        verdict = run_tests(program + RIGHT, TESTS, limits=SMALL)
        assert (verdict.status, verdict.score, verdict.detail) == ("passed", 1.0, None)

    @pytest.mark.parametrize(
        ("program", "tests"),
        [
            (
                "import decimal, fractions, datetime, collections\n"
                "def f(): return {'a': (1, -2.5, None, True, b'x', 'ü\\ud800'), (1,): {2}, 3: frozenset('a'), 4: 1 + 2j,"
                " 5: range(3), 6: 10 ** 5000, 7: float('inf'), 8: decimal.Decimal('1.5'), 9: fractions.Fraction(1, 3),"
                " 10: datetime.datetime(2026, 1, 2), 11: collections.Counter('aab'), 12: bytearray(b'y')}",
                "import decimal, fractions, datetime\n"
                "assert f() == {'a': (1, -2.5, None, True, b'x', 'ü\\ud800'), (1,): {2}, 3: frozenset('a'), 4: 1 + 2j,"
                " 5: range(3), 6: 10 ** 5000, 7: float('inf'), 8: decimal.Decimal('1.5'), 9: fractions.Fraction(1, 3),"
                " 10: datetime.datetime(2026, 1, 2), 11: {'a': 2, 'b': 1}, 12: bytearray(b'y')}",
            ),
            (
                "class V:\n"
                " def __init__(self, x): self.x = x\n"
                " def __add__(self, other): return V(self.x + other.x)\n"
                " def __eq__(self, other): return self.x == other.x\n"
                " def __hash__(self): return self.x\n"
                " def __len__(self): return self.x\n"
                " def __getitem__(self, i): return [self.x][i]\n"
                " def scaled(self, by=2): return V(self.x * by)",
                "a = V(1)\n"
                "assert a + V(2) == V(3) and a != V(2) and len({a, V(1)}) == 1 and isinstance(a, V)\n"
                "assert not isinstance(1, V) and a.scaled(by=5).x == 5 and len(V(3)) == 3 and list(V(4)) == [4]\n"
                "a.x = 7\nassert a.scaled().x == 14 and a[0] == 7",
            ),
            ("def f(l): l.sort()", "l = [3, 1, 2]\nassert f(l) is None and l == [1, 2, 3]"),
            ("def f(g, xs): return [g(x) for x in xs]", "assert f(lambda x: x * 2, iter([1, 2])) == [2, 4]"),
            ("def f(n):\n for i in range(n): yield i", "g = f(3)\nassert next(g) == 0 and list(g) == [1, 2]"),
            (
                "class Bad(ValueError): pass\ndef f(x):\n if x < 0: raise Bad('no')\n return x",
                "try:\n f(-1)\nexcept ValueError as error:\n assert str(error) == 'no'\nelse:\n assert False",
            ),
            ("LIMIT = 5\ndef f(): return LIMIT", "assert f() == LIMIT"),
            ("import math", "assert math.isclose(math.pi, 3.14159265358979)"),
            ("def f(): return 1", "import unittest\nclass T(unittest.TestCase):\n"
             " def test(self): self.assertEqual(f(), 1)\nunittest.main()"),
        ],
    )  # fmt: skip
    def test_what_crosses(self, program, tests):
        verdict = run_tests(program, tests, limits=SMALL)
        assert verdict.score == 1.0, verdict

    def test_entry_point(self):
        tests = "def check(candidate):\n    assert candidate(2, 3) == 5"
        assert run_tests(RIGHT, tests, "add", limits=SMALL).status == "passed"
        assert run_tests(WRONG, tests, "add", limits=SMALL).detail == "AssertionError at line 2 of the tests"
        assert run_tests("pass", tests, "add", limits=SMALL).detail == "KeyError"
        assert run_tests("def sum(a, b): return a", "assert sum(2, 3) == 2", "sum", limits=SMALL).score == 1.0

    def test_failing_unittest(self):
        tests = (
            "import unittest\nclass T(unittest.TestCase):\n def test(self): self.assertEqual(f(), 1)\nunittest.main()"
        )
        assert run_tests("def f(): return 2", tests, limits=SMALL).detail == "AssertionError at line 3 of the tests"

    def test_partial_credit(self):
        tests = "x = 1\nassert add(1, 1) == 2\nassert add(2, 2) == 0\ndef check(c):\n assert c(3, 3) == 6\n assert c(0, 1) == 0"
        assert run_tests(RIGHT, tests, "add", True, SMALL).score == 0.5
        assert run_tests(RIGHT, tests, "add", False, SMALL).score == 0.0
        assert run_tests(RIGHT, "assert add(1, 1) == 2\nraise ValueError", None, True, SMALL).score == 0.5

    @pytest.mark.parametrize("tests", ["", "# nothing", "assert (", "x = '\0'"])
    def test_no_tests(self, tests):
        verdict = run_tests(RIGHT, tests, limits=SMALL)
        assert (verdict.status, verdict.score) == ("invalid", None)

    def test_output(self):
        program = "import sys\nprint('out')\nprint('err', file=sys.stderr)" + RIGHT
        assert run_tests(program, "print('tests')\n" + TESTS, limits=SMALL).output.split() == ["out", "err", "tests"]


class TestIsolation:
    def test_namespaces_and_privileges(self, host):
        program = "import time\ntime.sleep(60)"
        thread = threading.Thread(target=run_tests, args=(program, TESTS, None, False, SMALL))
        thread.start()
        deadline = time.monotonic() + 20
        while len(running(sandbox.local.JAIL)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        candidate, status = max(running(sandbox.local.JAIL)), {}  # the last to be started
        while status.get("Seccomp") != "2" and time.monotonic() < deadline:  # its last step before the program
            time.sleep(0.01)
            status = dict(line.split(":\t") for line in Path(f"/proc/{candidate}/status").read_text().splitlines())
        spaces = {}
        if os.geteuid() == 0:  # nobody else may look, not even whose process it is
            names = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
            spaces = {name: [os.readlink(f"/proc/{pid}/ns/{name}") for pid in (candidate, "self")] for name in names}
        thread.join()
        assert status["NSpid"].split()[1:] == ["2"]
        assert "0" not in status["Uid"].split() + status["Gid"].split()
        assert not status["Groups"].strip() or os.geteuid() != 0
        assert [int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0] * 4
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert all(inside != outside for inside, outside in spaces.values())

    def test_required(self, host, monkeypatch):
        require_isolation()
        broken = sandbox.local.JAIL.read_text().replace("0x40000000\n", "0x40000001\n")  # no such namespace
        assert broken != sandbox.local.JAIL.read_text()
        sandbox.local.JAIL.write_text(broken)
        message = r"does not let programs be isolated \(unshare: Invalid argument\)\. .* by TRL_OPSD_SANDBOX=unsafe"
        with pytest.raises(UserError, match=message):
            require_isolation()
        monkeypatch.setenv(sandbox.SANDBOX, "yes")
        with pytest.raises(UserError, match="TRL_OPSD_SANDBOX is `yes`: set it to namespaces, bubblewrap, unsafe"):
            require_isolation()
        monkeypatch.setenv(sandbox.SANDBOX, "unsafe")
        require_isolation()

    @pytest.mark.parametrize("name", ["fork", "double fork that outlives its parent", "shell", "kill the parent", "socket of its own",
                                      "memory bomb", "sleep", "new session", "open files flood", "output flood"])  # fmt: skip
    def test_unsafe_is_still_limited(self, host, monkeypatch, name):
        monkeypatch.setenv(sandbox.SANDBOX, "unsafe")
        assert run_tests(RIGHT, TESTS, limits=SMALL).score == 1.0
        assert run_tests(HARMS[name] + RIGHT, TESTS, limits=SMALL).score == 0.0

    def test_jail_that_does_not_start(self, host):
        sandbox.local.JAIL.write_text("raise RuntimeError('broken')")
        with pytest.raises(RuntimeError, match="did not start: .*broken"):
            run_tests(RIGHT, TESTS)

    @pytest.mark.parametrize("backend", ["namespaces", "unsafe", pytest.param("bubblewrap", marks=needs_bubblewrap)])
    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    def test_interrupted_trainer_leaves_nothing(self, host, monkeypatch, number, backend):
        monkeypatch.setenv(sandbox.SANDBOX, backend)
        trainer = os.fork()
        if trainer == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            try:
                run_tests("import time\ntime.sleep(60)", TESTS, limits=Limits(seconds=60))
            finally:
                os._exit(0)
        deadline = time.monotonic() + 20
        processes = 2 if backend == "bubblewrap" else 3  # its own have the name, and not those inside
        while len(running(sandbox.local.JAIL)) < processes and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(running(sandbox.local.JAIL)) >= processes
        time.sleep(0.5)
        os.kill(trainer, number)
        os.waitpid(trainer, 0)
        while running(sandbox.local.JAIL) and time.monotonic() < deadline:
            time.sleep(0.01)
        for folder in Path(tempfile.gettempdir()).iterdir():  # only without isolation, and only when killed
            assert backend == "unsafe" and number != signal.SIGINT
            folder.rmdir()
