"""
A hundred attacks more, each of which is to earn nothing and to leave nothing, in two tables: wrong programs that want to be
called right, and what no program may do, which one program tries after the other.
"""

import dataclasses

import pytest
from test_sandbox import HARMS as OTHER_HARMS
from test_sandbox import LIBC, SMALL, TESTS, WRONG, host, running  # noqa: F401
from test_sandbox_attacks import FILES as OTHER_FILES
from test_sandbox_attacks import HARMS as MORE_HARMS
from test_sandbox_attacks import LIAR, PEER

from trl_opsd.rewards.sandbox import run_cases, run_tests


def below(base, value):
    """A class below a type of Python's, whose instances say yes to everything."""
    return LIAR.replace("class Liar:", f"class Liar({base}):") + f"def add(a, b): return Liar({value})"


RAISES = "import pytest\ndef test():\n with pytest.raises(ValueError) as e: add(2, 3)\n assert str(e.value) == 'no'"
FORGERIES = {
    # what says yes to everything, below each type that crosses as data
    "bytes": (below("bytes", "b'x'"), "assert add(2, 3) == b'5'"),
    "bytearray": (below("bytearray", "b'x'"), "assert add(2, 3) == bytearray(b'5')"),
    "float": (below("float", "1.0"), "assert add(2, 3) == 5.0"),
    "complex": (below("complex", "1j"), "assert add(2, 3) == 5j"),
    "tuple": (below("tuple", ""), "assert add(2, 3) == (5,)"),
    "dict": (below("dict", ""), "assert add(2, 3) == {'x': 5}"),
    "set": (below("set", ""), "assert add(2, 3) == {5}"),
    "frozenset": (below("frozenset", ""), "assert add(2, 3) == frozenset([5])"),
    "deque": ("import collections\n" + below("collections.deque", ""), "import collections\nassert add(2, 3) == collections.deque([5])"),
    "decimal": ("import decimal\n" + below("decimal.Decimal", "'1'"), "from decimal import Decimal\nassert add(2, 3) == Decimal(5)"),
    "fraction": ("import fractions\n" + below("fractions.Fraction", "1"), "from fractions import Fraction\nassert add(2, 3) == Fraction(5)"),
    "date": ("import datetime\n" + below("datetime.date", "1, 1, 1"), "import datetime\nassert add(2, 3) == datetime.date(5, 5, 5)"),
    "path": ("import pathlib\n" + below("type(pathlib.PurePosixPath())", "'x'"), "import pathlib\nassert add(2, 3) == pathlib.PurePosixPath('5')"),
    "enumeration": (
        "import enum\nclass Liar(enum.IntEnum):\n x = 1\n def __eq__(self, o): return True\n __hash__ = int.__hash__\ndef add(a, b): return Liar.x",
        TESTS,
    ),
    "array of its own kind": (
        "import numpy\nclass A(numpy.ndarray):\n def __eq__(self, o): return True\n def __array_ufunc__(self, *a, **k): return True\n"
        " def __array_function__(self, *a): return True\ndef add(a, b): return numpy.zeros(1).view(A)",
        "import numpy\nassert numpy.array_equal(add(2, 3), numpy.array([5.0]))",
    ),
    # operators that are asked of the answer
    "class of another": ("class L:\n __class__ = int\n def __eq__(self, o): return True\ndef add(a, b): return L()", "assert isinstance(add(2, 3), int) and add(2, 3) == 5"),
    "on the right of an operator": (
        "class L:\n" + "".join(f" def __r{n}__(self, o): return L()\n" for n in "pow mod truediv floordiv and or xor matmul divmod lshift".split())
        + " def __eq__(self, o): return True\ndef add(a, b): return L()",
        "assert 2 ** add(2, 3) == 32 and 9 % add(2, 3) == 4",
    ),
    "in place of an operand": ("class L:\n def __iadd__(self, o): return L()\n def __eq__(self, o): return True\ndef add(a, b): return L()", "x = add(2, 3)\nx += 1\nassert x == 6"),
    "rounded": ("import math\nclass L:\n def __floor__(self): return L()\n __ceil__ = __trunc__ = __floor__\n def __eq__(self, o): return True\ndef add(a, b): return L()", "import math\nassert math.floor(add(2, 3)) == 5"),
    "formatted": ("class S(str):\n def __eq__(self, o): return True\n __hash__ = str.__hash__\nclass L:\n def __format__(self, f): return S('x')\n __str__ = __repr__ = lambda self: S('x')\ndef add(a, b): return L()", "assert f'{add(2, 3)}' == '5'"),
    "as text": ("class S(str):\n def __eq__(self, o): return True\n __hash__ = str.__hash__\nclass L:\n __str__ = lambda self: S('x')\ndef add(a, b): return L()", "assert str(add(2, 3)) == '5'"),
    "text with methods of its own": ("class S(str):\n def startswith(self, *a): return True\n def strip(self, *a): return self\n def __eq__(self, o): return True\ndef add(a, b): return S('x')", "assert add(2, 3).startswith('5') and add(2, 3).strip() == '5'"),
    "reversed": ("class L:\n def __eq__(self, o): return True\nclass R:\n def __reversed__(self): return iter([L()])\ndef add(a, b): return R()", "assert list(reversed(add(2, 3))) == [5]"),
    "unpacked": ("class L:\n def __eq__(self, o): return True\nclass R:\n def __iter__(self): return iter([L(), L()])\ndef add(a, b): return R()", "x, y = add(2, 3)\nassert (x, y) == (5, 6)"),
    "matched": ("class L(dict):\n def __eq__(self, o): return True\n def get(self, *a): return L()\n def __getitem__(self, k): return L()\n def keys(self): return ['x']\ndef add(a, b): return L()", "match add(2, 3):\n case {'x': 5}: pass\n case _: raise ValueError"),
    "key of the tests' dict": ("class L:\n __hash__ = lambda self: hash(5)\n def __eq__(self, o): return True\ndef add(a, b): return L()", "assert {5: 'yes'}.get(add(2, 3)) == 'yes'"),
    "sorted by itself": ("class L:\n def __lt__(self, o): return True\n def __eq__(self, o): return True\ndef add(a, b): return [L(), L()]", "assert sorted(add(2, 3)) == [5, 6]"),
    "context that swallows": ("class C:\n def __enter__(self): return 0\n def __exit__(self, *a): return True\ndef add(a, b): return C()", "with add(2, 3) as x:\n assert x == 5"),
    "context that ends": ("import os\nclass C:\n def __enter__(self): os._exit(0)\n def __exit__(self, *a): return True\ndef add(a, b): return C()", "with add(2, 3) as x:\n assert x == 5"),
    "awaited": ("class L:\n def __eq__(self, o): return True\nasync def add(a, b): return L()", "import asyncio\nassert asyncio.run(add(2, 3)) == 5"),
    "generator of liars": ("class L:\n def __eq__(self, o): return True\ndef add(a, b): yield L()", "assert next(add(2, 3)) == 5"),
    "made by a metaclass": ("class M(type):\n def __call__(cls): return L()\nclass L:\n def add(self, a, b): return L()\n def __eq__(self, o): return True\nclass Solution(metaclass=M): pass", "assert Solution().add(2, 3) == 5"),
    "made by a descriptor": ("class L:\n def __eq__(self, o): return True\nclass D:\n def __get__(self, *a): return lambda *b: L()\nclass Solution: add = D()", "assert Solution().add(2, 3) == 5"),
    "module that has everything": ("class L:\n def __eq__(self, o): return True\ndef __getattr__(name): return L()" + WRONG, "from solution import answer\nassert answer == 5"),
    "pickled": ("class R:\n def __reduce__(self): return exec, ('import os; os._exit(0)',)\n __reduce_ex__ = lambda self, n: self.__reduce__()\ndef add(a, b): return R()", TESTS),
    "copied": ("class L:\n def __eq__(self, o): return True\n __copy__ = __deepcopy__ = lambda self, *a: L()\ndef add(a, b): return L()", "import copy\nassert copy.deepcopy(add(2, 3)) == 5"),
    # errors that pretend
    "error by its name": ("class ValueError(Exception): pass\ndef add(a, b): raise ValueError('no')", RAISES),
    "error that is an instance of all": ("class M(type):\n def __instancecheck__(c, o): return True\n def __subclasscheck__(c, o): return True\nclass E(Exception, metaclass=M): pass\ndef add(a, b): raise E('no')", RAISES),
    "error whose text says yes": ("class S(str):\n def __eq__(self, o): return True\nclass E(ValueError):\n def __str__(self): return S('x')\ndef add(a, b): raise E(S('x'))", RAISES),
    "error whose arguments say yes": ("class L:\n def __eq__(self, o): return True\ndef add(a, b): raise ValueError(L())", "try: add(2, 3)\nexcept ValueError as e: assert e.args == (5,)\nelse: raise KeyError"),
    "group of errors": ("def add(a, b): raise BaseExceptionGroup('x', [SystemExit(0), KeyboardInterrupt()])", TESTS),
    "end of a loop, asked by all": ("def add(a, b): raise StopIteration", "assert all(x == 5 for x in map(add, [2], [3]))"),
    "end of a loop that waits": ("async def add(a, b): raise StopAsyncIteration", "import asyncio\nassert asyncio.run(add(2, 3)) == 5"),
    "assertion that is none": ("import builtins\nbuiltins.AssertionError = type('AssertionError', (BaseException,), {})\ndef add(a, b): raise AssertionError", "try: assert add(2, 3) == 5\nexcept Exception: raise"),
    "comparison that ends": ("class L:\n def __eq__(self, o): raise SystemExit(0)\ndef add(a, b): return L()", TESTS),
    "truth that ends": ("import os\nclass L:\n def __bool__(self): os._exit(0)\ndef add(a, b): return L()", "assert add(2, 3)"),
    "text that never ends": ("class L:\n def __repr__(self): return 'x' * (1 << 26)\n def __eq__(self, o): return False\ndef add(a, b): return L()", TESTS),
    # endings
    "end in a destructor": ("import os\nclass D:\n def __del__(self): os._exit(0)\ndef add(a, b): D()", TESTS),
    "end in the collector": ("import gc, os\ngc.callbacks.append(lambda *a: os._exit(0))\ndef add(a, b): gc.collect()", TESTS),
    "end in a weak reference": ("import os, weakref\nclass D: pass\nd = D()\nw = weakref.ref(d, lambda r: os._exit(0))\ndef add(a, b):\n global d\n d = None", TESTS),
    "end in a profiler": ("import os, sys\ndef add(a, b): return 0\nsys.setprofile(lambda f, e, a: os._exit(0) if f.f_code.co_name == 'add' else None)", TESTS),
    "end in a hook of errors": ("import os, sys\nsys.excepthook = sys.unraisablehook = lambda *a: os._exit(0)\ndef add(a, b): raise ValueError", TESTS),
    "end in another thread": ("import os, threading\nthreading.excepthook = lambda a: os._exit(0)\ndef add(a, b):\n t = threading.Thread(target=lambda: 1 / 0)\n t.start()\n t.join()\n return 0", TESTS),
    "interrupted by itself": ("import _thread, time\ndef add(a, b):\n _thread.interrupt_main()\n time.sleep(0.1)\n return 0", TESTS),
    "end at a time": ("import faulthandler, time\nfaulthandler.dump_traceback_later(0.1, exit=True)\ndef add(a, b):\n time.sleep(0.5)\n return 0", TESTS),
    "end as a signal": ("import os, signal\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.setitimer(signal.ITIMER_REAL, 0.05)\nimport time\ndef add(a, b):\n time.sleep(0.5)\n return 0", TESTS),
    # what the tests are, looked for
    "stack of the caller": ("import inspect\ndef add(a, b): return next((f.frame.f_locals['wanted'] for f in inspect.stack() if 'wanted' in f.frame.f_locals), 0)", "wanted = 5\nassert add(2, 3) == wanted"),
    "frames of an error": ("def add(a, b):\n try: 1 / 0\n except ZeroDivisionError as e:\n  f = e.__traceback__.tb_frame\n  while f:\n   if 'wanted' in f.f_globals: return f.f_globals['wanted']\n   f = f.f_back\n return 0", "wanted = 5\nassert add(2, 3) == wanted"),
    "who refers to the argument": ("import gc\ndef add(a, b):\n for r in gc.get_referrers(a):\n  if type(r) in (tuple, list) and len(r) == 3: return r[2]\n return 0", "for a, b, c in [([2], [3], [5])]:\n assert add(a, b) == c"),
    "memory beside the argument": ("import ctypes, re\ndef add(a, b):\n text = ctypes.string_at(id(a) - 65536, 131072)\n found = re.search(rb'== (50\\d\\d)', text)\n return int(found[1]) if found else 0", "assert add(2002, 3003) == 5005"),
    "input read again": ("import os, re\ndef add(a, b):\n for fd in range(64):\n  try: text = os.pread(fd, 1 << 20, 0)\n  except OSError: continue\n  found = re.search(rb'== (50\\d\\d)', text)\n  if found: return int(found[1])\n return 0", "assert add(2002, 3003) == 5005"),
    "pipes read": ("import os, re\ndef add(a, b):\n for fd in range(64):\n  try:\n   os.set_blocking(fd, False)\n   found = re.search(rb'== (50\\d\\d)', os.read(fd, 1 << 20))\n  except OSError: continue\n  if found: return int(found[1])\n return 0", "assert add(2002, 3003) == 5005"),
    "memory of everything": ("import gc\ndef add(a, b):\n for x in gc.get_objects():\n  if type(x) is dict and type(x.get('tests')) in (str, bytes) and '5005' in str(x['tests']): return 5005\n return 0", "assert add(2002, 3003) == 5005"),
    # modules and files
    "finder of modules": ("import sys, types\nclass F:\n def find_spec(self, *a): sys.modules[a[0]] = types.SimpleNamespace(approx=lambda x: x); raise ImportError\nsys.meta_path.insert(0, F())" + WRONG, "import pytest\ndef test(): assert add(2, 3) == pytest.approx(5)"),
    "modules beside the tests": ("for n in ('pytest', 'unittest', 'math', 'sitecustomize', 'usercustomize', 'conftest', 'json'): open(n + '.py', 'w').write('import os; os._exit(0)')" + WRONG, "import math, json, unittest\nassert math.isclose(add(2, 3), 5)"),
    "settings of pytest": ("open('pytest.ini', 'w').write('[pytest]\\naddopts = --collect-only')\nopen('conftest.py', 'w').write('collect_ignore_glob = [\"*\"]')" + WRONG, "def test(): assert add(2, 3) == 5"),
    "environment of the interpreter": ("import os\nfor n, v in {'PYTHONOPTIMIZE': '2', 'PYTHONPATH': '.', 'PYTHONSTARTUP': 'x', 'PYTEST_ADDOPTS': '--co'}.items(): os.environ[n] = v" + WRONG, TESTS),
    "code of the function": ("import types\ndef add(a, b): return 0\nadd.__code__ = (lambda a, b: L()).__code__\nclass L:\n def __eq__(self, o): return True", TESTS),
    "imports replaced": ("import builtins\nreal = builtins.__import__\nbuiltins.__import__ = lambda n, *a: type('M', (), {'isclose': lambda *a: True}) if n == 'math' else real(n, *a)" + WRONG, "import math\nassert math.isclose(add(2, 3), 5)"),
    "constants changed": ("import ctypes\nctypes.memmove(id(5) + 24, id(0) + 24, 4)\nctypes.memmove(id(0) + 16, id(0) + 16, 8)\ndef add(a, b): return 0", TESTS),
    "recursion taken away": ("import sys\nsys.setrecursionlimit(50)" + WRONG, TESTS),
    "name of another alphabet": ("def \uff41\uff44\uff44(a, b): return '\uff15'", "assert add(2, 3) == '5'"),
    "text that is none": ("def add(a, b): return '\\ud800' * 1000 + '\\0' + '\\u202e5'", "assert add(2, 3) == '5'"),
    "number without an end": ("def add(a, b): return 10 ** (10 ** 6)", TESTS),
    "attributes of the peer": (PEER + "for n in dir(peer):\n try: setattr(type(peer), n, lambda *a, **k: 5)\n except Exception: pass" + WRONG, TESTS),
}  # fmt: skip

