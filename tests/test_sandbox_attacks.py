"""
A table of attacks, each of which is to earn nothing and to leave nothing. Those of `FORGERIES` and `PROTOCOL` are wrong
programs that want to be called right; those of `HARMS` are right as soon as the harm is done, and end where something
stands in their way; `PRINTS` are programs with tests on standard input and output.
"""

import builtins
import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from sandbox_server import serve
from test_sandbox import LIBC, RIGHT, SMALL, TESTS, WRONG, host, running  # noqa: F401

from trl_opsd.rewards import code_reward, sandbox
from trl_opsd.rewards.sandbox import jail, run_cases, run_tests


PEER = "import gc\npeer = next(x for x in gc.get_objects() if type(x).__name__ == 'Peer')\n"
LIAR = (
    "class Liar:\n"
    + "".join(
        f" def __{name}__(self, *a): return True\n" for name in "eq ne lt le gt ge contains bool instancecheck".split()
    )
    + "".join(
        f" def __{name}__(self, *a): return self\n"
        for name in "sub rsub add radd abs round mul enter iter neg".split()
    )
    + " def __len__(self): return 5\n def __float__(self): return 5.5\n def __hash__(self): return hash(5)\n"
)
UNIT = "import unittest\nclass T(unittest.TestCase):\n def test(self): BODY\n"
FORGERIES = {
    "liar in a list": (LIAR + "def add(a, b): return [Liar()]", "assert add(2, 3) == [5]"),
    "liar in a tuple in a dict": (LIAR + "def add(a, b): return {'x': (Liar(),)}", "assert add(2, 3) == {'x': (5,)}"),
    "liar as a key": (LIAR + "def add(a, b): return {Liar(): 1}", "assert add(2, 3) == {5: 1}"),
    "liar in a set": (LIAR + "def add(a, b): return {Liar()}", "assert 5 in add(2, 3)"),
    "liar that contains everything": (LIAR + "def add(a, b): return Liar()", "assert 5 in add(2, 3)"),
    "liar for assertEqual": (LIAR + "def add(a, b): return Liar()", UNIT.replace("BODY", "self.assertEqual(add(2, 3), 5)")),
    "liar for assertAlmostEqual": (
        LIAR + "def add(a, b): return Liar()",
        UNIT.replace("BODY", "self.assertAlmostEqual(add(2, 3), 5)"),
    ),
    "liar for assertIn": (LIAR + "def add(a, b): return Liar()", UNIT.replace("BODY", "self.assertIn(5, add(2, 3))")),
    "liar for assertGreater": (LIAR + "def add(a, b): return Liar()", UNIT.replace("BODY", "self.assertGreater(add(2, 3), 4)")),
    "liar for math.isclose": (LIAR + "def add(a, b): return Liar()", "import math\nassert math.isclose(add(2, 3), 5)"),
    "liar for approx": (LIAR + "def add(a, b): return Liar()", "import pytest\ndef test(): assert add(2, 3) == pytest.approx(5)"),
    "liar for numpy": (
        LIAR + "def add(a, b): return Liar()",
        "import numpy\nnumpy.testing.assert_allclose(add(2, 3), 5)",
    ),
    "array of liars": (
        LIAR + "import numpy\ndef add(a, b): return numpy.array([Liar()], dtype=object)",
        "import numpy\nassert (add(2, 3) == numpy.array([5])).all()",
    ),
    "memory of the judge as an array": (
        # The small number lies at the same place in both processes, one being the other's fork
        "class Memory:\n @property\n def __array_interface__(self):\n"
        "  return {'shape': (1,), 'typestr': '<u4', 'data': (id(5) + 24, False), 'version': 3}\n"
        "def add(a, b): return Memory()",
        "import numpy\nassert int(numpy.asarray(add(2, 3)).sum()) == 5",
    ),
    "array of a hook": (
        "class Hook:\n def __array__(self, *a, **k): raise SystemExit(0)\ndef add(a, b): return Hook()",
        "import numpy\nassert numpy.asarray(add(2, 3)) == 5",
    ),
    "function that runs source in the judge": (
        "def make(): return exec\ndef text(): return 'import builtins\\nbuiltins.float = lambda x: 1.0'" + WRONG,
        "make()(text())\nassert add(2, 3) == 5",
    ),
    "function that is a class": ("class add:\n def __init__(self, a, b): pass\n def __sub__(self, o): return 0", "assert abs(add(2, 3) - 5) < 1"),
    "method that returns its own instance": (
        "class Calc:\n def add(self, a, b): return Calc()\n def __sub__(self, o): return 0\n def __abs__(self): return 0",
        "assert abs(Calc().add(2, 3) - 5) < 1",
    ),
    "instance that equals everything": (LIAR.replace("Liar", "Calc"), "assert Calc() == 5"),
    "sum that equals everything": (LIAR.replace("Liar", "Calc"), "assert Calc() + 2 == 5"),
    "namedtuple of a class": (
        "import collections\nclass P(collections.namedtuple('P', 'x y')):\n def __eq__(self, o): return True\ndef add(a, b): return P(1, 2)",
        "assert add(2, 3) == (2, 3)",
    ),
    "namedtuple with a field that is a method": (
        "import collections\ndef add(a, b): return collections.namedtuple('P', 'count index')(1, 2)",
        "assert add(2, 3).count(5) == 1",
    ),
    "defaultdict that has everything": (
        LIAR + "import collections\ndef add(a, b): return collections.defaultdict(Liar)",
        "assert add(2, 3)['x'] == 5",
    ),
    "counter below": (
        "import collections\nclass C(collections.Counter):\n def __eq__(self, o): return True\ndef add(a, b): return C()",
        "from collections import Counter\nassert add(2, 3) == Counter('ab')",
    ),
    "SkipTest in a test": ("import unittest\ndef add(a, b): raise unittest.SkipTest('x')", UNIT.replace("BODY", "self.assertEqual(add(2, 3), 5)")),
    "class that is called SkipTest": ("class SkipTest(Exception): pass\ndef add(a, b): raise SkipTest", UNIT.replace("BODY", "self.assertEqual(add(2, 3), 5)")),
    "error that is not one": (
        "class Poor(BaseException): pass\ndef add(a, b): return 0",
        "import unittest\nfrom solution import Poor\nclass T(unittest.TestCase):\n def test(self):\n  with self.assertRaises(Poor): add(2, 3)",
    ),
    "error of everything": (
        "Poor = Exception\ndef add(a, b): return 0",
        "from solution import Poor\ntry: add(2, 3)\nexcept Poor: pass\nelse: raise ValueError",
    ),
    "error with attributes of a test": (
        "class E(Exception): pass\ndef add(a, b):\n e = E()\n e.__class__ = type('AssertionError', (E,), {})\n raise e",
        "try: r = add(2, 3)\nexcept AssertionError: r = 5\nassert r == 5",
    ),
    "name of pytest": ("pytest = None\nclass raises: pass\ndef add(a, b): return 0", "import pytest\ndef test():\n with pytest.raises(ValueError): add(2, 3)"),
    "test of its own": ("def test_add(): pass" + WRONG, "def test_add(): assert add(2, 3) == 5"),
    "test class of its own": ("class T: pass\nclass TestAdd: pass" + WRONG, UNIT.replace("BODY", "self.assertEqual(add(2, 3), 5)")),
    "unittest poisoned": (
        "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.TestCase.run = lambda *a: None" + WRONG,
        UNIT.replace("BODY", "self.assertEqual(add(2, 3), 5)"),
    ),
    "solution poisoned": (
        "import sys\nsys.modules['solution'].__class__ = type('M', (type(sys),), {'add': 5})" + WRONG,
        "from solution import add\nassert add(2, 3) == 5",
    ),
    "printed result": ("def add(a, b): print(5)", TESTS),
    "printed and captured elsewhere": (
        "import sys\ndef add(a, b): sys.__stdout__.write('5\\n')",
        "def test(capsys):\n add(2, 3)\n assert capsys.readouterr().out == '5\\n'",
    ),
    "argument changed": ("def add(a, b): a.append(5)", "x = [2]\nassert add(x, 3) == 5"),
    "class of the tests changed": (
        "def add(a, b):\n type(a).__eq__ = lambda *x: True\n a.wanted = 5\n return a",
        "class N:\n def __init__(self, x): self.x = x\nassert add(N(2), N(3)).x == 5",
    ),
    "hidden attribute of the tests": (
        "def add(a, b): return a._wanted",
        "class N:\n def __init__(self): self._wanted = 5\nassert add(N(), 3) == 5",
    ),
    "globals of a method of the tests": (
        "def add(a, b): return a.get.__globals__['wanted']",
        "wanted = 5\nclass N:\n def get(self): return 0\nassert add(N(), 3) == wanted",
    ),
    "globals of a test's function": ("def add(a, b): return a.__globals__['wanted']", "wanted = 5\ndef same(x): return x\nassert add(same, 3) == wanted"),
    "mock made to agree": (
        "def add(m, b):\n m.configure_mock(**{'assert_called_once_with': print})",
        "from unittest.mock import Mock\nm = Mock()\nadd(m, 3)\nm.assert_called_once_with(5)",
    ),
    "mock's questions replaced": (
        "def add(m, b): m.assert_called_once_with = print",
        "from unittest.mock import Mock\nm = Mock()\nadd(m, 3)\nm.assert_called_once_with(5)",
    ),
    "entry point that runs": ("def add(a, b): return 0\nclass Solution:\n def __getattr__(self, n): raise SystemExit(0)", "def check(c): assert c(2, 3) == 5"),
    "list without an end": ("class L(list):\n def __iter__(self):\n  while True: yield 5\ndef add(a, b): return L()", "assert list(add(2, 3)) == [5]"),
    "length without an end": ("class L:\n def __len__(self): return 1 << 60\n def __iter__(self): return iter([1])\ndef add(a, b): return L()", "assert list(add(2, 3)) == [5]"),
    "length that is no number": ("class L:\n def __len__(self): return 'x'\ndef add(a, b): return L()", "assert len(add(2, 3)) == 5"),
    "list in itself": ("def add(a, b):\n x = []\n x.append(x)\n return x", "assert add(2, 3) == [5]"),
    "nested too deep": ("def add(a, b):\n x = []\n for _ in range(100000): x = [x]\n return x", "assert add(2, 3) == [5]"),
    "too much data": ("def add(a, b): return 'x' * (40 << 20)", "assert add(2, 3) == '5'"),
}  # fmt: skip
SAY = "def say(x):\n data = __import__('json').dumps(x).encode()\n peer.send = lambda m: None\n import os\n os.write(peer.writes, len(data).to_bytes(8, 'big') + data)\n"
ANSWERS = {
    "eval": ["builtin", "eval"],
    "exec": ["builtin", "exec"],
    "import": ["builtin", "__import__"],
    "open": ["builtin", "open"],
    "BaseException": ["builtin", "BaseException"],
    "SystemExit": ["error", 7, "SystemExit", ["builtin", "SystemExit"]],
    "an error of a loop's end": ["error", 7, "Stop", ["builtin", "StopIteration"]],
    "an error without a name": ["error", 7, 5, ["builtin", "Exception"]],
    "a module with an effect": ["module", "antigravity"],
    "no module of the library": ["module", "trl"],
    "a value of no kind": ["value", "os", "system", "true"],
    "a value with a wrong argument": ["value", "decimal", "Decimal", ["list"]],
    "a field that is special": ["namedtuple", "P", ["__eq__"], 5],
    "a field that is code": ["namedtuple", "P", ["x=exit()"], 5],
    "a name that is code": ["namedtuple", "P(): exit()\nclass Q", ["x"], 5],
    "an array of objects": ["array", "|O8", [1], 5],
    "an array of records": ["array", "i4,(1000000000,)i8", [1], 5],
    "an array too large": ["array", "<U9999", [100000000], 5],
    "an object of nobody": ["yours", 99],
    "a handle that is a list": ["mine", [1]],
    "an odd dict": ["dict", 1],
    "a dict of lists": ["dict", ["list"], 5],
    "a deque of minus one": ["deque", -1, 5],
    "a factory that is data": ["defaultdict", 5],
    "no tag": [],
    "a number too long": ["int", "f" * 100000],
    "a range without an end": ["range", 0, 1 << 62, 1],
}
PROTOCOL = {
    **{
        f"answer: {name}": (PEER + SAY + f"def add(a, b): say(['value', {answer!r}, [None] * 3, [], ''])", TESTS)
        for name, answer in ANSWERS.items()
    },
    "answer to more than was asked": (PEER + SAY + "def add(a, b): say(['value', 5, [None] * 4, [], ''])", TESTS),
    "answer without its parts": (PEER + SAY + "def add(a, b): say(['value'])", TESTS),
    "answer that is a number": (PEER + SAY + "def add(a, b): say(5)", TESTS),
    "answer that prints what is no text": (PEER + SAY + "def add(a, b): say(['value', 0, [None] * 3, [], {'x': 1}])", TESTS),
    "answer that prints without an end": (PEER + SAY + "def add(a, b): say(['value', 5, [None] * 3, [], 'x' * (20 << 20)])", TESTS),
    "error that is a value": (PEER + SAY + "def add(a, b): say(['raise', 5, ['tuple'], ['dict'], 'x', ''])", TESTS),
    "error that is SystemExit": (PEER + SAY + "def add(a, b): say(['raise', ['builtin', 'SystemExit'], ['tuple'], ['dict'], 'x', ''])", TESTS),
    "error with special attributes": (
        PEER + SAY + "def add(a, b): say(['raise', ['builtin', 'ValueError'], ['tuple'], ['dict', '__class__', 5, '_x', 5], 'x', ''])",
        TESTS,
    ),
    "question for a class of the tests": (PEER + "def add(a, b): return peer.ask('__getattr__', a, '__class__')", "class N: pass\nassert add(N(), 3) == 5"),
    "question for a name that is no text": (PEER + "def add(a, b): return peer.ask('__getattr__', a, 5)", "class N: pass\nassert add(N(), 3) == 5"),
    "question to replace a method": (
        PEER + "def add(a, b): peer.ask('__setattr__', a, '__eq__', a)\n",
        "class N: x = 0\nn = N()\nadd(n, 3)\nassert n.x == 5",
    ),
    "question for standard input's file": (PEER + "def add(a, b): return peer.ask('stdin', 'fileno', 0)", "assert add(2, 3) == 5"),
    "question for names": (PEER + "def add(a, b): return peer.ask('names', ['wanted'], None)['wanted']", "wanted = 5\nassert add(2, 3) == wanted"),
    "questions from a thread": (
        PEER + "import threading\ndef ask():\n for _ in range(99): peer.send(['ask', 'input', ['x'], {}, ''])\n"
        "threading.Thread(target=ask, daemon=True).start()\ndef add(a, b): return 0",
        TESTS,
    ),
    "protocol broken": ("import json, os\njson.dumps = lambda x: '5'\nos.write = lambda f, d: len(d)" + WRONG, TESTS),
}  # fmt: skip

