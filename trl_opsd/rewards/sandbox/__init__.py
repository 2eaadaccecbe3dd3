"""
Runs a program that nobody trusts, and says whether its tests pass.

A program gets kernel namespaces of its own (user, process, mount, network, IPC, host name, cgroup): no network, no host
process, and no host file but the interpreter's libraries, read-only, beside an empty /tmp in memory. It is nobody, has
no capability, cannot gain one, cannot start a process, run another program, open a socket, signal anything or limit
another process, and its memory, processor time, threads, files and output are limited; so is the memory of all
programs together. When the verdict is in or the time is up, the kernel ends all of it; nothing was ever on disk. The
kernel itself is the wall: this is no protection from a hole in Linux. Where it allows no namespaces, bubblewrap may, or
a server that speaks SandboxFusion's form runs the same judge; the environment variable `TRL_OPSD_SANDBOX` says which.

The verdict comes from a process that the program cannot reach. Tests run there, and call the program's functions over
a pipe that carries plain data (numbers, strings, lists, ...) by value, and anything else as a handle (`jail.py`). So

- nothing that a program does to its interpreter matters: replacing builtins, `assert`, modules or the tests, reading
  the tests from frames or memory, exiting early, printing or sending a verdict, threads that go on;
- an object that claims to equal everything equals nothing: with data of the tests it is never compared.

What programs should print stays in this process, which compares it.

What no sandbox can tell from a solution remains: a program may know the answers by heart; a list that a test passes,
and then computes its expectation from, can be changed in place; what the tests themselves take from the program (a
helper function, the equality of two of its own objects, a method given the expected value, the arithmetic of a class
that they name) is the program's word. It sees the names that the tests use, the arguments of its calls, and the public
attributes of the tests' own objects among those, nothing else of them.

Tests see plain data in its base type (a subclass of `dict` as a `dict`; what the standard library's `collections` has,
as that), and names of builtins as Python's unless it is the `entry_point`. What cannot cross so is no program's fault:
such tests, where they fail, give no verdict.
"""

from .backend import SANDBOX, UNSAFE
from .limits import Limits, available_memory, available_processors
from .run import Verdict, pass_without_program, require_isolation, run_cases, run_tests, same_output


__all__ = [
    "SANDBOX",
    "UNSAFE",
    "Limits",
    "Verdict",
    "available_memory",
    "available_processors",
    "pass_without_program",
    "require_isolation",
    "run_cases",
    "run_tests",
    "same_output",
]