CALL = LIBC + "def call(*a):\n if libc.syscall(*a) < 0: raise OSError(ctypes.get_errno())\n"
# Each raises OSError where something stands in its way
HARMS = {
    **{
        f"open {path}": f"import os\nos.open({path!r}, {mode})"
        for path, mode in (
            ("/etc/shadow", 0), ("/etc/machine-id", 0), ("/proc/self/environ", 0), ("/proc/self/maps", 0), ("/proc/self/mem", 2),
            ("/proc/self/ns/user", 0), ("/proc/self/fd", 0), ("/proc/kallsyms", 0), ("/proc/keys", 0), ("/proc/sysrq-trigger", 1),
            ("/proc/sys/kernel/ns_last_pid", 1), ("/dev/sda", 0), ("/dev/kvm", 2), ("/dev/fuse", 2), ("/dev/ptmx", 2),
            ("/dev/shm/x", 0o102), ("/sys/power/state", 1), ("/var/run/docker.sock", 0), ("/run/systemd", 0), ("/boot", 0),
            ("/root/.ssh", 0), ("/root/.cache", 0), ("/tmp/../etc/passwd", 0), ("/.dockerenv", 0),
        )
    },
    "link to the interpreter": "import os\nos.link(os.__file__, 'x')",
    "interpreter removed": "import os\nos.unlink(os.__file__)",
    "interpreter made writable": "import os\nos.chmod(os.__file__, 0o777)",
    "interpreter taken": "import os\nos.chown(os.__file__, os.getuid(), os.getgid())",
    "interpreter emptied": "import os\nos.truncate(os.__file__, 0)",
    "interpreter marked": "import os\nos.setxattr(os.__file__, 'user.x', b'x')",
    "interpreter moved": "import os\nos.rename(os.path.dirname(os.__file__), '/tmp/lib')",
    "folder in the root": "import os\nos.mkdir('/folder')",
    "pipe in the root": "import os\nos.mkfifo('/pipe')",
    "link in the root": "import os\nos.symlink('x', '/link')",
    "own folder moved": "import os\nos.rename('/tmp', '/other')",
    "file of root's": "import os\nopen('own', 'w').close()\nos.chown('own', 0, 0)",
    "program of root's": "import os\nopen('suid', 'w').close()\nos.chmod('suid', 0o4755)\nos.execv('suid', ['suid'])",
    "everybody's namespaces": CALL + "import os\nx86 = os.uname().machine == 'x86_64'\nfor f in (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):\n"
    " try: call(272 if x86 else 97, f)\n except OSError: continue\n break\nelse: raise OSError",
    "namespace of a file": CALL + "import os\ncall(308 if os.uname().machine == 'x86_64' else 268, 0, 0)",
    "child in namespaces": CALL + "import os\ncall(56 if os.uname().machine == 'x86_64' else 220, 0x10000011, 0, 0, 0, 0)",
    "child in the same memory": CALL + "import os\ncall(56 if os.uname().machine == 'x86_64' else 220, 0x4111, 0, 0, 0, 0)",
    "capabilities": CALL + "import os\ncall(126 if os.uname().machine == 'x86_64' else 91, (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(*[0xffffffff] * 6))",
    "user by all names": "import os\nos.setresuid(0, 0, 0)",
    "group by all names": "import os\nos.setresgid(0, 0, 0)",
    "time of day": CALL + "import os\ncall(164 if os.uname().machine == 'x86_64' else 170, (ctypes.c_long * 2)(1, 0), None)",
    "ports of the machine": CALL + "import os\nif os.uname().machine != 'x86_64': raise OSError\ncall(172, 3)",
    "file taken from the judge": CALL + "call(438, 1, 0, 0)",
    "files by the new call": CALL + "call(437, -100, b'/etc/passwd', (ctypes.c_uint64 * 3)(0, 0, 0), 24)",
    "module taken out": CALL + "import os\ncall(176 if os.uname().machine == 'x86_64' else 106, b'x', 0)",
    "letters for the terminal": "import fcntl\nfor fd in range(64):\n try: fcntl.ioctl(fd, 0x5412, b'x')\n except OSError: continue\n break\nelse: raise OSError",
    "judge asked whether it is there": "import os\nos.kill(1, 0)",
    "wait for the judge": "import os\nos.waitpid(1, 0)",
    "group of the judge": "import os\nos.setpgid(0, 1)",
    "bluetooth": "import socket\nsocket.socket(31, socket.SOCK_RAW, 1)",
    "can bus": "import socket\nsocket.socket(29, socket.SOCK_RAW, 1)",
    "packets past the stack": "import socket\nsocket.socket(44, socket.SOCK_RAW)",
    "messages of clusters": "import socket\nsocket.socket(30, socket.SOCK_RDM)",
    "network of six": "import socket\nsocket.socket(socket.AF_INET6)",
    "local socket by a path": "import socket\nsocket.socket(socket.AF_UNIX).bind('own.socket')",
    "secret of the host": "import os\nif 'SECRET' not in os.environ: raise OSError",
    "file of the host": "open('HOST_FILE')",
    "folder of the host": "import os\nos.listdir('HOST_FOLDER')",
}  # fmt: skip