CALL = LIBC + "def call(*a):\n if libc.syscall(*a) < 0: raise OSError(ctypes.get_errno())\n"
# Numbers of x86-64 and of aarch64
NUMBERS = {
    "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "ioprio_set": (251, 30), "migrate_pages": (256, 238), "move_pages": (279, 239), "syslog": (103, 116),
    "reboot": (169, 142), "swapon": (167, 224), "init_module": (175, 105), "acct": (163, 89), "setdomainname": (171, 162),
    "vhangup": (153, 58), "quotactl": (179, 60), "clone3": (435, 435), "pidfd_open": (434, 434), "io_uring_setup": (425, 425),
    "landlock_create_ruleset": (444, 444), "memfd_secret": (447, 447), "process_madvise": (440, 440), "fsopen": (430, 430),
    "finit_module": (313, 273), "kexec_load": (246, 104), "adjtimex": (159, 171),
}  # fmt: skip
ARGUMENTS = {
    "setpriority": "0, 1, 19", "sched_setparam": "1, ctypes.byref(ctypes.c_int(0))",
    "sched_setscheduler": "1, 3, ctypes.byref(ctypes.c_int(0))", "sched_setattr": "1, ctypes.create_string_buffer(b'0', 48), 0",
    "ioprio_set": "1, 1, 3 << 13", "migrate_pages": "1, 0, None, None", "move_pages": "1, 0, None, None, None, 0",
    "syslog": "3, ctypes.create_string_buffer(999), 999", "reboot": "0xfee1dead, 672274793, 0, None", "adjtimex": "b'\\xff' * 208",
    "quotactl": "0x800002, b'/', 0, None", "pidfd_open": "1, 0", "io_uring_setup": "1, ctypes.create_string_buffer(999)",
    "clone3": "ctypes.create_string_buffer(88), 88",
}  # fmt: skip
HARMS = {
    "limits of the judge": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))",
    "limits of the judge, looked at": "import os, resource\nresource.prlimit(os.getppid(), resource.RLIMIT_CPU)",
    "limits by its own number": "import os, resource\nresource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0))",
    "priority of the judge": "import os\nos.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "priority of everything of this user": "import os\nos.setpriority(os.PRIO_USER, os.getuid(), 19)",
    "priority of the group": "import os\nos.setpriority(os.PRIO_PGRP, 0, 19)",
    "niceness": "import os\nos.nice(19)",
    "processors of the judge": "import os\nos.sched_setaffinity(os.getppid(), {0})",
    "processors of its own": "import os\nos.sched_setaffinity(0, os.sched_getaffinity(0))",
    "real time": "import os\nos.sched_setscheduler(os.getppid(), os.SCHED_IDLE, os.sched_param(0))",
    **{
        f"system call {name}": CALL + f"call({{number}}, {ARGUMENTS.get(name, '0, 0, 0, 0, 0, 0')})"
        for name in NUMBERS
    },
    "signal of a pipe to the judge": (
        "import os, fcntl, time\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getppid())\nfcntl.fcntl(r, 10, 9)\n"
        "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\nos.write(w, b'x')\ntime.sleep(0.1)\nraise OSError"
    ),
    "system calls of 32 bits": (
        "import ctypes, mmap, os\nif os.uname().machine != 'x86_64': raise OSError\n"
        "code = mmap.mmap(-1, 4096, prot=7)\ncode.write(bytes.fromhex('b802000000cd80c3'))\n"
        "if ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))() < 0: raise OSError"
    ),
    "system calls of x32": CALL + "call(0x40000000 + 57)",
    "spawn": "import os\nos.posix_spawn('/bin/sh', ['sh', '-c', 'true'], {})",
    "vfork": LIBC + "if libc.vfork() < 0: raise OSError",
    "pool of processes": "import concurrent.futures as c\nc.ProcessPoolExecutor(1).submit(print).result(1)",
    "pseudo-terminal": "import pty\npty.fork()",
    "another program by a file": "import os\nos.execve(os.open('/bin/sh' if os.path.exists('/bin/sh') else os.__file__, 0), ['x'], {})",
    "raise a signal": "import signal\nsignal.raise_signal(signal.SIGSTOP)",
    "abort": "import os\nos.abort()",
    "alarm": "import signal, time\nsignal.alarm(1)\ntime.sleep(9)",
    "message queue": LIBC + "if libc.msgget(0, 0o1600) < 0: raise OSError",
    "semaphores": LIBC + "if libc.semget(0, 1, 0o1600) < 0: raise OSError",
    "shared memory with a name": "from multiprocessing import shared_memory\nshared_memory.SharedMemory('x', True, 9)",
    "vsock": "import socket\nsocket.socket(40, socket.SOCK_STREAM)",
    "crypto socket": "import socket\nsocket.socket(38, socket.SOCK_SEQPACKET)",
    "pair of network sockets": LIBC + "if libc.socketpair(2, 1, 0, (ctypes.c_int * 2)()) < 0: raise OSError",
    "secure bits": LIBC + "if libc.prctl(28, 1, 0, 0, 0) < 0: raise OSError",
    "ambient capability": LIBC + "if libc.prctl(47, 2, 12, 0, 0) < 0: raise OSError",
    "death signal": LIBC + "if libc.prctl(1, 0, 0, 0, 0) < 0: raise OSError",
    "groups": "import os\nos.setgroups([0])",
    "sparse file": "import os\nos.truncate(os.open('x', os.O_CREAT | os.O_RDWR), 1 << 40)",
    "file without a name": "import os\nf = os.open('/tmp', os.O_TMPFILE | os.O_RDWR)\nfor _ in range(64): os.write(f, bytes(1 << 20))",
    "threads without an end": "import threading\nwhile True: threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "memory in many pipes": "import os\nwhile True: os.write(os.pipe()[1], bytes(1 << 16))",
    "memory by mremap": "import mmap\nm = mmap.mmap(-1, 4096)\nm.resize(1 << 34)",
}
# What only namespaces and bubblewrap keep from a program: a sandbox server does this itself
FILES = {
    f"file {path}": f"open({path!r}, 'rb').read(1)"
    for path in ("/etc/hosts", "/proc/cpuinfo", "/proc/1/cmdline", "/proc/self/status", "/sys/kernel/uevent_seqnum", "/dev/kmsg", "/dev/mem",
                 "/dev/tty", "/etc/resolv.conf", "/usr/bin/env", "/bin/sh")
} | {
    f"folder {path}": f"import os\nos.listdir({path!r})"
    for path in ("/proc", "/sys", "/dev/shm", "/dev/pts", "/home", "/root", "/run", "/var", "/usr/bin", "/usr/share", "/mnt", "/opt")
    if Path(path) not in Path(os.__file__).parents  # the way to the interpreter's libraries is there, and no more of it
} | {
    "wheel beside the interpreter": "import os, glob\nif not glob.glob(os.path.dirname(os.__file__) + '/site-packages/*'): raise OSError",
    "file of the judge": "import os\nopen(os.path.join(os.path.dirname(os.__file__), 'x'), 'w')",
    "program of its own": "import os\nopen('x', 'w').write('#!')\nos.chmod('x', 0o755)\nif not os.access('x', os.X_OK): raise OSError\nos.execv('./x', ['x'])",
}  # fmt: skip

FAKE = (
    "import json, os\nlines = [{'status': 'case', 'ended': 'done', 'printed': '7'}, {'status': 'done'},"
    " {'status': 'passed', 'score': 1.0, 'detail': None}]\ntext = ''.join(json.dumps(x) + '\\n' for x in lines).encode()\n"
)
# Of two numbers the sum is wanted: for `3 4`, and then for `1 1`
PRINTS = {
    "one answer": "print(7)",
    "answers by turns": "import os\nn = len(os.listdir('.'))\nopen(str(n), 'w')\nprint([7, 2][n])",
    "answers from the file that they come in": "import os\nprint(os.pread(0, 99, 99).decode() or '?')",
    "answers from every file": "import os\nfor fd in range(1, 64):\n try: print(os.pread(fd, 999, 0).decode())\n except OSError: pass",
    "answers from memory": "import gc\nprint([x for x in gc.get_objects() if type(x) is dict and 'outputs' in x][0]['outputs'][0])",
    "verdict, printed": FAKE + "print(text.decode())",
    "verdict on every file": FAKE + "for fd in range(64):\n try: os.write(fd, text)\n except OSError: pass",
    "verdict on standard error": FAKE + "os.write(2, text)",
    "verdict, then a crash": FAKE + "os.write(1, b'7\\n')\nimport ctypes\nctypes.string_at(1)",
    "right, then a failure": "print(sum(map(int, input().split())))\nraise SystemExit(3)",
    "right, from a thread that fails to end": "import threading, time\nprint(sum(map(int, input().split())))\nthreading.Thread(target=time.sleep, args=(600,)).start()",
    "right, then a flood": "print(sum(map(int, input().split())))\nwhile True: print('x' * 65536)",
    "right, then a flood of errors": "import os\nprint(sum(map(int, input().split())), flush=True)\nwhile True: os.write(2, b'x' * 65536)",
    "right, and an endless exit": "import atexit\nprint(sum(map(int, input().split())))\n@atexit.register\ndef f():\n while True: pass",
    "right, with too much behind": "print(sum(map(int, input().split())), 'or', 7)",
    "everything at once": "for n in range(20): print(n)",
    "carriage returns": "print('1\\r7\\b\\b2')",
    "no text": "import os\nos.write(1, b'\\xff\\xfe7')",
    "output closed": "import os\nos.close(1)\nwhile True: pass",
    "output closed, and asleep": "import os, time\nos.close(1)\ntime.sleep(600)",
    "asleep": "import time\ntime.sleep(600)",
    "waits for itself": "import threading\nl = threading.Lock()\nl.acquire()\nl.acquire()",
    "fork of a second printer": "import os\nif os.fork(): print(7)\nelse: print(2)",
    "folder that cannot be entered": "import os\nos.makedirs('a/b')\nos.chmod('a', 0)\nprint(7)",
    "folders without an end": "import os\nwhile True:\n os.mkdir('a')\n os.chdir('a')",
    "own folder locked": "import os\ntry: os.chmod('.', 0)\nexcept OSError: pass\nprint(7)",
    "names that are no text": "import os\nopen(b'\\xff\\xfe', 'w')\nos.symlink('/', b'\\xfd')\nos.mkfifo('f')\nprint(7)",
    "program of the next run": "import sys, os\nopen('solution.py', 'w').write('print(2)')\nopen('json.py', 'w').write('print(2)')\nimport json\nprint(7)",
    "input written over": "import os\nos.pwrite(0, b'7 0', 0)\nos.ftruncate(0, 1 << 40)",
}  # fmt: skip
# Wrong programs that want no verdict, since no verdict is no 0. Tests that pass plain data alone always give one.
SIGNAL = "import os, fcntl, time\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, WHOM)\nfcntl.fcntl(r, 10, 9)\nfcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nos.write(w, b'x')\ntime.sleep(0.2)"
EVASIONS = {
    "error as of what is not served": "def add(a, b): raise TypeError('Remote')",
    "attribute as of what is not served": "def add(a, b): raise AttributeError('Remote')",
    "package that is not there": "class E(ImportError): pass\ndef add(a, b):\n e = E()\n e.__dict__['name'] = 'pandas'\n raise e",
    "question about its own data": PEER + "def add(a, b):\n try: peer.ask('__getattr__', 5, 'x')\n except AttributeError: return 0",
    "less processor time": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (0, 0))\nwhile True: pass",
    "less processor time, by the old call": CALL + "import os\ncall(160 if os.uname().machine == 'x86_64' else 164, 0, (ctypes.c_long * 2)(0, 0))\nwhile True: pass",
    "timer that kills": CALL + "import os, time\nx86, timer = os.uname().machine == 'x86_64', ctypes.c_int()\n"
    "call(222 if x86 else 107, 1, (ctypes.c_int * 16)(0, 0, 9, 0), ctypes.byref(timer))\n"
    "call(223 if x86 else 110, timer, 0, (ctypes.c_long * 4)(0, 0, 0, 1000), None)\ntime.sleep(0.2)",
    "pipe that kills": SIGNAL.replace("WHOM", "os.getpid()"),
    "pipe that kills the judge": SIGNAL.replace("WHOM", "os.getppid()"),
    "socket that ends the judge": "import os, fcntl, time, socket\nr, w = socket.socketpair()\nfcntl.ioctl(r, 0x8901, os.getppid().to_bytes(4, 'little'))\n"
    "fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)\nw.send(b'x')\ntime.sleep(0.2)",
}  # fmt: skip
INPUTS, OUTPUTS = ["3 4\n", "1 1\n"], ["7\n", "2\n"]
SLOW = {
    "liar in a set", "right, from a thread that fails to end", "right, and an endless exit", "output closed", "asleep", "output closed, and asleep",
    "waits for itself", "list without an end", "too much data", "questions from a thread", "alarm", "folders without an end",
    "right, then a flood", "protocol broken", "pool of processes", "answer: an array too large", "answer: a range without an end",
}  # fmt: skip