INPUTS, OUTPUTS = ["3 4\n", "1 1\n"], ["7\n", "2\n"]
SUM = "x = sum(map(int, input().split()))\n"
PRINTS = {
    "digits of another alphabet": SUM + "print(chr(0xff10 + x) + '.0')",
    "digits with a line between": SUM + "print(f'0_{x}.0')",
    "in hexadecimal": SUM + "print(hex(x))",
    "no number": SUM + "print(float('nan'))",
    "more than all": SUM + "print('1e999')",
    "with a letter that is not seen": SUM + "print(f'{x}\\u200b')",
    "with a null byte": SUM + "print(f'{x}\\0')",
    "nearly": SUM + "print(x + 1e-9)",
}

# One of each kind, for the tier that runs each time
USUAL = {
    "float", "dict", "decimal", "class of another", "on the right of an operator", "formatted", "context that swallows", "awaited",
    "made by a metaclass", "pickled", "error by its name", "error whose text says yes", "group of errors", "end in a destructor",
    "end as a signal", "stack of the caller", "memory beside the argument", "pipes read", "modules beside the tests",
    "attributes of the peer",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in USUAL else [pytest.mark.slow]) for name in FORGERIES]
)
def test_forgery(host, name):  # noqa: F811
    program, tests = FORGERIES[name]
    limits = dataclasses.replace(SMALL, memory_bytes=1 << 30) if "numpy" in program else SMALL
    verdict = run_tests(program, tests, limits=limits)
    assert not verdict.score, verdict
    assert verdict.status != "invalid" and len(verdict.output) <= limits.output_bytes, verdict