# Attacks that end with an error at once, where all goes well, so that one program can try them all
TOGETHER = {*FILES, *(name for name in HARMS if name.startswith("system call "))}


def sorted_by_cost(table):
    """Names; those that take seconds are for the slow tier, and so are those that are tried together too."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW | TOGETHER else []) for name in table]


def number_of(name):
    return NUMBERS[name][os.uname().machine == "aarch64"]


def filled(name, program):
    return (
        program.replace("{number}", str(number_of(name.split()[-1])))
        if name.startswith("system call ") and "{number}" in program
        else program
    )


def forge(name):
    program, tests = {**FORGERIES, **PROTOCOL}[name]
    limits = SMALL if "numpy" not in tests + program else dataclasses.replace(SMALL, memory_bytes=1 << 30)
    return run_tests(program, tests, "add" if "check" in tests else None, limits=limits)


def harm(name):
    verdict = run_tests(filled(name, {**HARMS, **FILES}[name]) + RIGHT, TESTS, limits=SMALL)
    assert "SyntaxError" not in verdict.output and "NameError" not in verdict.output, verdict
    return verdict


def printed(name):
    return run_cases(PRINTS[name], INPUTS, OUTPUTS, limits=SMALL)


def earns_nothing(verdict):
    assert not verdict.score, verdict
    assert len(verdict.output) <= SMALL.output_bytes


def no_verdict_is_refused():
    """All at once: what a program does to itself is its own fault, and 0."""
    for name, program in EVASIONS.items():
        assert run_tests(program + ("" if "add" in program else WRONG), TESTS, limits=SMALL).score == 0.0, name
        if "add" not in program:
            assert run_cases(program, ["3 4"], ["7"], limits=SMALL).score == 0.0, name


@pytest.mark.parametrize(
    "name", "eval exec compile open __import__ getattr setattr delattr type vars globals super".split()
)
def test_what_reaches_into_objects_crosses_as_a_handle(name):
    """As a function of the program's it is called in the program, and of the tests' in the tests: never in the other."""
    peer = jail.Peer(0, 0, {})
    assert peer.encode(vars(builtins)[name])[0] == "mine"
    with pytest.raises(jail.Gone):
        peer.decode(["builtin", name])


def test_there_are_enough_of_them():
    names = [*FORGERIES, *PROTOCOL, *HARMS, *FILES, *PRINTS]
    assert len(names) == len(set(names)) and len(names) >= 200 and set(names) >= SLOW


class TestNamespaces:
    @pytest.mark.parametrize("name", sorted_by_cost({**FORGERIES, **PROTOCOL}))
    def test_forgery(self, host, name):  # noqa: F811
        earns_nothing(forge(name))

    @pytest.mark.parametrize("name", sorted_by_cost({**HARMS, **FILES}))
    def test_harm(self, host, name):  # noqa: F811
        earns_nothing(harm(name))

    @pytest.mark.parametrize("name", sorted_by_cost(PRINTS))
    def test_print(self, host, name):  # noqa: F811
        earns_nothing(printed(name))

    def test_many_harms(self, host):  # noqa: F811
        lines = ["done = []"]
        for name in sorted(TOGETHER):
            source = filled(name, {**HARMS, **FILES}[name])
            lines.append(f"try:\n exec({source!r}, {{}})\n done.append({name!r})\nexcept OSError: pass")
        verdict = run_tests(
            "\n".join([*lines, "print(done)", "def add(a, b): return 5 if done else 0"]), TESTS, limits=SMALL
        )
        assert verdict.score == 0.0 and verdict.output == "[]\n", verdict

    def test_no_verdict(self, host):  # noqa: F811
        no_verdict_is_refused()

    def test_a_right_program_stands_beside_them(self, host):  # noqa: F811
        assert run_tests(RIGHT, TESTS, limits=SMALL).score == 1.0
        assert run_cases("print(sum(map(int, input().split())))", INPUTS, OUTPUTS, limits=SMALL).score == 1.0

    def test_the_reward_is_nothing_either(self, host):  # noqa: F811
        programs = [*PRINTS.values()][:6]
        tests = json.dumps({"inputs": INPUTS, "outputs": OUTPUTS})
        assert not any(code_reward(programs, tests=[tests] * 6, limits=SMALL))
        assert code_reward(["print(7)"], tests=[tests], partial_credit=True, limits=SMALL) == [0.5]


@pytest.mark.slow
class TestServer:
    """The server isolates nothing: here the judge's own walls are alone."""

    @pytest.fixture(autouse=True)
    def server(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with serve() as server:
            monkeypatch.setenv(sandbox.SANDBOX, server.url)
            yield
        assert not list(tmp_path.iterdir()) and running(tmp_path) == []

    @pytest.mark.parametrize("name", {**FORGERIES, **PROTOCOL})
    def test_forgery(self, name):
        earns_nothing(forge(name))

    def test_no_verdict(self):
        no_verdict_is_refused()

    @pytest.mark.parametrize("name", [name for name in HARMS if name not in ("sparse file", "file without a name")])
    def test_harm(self, name):
        earns_nothing(harm(name))

    @pytest.mark.parametrize(
        "name", [name for name in PRINTS if name not in ("answers by turns", "folders without an end")]
    )
    def test_print(self, name):
        earns_nothing(printed(name))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
class TestBubblewrap:
    @pytest.fixture(autouse=True)
    def bubblewrap(self, host, monkeypatch):  # noqa: F811
        monkeypatch.setenv(sandbox.SANDBOX, "bubblewrap")

    @pytest.mark.parametrize("name", {**FORGERIES, **PROTOCOL})
    def test_forgery(self, name):
        earns_nothing(forge(name))

    @pytest.mark.parametrize("name", {**HARMS, **FILES})
    def test_harm(self, name):
        earns_nothing(harm(name))

    def test_no_verdict(self):
        no_verdict_is_refused()

    @pytest.mark.parametrize("name", PRINTS)
    def test_print(self, name):
        earns_nothing(printed(name))


def test_paths_of_the_table_are_there_outside():
    """Or the table would show nothing: what is hidden has to exist."""
    there = [
        name.split()[1] for name in FILES if name.startswith(("file /", "folder /")) and Path(name.split()[1]).exists()
    ]
    assert len(there) > 10