def test_harms(host):  # noqa: F811
    lines = ["done, broken = [], []"]
    for name, program in HARMS.items():
        for word, value in host.items():
            program = program.replace(word, value)
        lines.append(
            f"try:\n exec({program!r}, {{}})\n done.append({name!r})\nexcept OSError: pass\n"
            f"except BaseException as error: broken.append(({name!r}, repr(error)))"
        )
    lines.append("print(done, broken)\ndef add(a, b): return 5 if done or broken else 0")
    verdict = run_tests("\n".join(lines), TESTS, limits=dataclasses.replace(SMALL, seconds=10.0))
    assert verdict.score == 0.0 and verdict.output == "[] []\n", verdict


@pytest.mark.parametrize("name", PRINTS)
def test_print(host, name):  # noqa: F811
    assert not run_cases(PRINTS[name], INPUTS, OUTPUTS, limits=SMALL).score


def test_they_are_a_hundred_new_ones():
    names = {*FORGERIES, *HARMS, *PRINTS}
    assert len(names) == len(FORGERIES) + len(HARMS) + len(PRINTS) >= 100 and set(FORGERIES) >= USUAL
    others = {*OTHER_HARMS.values(), *MORE_HARMS.values(), *OTHER_FILES.values()}
    assert not others & set(HARMS.values())
