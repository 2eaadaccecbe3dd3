"""
What runs inside the sandbox, started by `local.py`, or by a server, as a script; it imports nothing but the standard library.

Three processes. The *launcher* makes the namespaces, then watches how much the others compute and sleep, and ends them.
The *judge* is the first process of the new process namespace, so that everything ends with it: it builds the file view,
drops every privilege, starts the candidate, runs the tests and writes the verdict. The *candidate* runs the program that
is judged. It has none of the judge's memory or files: the tests are read after it was forked, and what the tests want
from it they ask for over two pipes, as data. So nothing that the program does to its own interpreter changes what the
tests see or what they say. With tests on standard input and output there is a candidate for each of them, and the judge
only passes on what it printed: what it should have printed never comes here.

The request comes in on standard input: the length of the header in eight digits, the header, then program and tests.
"""

import ast
import builtins
import collections
import contextlib
import ctypes
import errno
import functools
import importlib
import io
import json
import operator
import os
import re
import resource
import select
import signal
import sys
import time


# Numbers of <linux/prctl.h>, <linux/mount.h> and <sched.h>
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
# Of mounts, cgroups, host name, IPC, users, processes, network
NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
SYS_MOUNT_SETATTR = 442
CLONE_THREAD, AF_UNIX = 0x00010000, 1
# What sends a signal of the program's choice, to whom it wants
F_SETOWN, F_SETSIG, F_SETOWN_EX, FIOSETOWN, SIOCSPGRP = 8, 10, 15, 0x8901, 0x8902
NOBODY = 65534

# Per machine: its name for seccomp, pivot_root, clone, socketpair, prctl, prlimit64, fcntl, ioctl, what no program may call:
# fork vfork execve execveat; kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo; setsid setpgid; ptrace
# process_vm_readv process_vm_writev kcmp; unshare setns mount umount2 pivot_root chroot; shmget shmat semget msgget
# mq_open memfd_create io_setup vmsplice (memory that no limit counts); inotify_init inotify_init1 fanotify_init
# userfaultfd perf_event_open bpf; add_key request_key keyctl; personality name_to_handle_at open_by_handle_at; socket;
# setpriority sched_setparam sched_setscheduler sched_setaffinity sched_setattr ioprio_set migrate_pages move_pages (of
# other processes of the same user, the judge's among them); syslog; setrlimit timer_create (a program that has itself
# killed would look like one that the machine has ended).
# fmt: off
MACHINES = {
    "x86_64": (0xC000003E, 155, 56, 53, 157, 302, 72, 16, (
        57, 58, 59, 322, 62, 200, 234, 129, 297, 112, 109, 101, 310, 311, 312, 272, 308, 165, 166, 155, 161,
        29, 30, 64, 68, 240, 319, 206, 278, 253, 294, 300, 323, 298, 321, 248, 249, 250, 135, 303, 304, 41,
        141, 142, 144, 203, 314, 251, 256, 279, 103, 160, 222,
    )),
    "aarch64": (0xC00000B7, 41, 220, 199, 167, 261, 25, 29, (
        221, 281, 129, 130, 131, 138, 240, 157, 154, 117, 270, 271, 272, 97, 268, 40, 39, 41, 51,
        194, 196, 190, 186, 180, 279, 0, 75, 26, 262, 282, 241, 280, 217, 218, 219, 92, 264, 265, 198,
        140, 118, 119, 122, 274, 30, 238, 239, 116, 164, 107,
    )),
}
# fmt: on
# From here on (io_uring, pidfd, clone3, the new mount calls, ...) the C library does without what is missing, but for
# close_range, whose absence it makes good from /proc.
FIRST_NEW_CALL, CLOSE_RANGE = 424, 436

PACKAGES = "/packages"
MAX_MESSAGE = 32 << 20  # bytes
STACK_BYTES = 64 << 20
POLL_SECONDS = 0.05
CASES = 12  # tests on standard input and output may together take the time of so many


# --------------------------------------------------------------------------------------------------------- isolation


libc = ctypes.CDLL(None, use_errno=True)
M_ARENA_MAX = -8  # of malloc.h


def check(result, what):
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def prctl(option, value, what):
    check(libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)), what)


def mount(source, target, kind=None, flags=0, data=None):
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    check(libc.mount(*encoded[:3], ctypes.c_ulong(flags), encoded[3]), f"mount {target}")


def make_read_only(target, flags=0):
    # Unlike a remount this reaches what is mounted below, and keeps the flags that the host has set.
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV, 0, 0, 0)
    path = ctypes.c_char_p(os.fsencode(target))
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    result = libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, path, flags, ctypes.byref(attributes), size)
    check(result, f"mount_setattr {target}")


def enter_namespaces(user):
    """Leaves every namespace of the host. Ids must be mapped from outside, so a child that stays behind does it."""
    lines = f"{os.geteuid()} {os.geteuid()} 1\n", f"{os.getegid()} {os.getegid()} 1\n"
    if user != os.geteuid():
        lines = tuple(f"{line}{user} {user} 1\n" for line in lines)
    parent = os.getpid()
    unshared, go = os.pipe()
    failed, report = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        try:
            if os.read(unshared, 1):
                if os.geteuid() != 0:
                    write(f"/proc/{parent}/setgroups", "deny")
                write(f"/proc/{parent}/uid_map", lines[0])
                write(f"/proc/{parent}/gid_map", lines[1])
        except OSError as error:
            os.write(report, str(error).encode())
        finally:
            os._exit(0)
    os.close(report)
    try:
        check(libc.unshare(NEW_NAMESPACES), "unshare")
        os.write(go, b"1")
    finally:
        os.close(go)
        os.waitpid(child, 0)
    problem = os.read(failed, 1000)
    if problem:
        raise PermissionError(errno.EPERM, f"user namespace: {problem.decode()}")


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def build_file_view(machine, folder_bytes, packages):
    """Makes a root of nothing but the interpreter's libraries, read-only, and an empty /tmp of limited size."""
    stdlib = os.path.dirname(os.__file__)
    libraries = os.path.dirname(stdlib)
    shown = [path for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", libraries) if os.path.isdir(path)]
    sources = {path: os.path.realpath(path) for path in shown}
    links = {path: os.readlink(path) for path in shown if os.path.islink(path)}
    # Installed packages are the host's business, not the interpreter's.
    hidden = [f"{stdlib}/site-packages", f"{stdlib}/dist-packages", f"{libraries}/python3/dist-packages"]

    mount(None, "/", flags=MS_REC | MS_PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=64k,nr_inodes=256")
    os.chdir("/tmp")
    os.mkdir("host")
    check(libc.syscall(MACHINES[machine][1], b".", b"host"), "pivot_root")
    os.chdir("/")
    for path, source in sources.items():
        if path in links and source in sources.values() and not os.path.isabs(links[path]):
            os.symlink(links[path], path)
        elif not os.path.isdir(path):
            os.makedirs(path)
            mount(f"/host{source}", path, flags=MS_BIND | MS_REC)
            make_read_only(path, AT_RECURSIVE)
    for path in packages:  # what this row asks for, before the folder that they are in is hidden
        inside = f"{PACKAGES}/{os.path.basename(path)}"
        os.makedirs(PACKAGES, exist_ok=True)
        if os.path.isdir(f"/host{path}"):
            os.mkdir(inside)
        else:
            os.close(os.open(inside, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(f"/host{path}", inside, flags=MS_BIND)
        make_read_only(inside)
    for path in hidden:
        if os.path.isdir(path):
            mount("tmpfs", path, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=4k,nr_inodes=1")
            make_read_only(path)
    os.mkdir("/dev")
    for name in ("null", "zero", "urandom"):
        os.close(os.open(f"/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o666))
        mount(f"/host/dev/{name}", f"/dev/{name}", flags=MS_BIND)
    os.mkdir("/tmp")
    size = f"mode=1777,size={folder_bytes},nr_inodes=1024"
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, size)
    check(libc.umount2(b"/host", MNT_DETACH), "umount2")
    os.rmdir("/host")
    make_read_only("/")
    os.chdir("/tmp")


def drop_privileges(user):
    if user != os.geteuid():
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capset")
    prctl(PR_SET_NO_NEW_PRIVS, 1, "no_new_privs")
    prctl(PR_SET_DUMPABLE, 0, "dumpable")


def limit_resources(config):
    limits = {
        resource.RLIMIT_CPU: config["cpu_seconds"],
        resource.RLIMIT_AS: config["memory_bytes"],
        resource.RLIMIT_FSIZE: config["folder_bytes"],
        resource.RLIMIT_NOFILE: config["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    if config["isolated"]:  # else it would count everything that the user runs on the host
        limits[resource.RLIMIT_NPROC] = config["threads"]
    # Address space is what is limited, and malloc would reserve 64 MB of it for each thread that runs beside others
    libc.mallopt(M_ARENA_MAX, 1)
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def filter_system_calls(machine):
    """No new process (threads only), no other program, no signal to anybody, no socket but a pair of local ones."""
    name, _, clone, socketpair, prctl_number, prlimit, fcntl, ioctl, denied = MACHINES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF opcodes
    allow, kill = 0x7FFF0000, 0x80000000
    refuse, missing = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    number, architecture, first = 0, 4, 16  # offsets in struct seccomp_data
    code = [(load, 0, 0, architecture), (equal, 1, 0, name), (give, 0, 0, kill), (load, 0, 0, number)]
    code += [(equal, 0, 1, CLOSE_RANGE), (give, 0, 0, allow)]
    code += [(at_least, 0, 1, FIRST_NEW_CALL), (give, 0, 0, missing)]
    for call in denied:
        code += [(equal, 0, 1, call), (give, 0, 0, refuse)]
    for call, argument, test, value, is_wanted in (
        (clone, 0, any_bit, CLONE_THREAD, True),
        (socketpair, 0, equal, AF_UNIX, True),
        (prctl_number, 0, equal, PR_SET_PDEATHSIG, False),
        (prlimit, 0, equal, 0, True),  # the library's own setrlimit is this call on process 0, which is itself
        (prlimit, 1, equal, resource.RLIMIT_CPU, False),
        *((fcntl, 1, equal, command, False) for command in (F_SETOWN, F_SETSIG, F_SETOWN_EX)),
        *((ioctl, 1, equal, command, False) for command in (FIOSETOWN, SIOCSPGRP)),
    ):
        code += [(load, 0, 0, number), (equal, 0, 3, call), (load, 0, 0, first + 8 * argument)]
        code += [(test, is_wanted, not is_wanted, value), (give, 0, 0, refuse)]
    code += [(give, 0, 0, allow)]
    packed = b"".join(
        operation.to_bytes(2, sys.byteorder) + bytes((yes, no)) + value.to_bytes(4, sys.byteorder)
        for operation, yes, no, value in code
    )

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

    program = Program(len(code), packed)
    check(libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.byref(program), 0, 0), "seccomp")  # 2: a filter


# ------------------------------------------------------------------------------------------- judge and candidate talk


class Gone(BaseException):
    """The candidate has ended or does not follow the protocol: not an `Exception`, which tests may catch."""


class Unserved(BaseException):
    """The tests need something that cannot be given them here: nobody's fault, and no verdict."""


class Remote:
    """
    An object of the other process that is not plain data: functions, classes and their instances, iterators.

    It compares and computes with other objects of the candidate only. `==` with the tests' own data is `False` without
    asking: an object that says it equals everything equals nothing, and is never shown what is expected of it. Instances
    that the tests themselves make of a class that they name (`Vector(1, 2) * 3`) compute with data too, and so do the
    results: what that class does is what is tested.
    """

    def __init__(self, peer, handle):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_handle", handle)
        object.__setattr__(self, "_made", peer.is_candidate)
        object.__setattr__(self, "_is_named", False)


VALUES = {
    *(("decimal", "Decimal"), ("fractions", "Fraction")),
    *(("datetime", name) for name in ("date", "datetime", "time", "timedelta", "timezone")),
    # Python 3.13 alone has them in a module below
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
}
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
MAPPINGS = {"OrderedDict": collections.OrderedDict, "Counter": collections.Counter}
# Builtins that cross as themselves. What runs source or reaches into objects is not among them.
SHARED = {
    name: vars(builtins)[name]
    for name in (
        "bool int float complex str bytes bytearray list tuple dict set frozenset range object "
        "abs all any divmod len max min pow repr round sorted sum ord chr hash"
    ).split()
    if name in vars(builtins)
} | {name: kind for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, Exception)}
SHARED_NAMES = {id(value): name for name, value in SHARED.items()}
COMPUTE = {
    f"__{name}__": getattr(operator, f"__{name}__")
    for name in "lt le gt ge add sub mul truediv floordiv mod pow matmul and or xor".split()
}
REVERSED = {
    f"__r{name[2:]}": functools.partial(lambda function, one, other: function(other, one), function)
    for name, function in COMPUTE.items()
    if name[2:-2] not in ("lt", "le", "gt", "ge")
}
BINARY = {"__eq__": operator.eq, "__ne__": operator.ne, **COMPUTE}
OPERATIONS = {
    "__call__": lambda function, *args, **kwargs: function(*args, **kwargs),
    "__getattr__": getattr,
    "__setattr__": setattr,
    "__enter__": lambda manager: manager.__enter__(),
    "__exit__": lambda manager, *error: manager.__exit__(None, None, None),
    "__format__": format,
    "__round__": round,
    **{f"__{f.__name__}__": f for f in (repr, str, len, bool, iter, next, hash, int, float, abs, reversed)},
    **{f"__{name}__": getattr(operator, name) for name in ("neg", "getitem", "setitem", "delitem")},
}
CONTAINERS = (list, dict, set, bytearray, collections.deque, collections.defaultdict, *MAPPINGS.values())


def add_methods():
    def forward(name):
        return lambda self, *args, **kwargs: self._peer.ask(name, self, *args, **kwargs)

    def compare(name):
        def method(self, other):
            if type(other) is Remote or self._peer.is_candidate:
                return self._peer.ask(name, self, other)
            return NotImplemented

        return method

    def compute(name):
        def method(self, other):
            if type(other) is not Remote and not self._made:
                return NotImplemented
            result = self._peer.ask(name, self, other)
            if self._made and type(result) is Remote:
                object.__setattr__(result, "_made", True)
            return result

        return method

    def contains(self, item):
        if self._made:
            return self._peer.ask("__contains__", self, item)
        return any(item is other or item == other for other in self)

    def get(self, name):
        # Libraries look for hooks by such names and trust what they find: `__array_interface__` is an address in memory.
        if name.startswith("__") and name not in ("__name__", "__qualname__", "__annotations__", "__defaults__"):
            raise AttributeError(f"a Remote has no {name}")
        return self._peer.ask("__getattr__", self, name)

    def leave(self, *error):
        # It is shown no error, and says of none that it is over: else it would call a wrong answer right
        self._peer.ask("__exit__", self)
        return False

    for name in OPERATIONS:
        setattr(Remote, name, forward(name))
    Remote.__exit__ = leave
    Remote.__getattr__ = get
    for name in ("__eq__", "__ne__"):
        setattr(Remote, name, compare(name))
    for name in (*COMPUTE, *REVERSED):
        setattr(Remote, name, compute(name))
    Remote.__contains__ = contains
    Remote.__instancecheck__ = lambda self, other: type(other) is Remote and self._peer.ask("isinstance", other, self)


add_methods()


def is_namedtuple(value):
    fields = getattr(type(value), "_fields", None)
    return type(fields) is tuple and len(fields) == tuple.__len__(value) and all(type(name) is str for name in fields)


def update(old, new):
    """Makes an argument what the other side has made of it, and what is in it too, so that the tests see it change."""
    if type(old) is not type(new):
        return
    if isinstance(old, list):
        if len(old) == len(new):
            for index, (one, other) in enumerate(zip(list(old), new, strict=True)):
                if type(one) is type(other) and type(one) in CONTAINERS:
                    update(one, other)
                else:
                    old[index] = other
        else:
            old[:] = new
    elif isinstance(old, dict):
        kept = {key: old[key] for key in new if key in old and type(old[key]) is type(new[key]) in CONTAINERS}
        old.clear()
        old.update(new)
        for key, value in kept.items():
            update(value, new[key])
            old[key] = value
    elif isinstance(old, (set, collections.deque)):
        old.clear()
        old.update(new) if isinstance(old, set) else old.extend(new)
    elif isinstance(old, bytearray):
        old[:] = new
    elif isinstance(old, tuple) and len(old) == len(new):
        for one, other in zip(old, new, strict=True):
            update(one, other)
    elif type(old).__module__ == "numpy" and type(old).__name__ == "ndarray" and old.shape == new.shape:
        old[...] = new


class Peer:
    """One end of the conversation. What crosses is JSON: plain data by value, everything else as a handle."""

    is_candidate = False

    def __init__(self, reads, writes, serves):
        self.reads, self.writes, self.serves = reads, writes, serves
        self.objects, self.handles, self.remotes, self.errors = {}, {}, {}, {}
        self.printed = lambda: ""
        self.room = MAX_MESSAGE
        self.thrown = None

    def encode(self, value):
        if value is None or isinstance(value, bool):
            return value
        kind = type(value)
        if kind is Remote:
            return ["yours", value._handle]
        if isinstance(value, int):
            return int(value) if -(1 << 63) <= value < 1 << 63 else ["int", hex(value)]
        if isinstance(value, float):
            return float(value)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, (bytes, bytearray)):
            return ["bytes" if isinstance(value, bytes) else "bytearray", value.hex()]
        if isinstance(value, tuple) and is_namedtuple(value):
            return ["namedtuple", kind.__name__, list(kind._fields), *map(self.encode, tuple.__iter__(value))]
        for name, base in SEQUENCES.items():
            if isinstance(value, base):
                return [name, *map(self.encode, base.__iter__(value))]
        if kind is collections.deque:
            return ["deque", value.maxlen, *map(self.encode, value)]
        if isinstance(value, dict):
            parts = [self.encode(part) for item in dict.items(value) for part in item]
            if kind is collections.defaultdict:
                return ["defaultdict", self.encode(value.default_factory), *parts]
            return [next((name for name, own in MAPPINGS.items() if kind is own), "dict"), *parts]
        if kind is complex:
            return ["complex", value.real, value.imag]
        if kind is range:
            return ["range", value.start, value.stop, value.step]
        if kind is type(sys) and value.__name__ in sys.stdlib_module_names:
            return ["module", value.__name__]
        if (kind.__module__, kind.__qualname__) in VALUES:
            return ["value", kind.__module__, kind.__qualname__, *map(self.encode, value.__reduce__()[1])]
        if kind.__module__ == "numpy":
            numpy = sys.modules.get("numpy")
            if isinstance(value, numpy.ndarray) and value.dtype.kind in "biufcU":
                return ["array", value.dtype.str, list(value.shape), *map(self.encode, value.ravel().tolist())]
            if isinstance(value, numpy.generic) and value.dtype.kind in "biufcU":
                return ["scalar", value.dtype.str, self.encode(value.item())]
        if id(value) in SHARED_NAMES:
            return ["builtin", SHARED_NAMES[id(value)]]
        if isinstance(value, type) and issubclass(value, Exception):
            return self.encode_error(value)
        return ["mine", self.handle(value)]

    def handle(self, value):
        handle = self.handles.setdefault(id(value), len(self.handles))
        self.objects[handle] = value
        return handle

    def encode_error(self, kind):
        """A class of exceptions: the other side makes one of that name on the nearest that both have."""
        if id(kind) in SHARED_NAMES:
            return ["builtin", SHARED_NAMES[id(kind)]]
        if kind in self.errors.values():
            return ["yours", next(handle for handle, own in self.errors.items() if own is kind)]
        base = next((base for base in kind.__bases__ if issubclass(base, Exception)), Exception)
        return ["error", self.handle(kind), kind.__name__, self.encode_error(base)]

    def decode(self, message):
        if not isinstance(message, list):
            return message
        tag, *rest = message
        if tag in SEQUENCES:
            return SEQUENCES[tag](map(self.decode, rest))
        if tag == "dict" or tag in MAPPINGS:
            result = MAPPINGS.get(tag, dict)()
            result.update(self.pairs(rest))
            return result
        if tag == "mine":
            (handle,) = rest
            if handle not in self.remotes:
                self.remotes[handle] = Remote(self, handle)
            return self.remotes[handle]
        if tag == "yours":
            return self.objects[rest[0]]
        if tag == "int":
            return int(rest[0], 16)
        if tag in ("bytes", "bytearray"):
            return {"bytes": bytes, "bytearray": bytearray}[tag].fromhex(rest[0])
        if tag in ("complex", "range"):
            return {"complex": complex, "range": range}[tag](*rest)
        if tag == "module" and rest[0] in sys.stdlib_module_names:
            return importlib.import_module(rest[0])
        if tag == "value" and tuple(rest[:2]) in VALUES:
            return getattr(importlib.import_module(rest[0]), rest[1])(*map(self.decode, rest[2:]))
        if tag == "deque":
            return collections.deque(map(self.decode, rest[1:]), rest[0])
        if tag == "defaultdict":
            factory = self.decode(rest[0])
            if factory is None or callable(factory):
                return collections.defaultdict(factory, self.pairs(rest[1:]))
        if tag == "namedtuple":
            return namedtuple(rest[0], tuple(rest[1]))(*map(self.decode, rest[2:]))
        if tag == "builtin" and rest[0] in SHARED:
            return SHARED[rest[0]]
        if tag == "error":
            return self.decode_error(*rest)
        if tag in ("array", "scalar") and re.fullmatch(r"[<>|=]?[biufcU]\d{1,4}", rest[0]):
            numpy = importlib.import_module("numpy")
            if tag == "scalar":
                return numpy.dtype(rest[0]).type(self.decode(rest[1]))
            return numpy.array([self.decode(item) for item in rest[2:]], dtype=rest[0]).reshape(rest[1])
        raise Gone("unknown data")

    def pairs(self, parts):
        parts = [self.decode(part) for part in parts]
        return dict(zip(parts[::2], parts[1::2], strict=True))

    def decode_error(self, handle, name, base):
        if handle not in self.errors:
            base = self.decode(base)
            if not (isinstance(name, str) and isinstance(base, type) and issubclass(base, Exception)):
                raise Gone("unknown data")
            if issubclass(base, (UnicodeError, StopIteration)):  # not made of one text, or the end of a loop
                base = ValueError if issubclass(base, UnicodeError) else RuntimeError
            self.errors[handle] = type(name, (base,), {"__module__": "solution"})
        return self.errors[handle]

    def send(self, message):
        data = json.dumps(message).encode()
        data = len(data).to_bytes(8, "big") + data
        while data:
            try:
                data = data[os.write(self.writes, data) :]
            except BrokenPipeError:
                raise Gone("the program ended") from None

    def receive(self):
        size = int.from_bytes(self.read(8), "big")
        if size > MAX_MESSAGE:
            raise Gone("too much data from the program")
        return json.loads(self.read(size))

    def read(self, size):
        chunks = []
        while size:
            chunk = os.read(self.reads, min(size, 1 << 16))
            if not chunk:
                raise Gone("the program ended")
            chunks.append(chunk)
            size -= len(chunk)
        return b"".join(chunks)

    def ask(self, operation, *args, **kwargs):
        """Has the other side do an operation. Lists and the like that it changed in place are changed here too."""
        named = {name: self.encode(value) for name, value in kwargs.items()}
        self.send(["ask", operation, [self.encode(value) for value in args], named, self.printed()])
        while True:
            kind, *rest, printed = self.receive()
            if printed:
                self.room -= len(printed)
                if self.room < 0:
                    raise Gone("too much output")
                sys.stdout.write(str(printed))
            if kind != "ask":
                break
            self.answer(*rest)
        if kind == "raise":
            self.throw(operation, *rest)
        value, changed, changed_named = rest
        given = [*args, *(kwargs[name] for name in named)]
        for argument, new in zip(given, [*changed, *changed_named], strict=True):
            if new is not None:
                update(argument, self.decode(new))
        result = self.decode(value)
        if operation == "__call__" and type(result) is Remote and type(args[0]) is Remote and args[0]._is_named:
            object.__setattr__(result, "_made", True)
        return result

    def throw(self, operation, kind, args, attributes, text):
        kind = self.decode(kind)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise Gone("unknown data")
        # Out of a plain call it would silently end a loop of the tests, and their asserts with it.
        if issubclass(kind, StopIteration) and operation != "__next__":
            raise RuntimeError(text)
        try:
            error = kind(*self.decode(args))
            if str(error) != text:
                error = kind(text)
        except TypeError:  # such as a UnicodeDecodeError, if not made of what it is made of
            raise (ValueError if issubclass(kind, ValueError) else RuntimeError)(text) from None
        for name, value in self.decode(attributes).items():
            if isinstance(name, str) and not name.startswith("_"):
                setattr(error, name, value)
        self.thrown = error
        raise error

    def answer(self, operation, args, kwargs):
        try:
            values = [self.decode(value) for value in args]
            named = {name: self.decode(value) for name, value in kwargs.items()}
            result = self.encode(self.serves[operation](*values, **named))
            changed = [self.encode(value) for value in values], [self.encode(value) for value in named.values()]
            given = args, kwargs.values()
            changed = [
                [None if new == old else new for new, old in zip(*pair, strict=True)]
                for pair in zip(changed, given, strict=True)
            ]
            reply = ["value", result, *changed]
        except Exception as error:
            try:
                attributes = {name: value for name, value in vars(error).items() if not name.startswith("_")}
                described = self.encode(tuple(error.args)), self.encode(attributes)
            except Exception:
                described = ["tuple"], ["dict"]
            reply = ["raise", self.encode_error(type(error)), *described, str(error)[:1000]]
        self.send([*reply, self.printed()])


@functools.lru_cache
def namedtuple(name, fields):
    return collections.namedtuple(name, fields)


class Printed(io.TextIOBase):
    """Standard output of a program, kept until the tests have their turn: they may have captured theirs."""

    encoding = "utf-8"

    def __init__(self, limit):
        self.parts, self.size, self.limit = [], 0, limit

    def writable(self):
        return True

    def write(self, text):
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self.size += len(text)
        if self.size > self.limit:  # is then stopped
            sys.__stdout__.write(text)
        else:
            self.parts.append(text)
        return len(text)

    def take(self):
        text, self.parts, self.size = "".join(self.parts), [], 0
        return text


class Asked(io.TextIOBase):
    """Standard input of a program whose tests may have put something into theirs."""

    def __init__(self, peer):
        self.peer = peer

    def readable(self):
        return True

    def read(self, size=-1):
        return self.peer.ask("stdin", "read", -1 if size is None else size)

    def readline(self, size=-1):
        return self.peer.ask("stdin", "readline", -1 if size is None else size)


def start_candidate(config, kept):
    """Leaves a candidate with no file but those it is to have, and nothing of how it was started."""
    edges = [2, *sorted(kept), 1024]
    for low, high in zip(edges, edges[1:], strict=False):
        os.closerange(low + 1, high)
    sys.argv = [""]
    if config["packages"]:
        sys.path.append(PACKAGES)


def run_candidate(setup, program, reads, writes, config):
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    start_candidate(config, (reads, writes))
    module = type(sys)("solution")
    sys.modules["solution"] = module
    space = vars(module)

    def names(wanted, expression):
        found = {name: space[name] for name in wanted if name in space}
        if expression and not expression.isidentifier():
            found[expression] = eval(expression, space)
        return found

    serves = {
        **OPERATIONS,
        **BINARY,
        **REVERSED,
        "__contains__": operator.contains,
        "isinstance": isinstance,
        "names": names,
    }
    peer = Peer(reads, writes, serves)
    peer.is_candidate = True
    exec(compile(setup, "setup.py", "exec", dont_inherit=True), space)
    exec(compile(program, "solution.py", "exec", dont_inherit=True), space)
    sys.stdout.flush()
    sys.stdout = Printed(config["output_bytes"])
    peer.printed = sys.stdout.take
    sys.stdin = Asked(peer)
    builtins.input = lambda prompt="": peer.ask("input", str(prompt))
    while True:
        peer.answer(*peer.receive()[1:-1])


# --------------------------------------------------------------------------------- what the tests show to the program


# Stand-ins of `unittest.mock` may be called and followed, but not changed, and the tests' questions to them are theirs.
NOT_OF_MOCKS = (
    "assert",
    "configure_mock",
    "attach_mock",
    "mock_add_spec",
    "reset_mock",
    "return_value",
    "side_effect",
)
# What the tests may replace in their own process, because the program's goes to them for it
REPLACED = {"builtins.input", "sys.stdin", "sys.stdout"}
PASSED = {("_io", "StringIO"), ("_io", "BytesIO"), ("random", "Random"), ("re", "Pattern"), ("re", "Match")}


def serves_of_tests(box):
    """
    What the program may ask of the tests' objects. Functions can be called and iterators followed. Of instances of the
    tests' own classes, such as a `ListNode`, it may have what has a public name, and the class's operators; of others
    nothing, which is written down: what then fails is nobody's fault.
    """

    def own(value):
        kind = type(value)
        return kind.__module__ == "__main__" and kind not in (Peer, Remote)

    def open_to(value):
        return own(value) or (type(value).__module__, type(value).__qualname__) in PASSED

    def refuse(value, operation):
        name = value.__name__ if isinstance(value, type) else type(value).__name__
        if any(value is shown for shown in box.shown.values()):  # and no data that the program has brought along
            box.unserved = f"the tests pass a {name}, of which the program wants {operation}"
        raise AttributeError(f"{name} is not served: {operation}")

    def get(value, name):
        if not isinstance(name, str) or name.startswith("_"):
            raise AttributeError(f"{name!r} is not for the program")
        is_mock = type(value).__module__ == "unittest.mock" and not name.startswith(NOT_OF_MOCKS)
        return getattr(value, name) if is_mock or open_to(value) else refuse(value, name)

    def put(value, name, new):
        if not isinstance(name, str) or name.startswith("_"):
            raise AttributeError(f"{name!r} is not for the program")
        setattr(value, name, new) if own(value) else refuse(value, name)

    def of_own(name, function):
        return lambda value, *args: function(value, *args) if open_to(value) else refuse(value, name)

    plain = ("__bool__", "__hash__")
    left = {"__call__", "__iter__", "__next__", "__getattr__", "__setattr__", *plain}
    binary = {**BINARY, **REVERSED, "__contains__": operator.contains}
    return {
        **{name: OPERATIONS[name] for name in ("__call__", "__iter__", "__next__", *plain)},
        "__getattr__": get,
        "__setattr__": put,
        **{name: of_own(name, f) for name, f in {**OPERATIONS, **binary}.items() if name not in left},
        "__eq__": lambda one, other: one == other if open_to(one) else one is other,
        "__ne__": lambda one, other: one != other if open_to(one) else one is not other,
        "isinstance": lambda value, kind: isinstance(value, kind),
        "input": lambda prompt: input(prompt),
        "stdin": lambda name, size: {"read": sys.stdin.read, "readline": sys.stdin.readline}[name](size),
    }


class Box:
    """Where the judge's end of the conversation writes down what it could not serve."""

    unserved = None
    shown = {}  # by handle, what the tests have passed that is not plain data


# ----------------------------------------------------------------------------------------------------------- verdict


def used_names(code):
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            names |= used_names(constant)
    return names


def called_names(tree):
    """Names of what the tests call themselves, outside of any function or class of theirs."""
    found, rest = set(), list(tree.body)
    while rest:
        node = rest.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found.add(node.func.id)
        rest += ast.iter_child_nodes(node)
    return found


def count_asserts(tree, has_check):
    """Makes every assert at the top level of the module and of `check` count instead of raise; returns how many."""
    bodies = [tree.body]
    if has_check:
        bodies += [node.body for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    total = 0
    for body in bodies:
        for index, node in enumerate(body):
            if isinstance(node, ast.Assert) and not isinstance(node.test, ast.Constant):
                counted = ast.parse("try: pass\nexcept Exception: pass\nelse: __passed__()").body[0]
                counted.body = [node]
                body[index] = ast.fix_missing_locations(ast.copy_location(counted, node))
                total += 1
    return total


def run_tests(tests, entry_point, partial_credit, peer):
    try:
        tree = compile(tests, "tests", "exec", ast.PyCF_ONLY_AST, dont_inherit=True)
        called = called_names(tree)
        total, passed = 0, []
        if partial_credit:
            total = count_asserts(tree, entry_point or "check" in called)
        code = compile(tree, "tests", "exec", dont_inherit=True)
        entry = compile(entry_point, "entry_point", "eval", dont_inherit=True) if entry_point else None
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"status": "invalid", "score": None, "detail": f"the tests are not Python ({type(error).__name__})"}
    if not tree.body:
        return {"status": "invalid", "score": None, "detail": "there are no tests"}
    module = sys.modules["__main__"] = type(sys)("__main__")
    space = vars(module)
    box, detail, unserved = peer.box, None, None

    def attempt(function):
        """Runs one test; with partial credit it counts, and the next one runs whatever becomes of it."""
        nonlocal total
        total += 1
        try:
            function()
        except Exception:
            if not partial_credit:
                raise
        else:
            passed.append(None)

    try:
        # A program that defines `abs` must not decide what `abs` means in the tests.
        names = {name for name in used_names(code) - set(dir(builtins)) if not name.startswith("__")}
        names |= {entry_point} if entry_point and entry_point.isidentifier() else set()
        found = dict(peer.ask("names", sorted(names), None))
        found = {name: found[name] for name in names if name in found}  # and nothing else that it may send
        for name, value in found.items():
            if type(value) is Remote and name[:1].isupper():
                object.__setattr__(value, "_is_named", True)
        space.update(found)
        solution = sys.modules["solution"] = type(sys)("solution")  # `from solution import ...`
        vars(solution).update(found)
        space["__passed__"] = lambda: passed.append(None)
        try:
            exec(code, space)
        except SystemExit as error:  # of the tests: what the program raises arrives as an `Exception`, or ends it
            if error.code:
                raise
        if entry_point and "check" in space and "check" not in called:
            if entry_point.isidentifier():
                candidate = found[entry_point]
            else:
                needed = sorted(used_names(entry) - set(dir(builtins)))
                candidate = dict(peer.ask("names", needed, entry_point))[entry_point]
            space["check"](candidate)
        for test in list_tests(space, called):
            attempt(test)
    except SystemExit as error:
        detail = f"SystemExit({error.code!r:.50})"
    except Gone as error:
        detail = str(error)
    except Unserved as error:
        detail = unserved = str(error)
    except BaseException as error:
        trace, line = error.__traceback__, None
        while trace:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "tests" else line
            trace = trace.tb_next
        detail = type(error).__name__ + (f" at line {line} of the tests" if line else "")
        # An error of the program's own is its fault, unless it was given an object that is not quite what it is here
        is_ours = error is not peer.thrown
        if isinstance(error, (TypeError, AttributeError)) and "Remote" in str(error) and (is_ours or peer.objects):
            unserved = f"the tests do with an object of the program what cannot be served: {error}"[:200]
        if isinstance(error, ImportError) and error.name not in (None, "solution") and is_ours:
            unserved = f"the tests import {error.name}, which the sandbox does not have"
    if partial_credit and total:
        score = len(passed) / (total if detail is None else max(total, len(passed) + 1))
        detail = detail or (f"{len(passed)} of {total} tests" if score < 1 else None)
    else:
        score = float(detail is None)
    unserved = unserved or box.unserved or replaced(tests)
    if score < 1 and unserved:
        return {"status": "unserved", "score": None, "detail": unserved}
    return {"status": "passed" if score == 1 else "failed", "score": score, "detail": detail}


def replaced(tests):
    """Says what the tests replace that only the program's own process could have replaced."""
    targets = re.findall(r"""(?:\bpatch|\.setattr)\(\s*["']([\w.]+)["']""", tests)
    targets += map(".".join, re.findall(r"""(?:\bpatch\.object|\.setattr)\(\s*([\w.]+)\s*,\s*["'](\w+)""", tests))
    targets += re.findall(r"\b(?:patch\.dict|monkeypatch\.(?:setenv|delenv|setitem|delitem|chdir))", tests)
    wanted = [target for target in targets if target not in REPLACED]
    return f"the tests replace {wanted[0]}, which is out of their reach in the program" if wanted else None


def list_tests(space, called):
    """The tests that wait for a runner: `test` functions, classes of them and of `unittest`."""
    unittest = sys.modules.get("unittest")
    for name, value in list(space.items()):
        if type(value) is Remote:
            continue
        if isinstance(value, type) and unittest and issubclass(value, unittest.TestCase):
            if value.__module__ == "__main__":
                for case in unittest.defaultTestLoader.loadTestsFromTestCase(value):
                    yield functools.partial(run_case, unittest, case)
        elif isinstance(value, type) and name.startswith("Test") and value.__module__ == "__main__":
            for method in [method for method in dir(value) if method.startswith("test")]:
                yield from with_parameters(getattr(value, method), value, method, space)
        elif name.startswith("test") and name not in called and type(value) is type(list_tests):
            yield from with_parameters(value, None, name, space)


def run_case(unittest, case):
    result = unittest.TestResult()
    result.failfast = True
    for name in ("addError", "addFailure"):
        setattr(result, name, lambda test, error: result.raised.append(error[1]))
    result.raised = []
    result.addSubTest = lambda test, subtest, error: error and result.raised.append(error[1])
    unittest.TestSuite([case]).run(result)
    if result.raised:
        raise result.raised[0]


def with_parameters(function, owner, name, space):
    """One test for each of what `pytest.mark.parametrize` lists, with the fixtures that it asks for."""
    sets = [{}]
    for mark in getattr(function, "pytestmark", []):
        if mark.name in ("skip", "skipif") and (mark.name == "skip" or any(mark.args)):
            return
        if mark.name == "parametrize":
            names, values = [*mark.args, *mark.kwargs.values()][:2]
            names = [part.strip() for part in names.split(",")] if isinstance(names, str) else list(names)
            rows = [getattr(value, "values", value) if hasattr(value, "marks") else value for value in values]
            rows = [
                row if len(names) > 1 or hasattr(value, "marks") else (row,)
                for row, value in zip(rows, values, strict=True)
            ]
            sets = [{**known, **dict(zip(names, row, strict=True))} for row in rows for known in sets]
    for known in sets:
        yield functools.partial(run_function, function, owner, name, known, space)


def run_function(function, owner, name, known, space):
    with contextlib.ExitStack() as stack:
        code = getattr(function, "__code__", None)
        if code is None or code.co_flags & 0x80:  # a coroutine
            raise Unserved(f"the test {name} is not a plain function")
        instance = owner() if owner else None
        if owner and hasattr(instance, "setup_method"):
            needed = instance.setup_method.__code__.co_argcount - 1
            instance.setup_method(*[getattr(instance, name)] * needed)
        if owner and hasattr(instance, "teardown_method"):
            stack.callback(instance.teardown_method, *[None] * (instance.teardown_method.__code__.co_argcount - 1))
        made = {"__instance__": instance, **known}
        given = {wanted: fixture(wanted, made, space, stack) for wanted in parameters(function, owner)}
        (getattr(instance, name) if owner else function)(**given)


def parameters(function, owner):
    code = function.__code__
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    optional = len(function.__defaults__ or ())
    return names[1 if owner else 0 : len(names) - optional]


def fixture(name, made, space, stack):
    """Builtin fixtures that need no runner, and those of the tests."""
    if name in made:
        return made[name]
    defined = getattr(type(made["__instance__"]), name, None) or space.get(name)
    function = getattr(defined, "__pytest_wrapped__", None) or getattr(defined, "_fixture_function", None)
    function = getattr(function, "obj", function)
    if function is not None:
        owner = made["__instance__"] if function.__code__.co_varnames[:1] == ("self",) else None
        given = {wanted: fixture(wanted, made, space, stack) for wanted in parameters(function, owner)}
        value = function(owner, **given) if owner else function(**given)
        if function.__code__.co_flags & 0x20:  # a generator: what follows its `yield` cleans up
            steps, value = value, next(value)
            stack.callback(next, steps, None)
    elif name == "capsys":
        value = Capture(stack)
    elif name == "monkeypatch" and "pytest" in sys.modules:
        value = stack.enter_context(sys.modules["pytest"].MonkeyPatch.context())
    elif name == "tmp_path":
        import pathlib
        import tempfile

        value = pathlib.Path(tempfile.mkdtemp())
    else:
        raise Unserved(f"the tests ask for the fixture {name}")
    made[name] = value
    return value


class Capture:
    """What `capsys` is for: the text that has been printed since it was last read."""

    def __init__(self, stack):
        self.files = io.StringIO(), io.StringIO()
        stack.enter_context(contextlib.redirect_stdout(self.files[0]))
        stack.enter_context(contextlib.redirect_stderr(self.files[1]))

    def readouterr(self):
        texts = [file.getvalue() for file in self.files]
        for file in self.files:
            file.seek(0)
            file.truncate()
        return namedtuple("CaptureResult", ("out", "err"))(*texts)


def without_runners(tests):
    """`unittest.main()` and `pytest.main()` at the end of a file: what they would run is run here anyhow."""
    for name in ("unittest", "pytest"):
        if name in tests:
            with contextlib.suppress(ImportError):
                importlib.import_module(name).main = lambda *args, **kwargs: 0


class Nothing:
    """The conversation with a program that defines nothing."""

    box, thrown, objects = Box(), None, {}

    def ask(self, operation, *args):
        if operation == "names":
            return {}
        raise Gone("there is no program")


def pass_without_program(number, sizes, entry_points, config):
    """Runs each of several tests against nothing, in a process of its own; returns those that pass all the same."""
    passing = []
    for index in range(number):
        tests = take(sizes[index]).decode()
        child = os.fork()
        if child == 0:
            try:
                os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
                os.dup2(1, 2)
                filter_system_calls(os.uname().machine)
                sys.path += [PACKAGES] * bool(config["packages"])
                without_runners(tests)
                libc.alarm(max(1, int(config["test_seconds"])))
                score = run_tests(tests, entry_points[index], config["partial_credit"], Nothing())["score"]
                os._exit(1 if score else 0)
            finally:
                os._exit(0)
        if os.waitpid(child, 0)[1] == 1 << 8:
            passing.append(index)
    return passing


# --------------------------------------------------------------------------------------- standard input and output


def run_main(setup, program, stdin, stdout, config, machine):
    """The whole life of a program that reads and prints, in a process of its own."""
    code = 1
    try:
        prctl(PR_SET_PDEATHSIG, 9, "pdeathsig")
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        start_candidate(config, ())
        resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES, resource.getrlimit(resource.RLIMIT_STACK)[1]))
        filter_system_calls(machine)
        sys.stdout.reconfigure(line_buffering=False)
        module = sys.modules["__main__"] = type(sys)("__main__")
        space = vars(module)
        exec(compile(setup, "setup.py", "exec", dont_inherit=True), space)
        exec(compile(program, "solution.py", "exec", dont_inherit=True), space)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            # As the interpreter ends: other threads, what is registered, what is buffered
            if "threading" in sys.modules:
                sys.modules["threading"]._shutdown()
            importlib.import_module("atexit")._run_exitfuncs()
            for file in (sys.stdout, sys.__stdout__):
                file.flush()
        except BaseException:
            code = 1
        os._exit(code & 0xFF)


def run_cases(setup, program, config, machine, say):
    """Runs the program once for each input, and says what it printed."""
    spent = 0.0
    for size in config["input_bytes"]:
        stdin = os.memfd_create("stdin")
        data = take(size)
        while data:
            data = data[os.write(stdin, data) :]
        os.lseek(stdin, 0, os.SEEK_SET)
        reads, writes = os.pipe()
        candidate = os.fork()
        if candidate == 0:
            run_main(setup, program, stdin, writes, config, machine)
        os.close(stdin)
        os.close(writes)
        printed, ended = bytearray(), None
        while chunk := os.read(reads, 1 << 16):
            printed += chunk
            if len(printed) > config["case_bytes"]:
                ended = "output"
                os.kill(candidate, signal.SIGKILL)
                break
        os.close(reads)
        _, status, usage = os.wait4(candidate, 0)
        seconds = usage.ru_utime + usage.ru_stime
        spent += seconds
        if ended is None and seconds > config["seconds"] - 0.02:
            ended = "timeout"
        elif ended is None and os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            ended = "killed"  # no limit of ours, and it cannot do it itself
        elif ended is None:
            ended = "done" if status == 0 else "error"
        text = printed[: config["case_bytes"]].decode("utf-8", "replace")
        say({"status": "case", "ended": ended, "printed": text if ended == "done" else ""})
        if ended != "done" and not config["partial_credit"]:
            break
        if spent > CASES * config["seconds"]:
            say({"status": "stopped", "detail": "timeout"})
            break
        if config["wipes"]:
            try:
                wipe(".")
            except (OSError, RecursionError):
                say({"status": "stopped", "detail": "mess"})
                break
    say({"status": "done"})


def wipe(folder):
    """Empties the folder of the program, whatever it has done to it."""
    if os.stat(folder).st_uid == os.geteuid():
        os.chmod(folder, 0o700)
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            wipe(entry.path)
            os.rmdir(entry.path)
        else:
            os.unlink(entry.path)


# ---------------------------------------------------------------------------------------------------------- launcher


class Watch:
    """What the processes of the sandbox have computed and slept, as the host's /proc says."""

    def __init__(self, proc, judge):
        self.proc, self.judge = proc, judge
        self.last, self.idle, self.candidate, self.before = None, 0.0, None, 0.0
        self.seen = time.monotonic()

    def text(self, path):
        file = os.open(path, os.O_RDONLY, dir_fd=self.proc)
        try:
            return os.read(file, 4096).decode("ascii", "replace")
        finally:
            os.close(file)

    def fields(self, path):
        """State, and seconds of processor time, own and of ended children."""
        fields = self.text(path).rpartition(")")[2].split()
        ticks = os.sysconf("SC_CLK_TCK")
        return fields[0], (int(fields[11]) + int(fields[12])) / ticks, (int(fields[13]) + int(fields[14])) / ticks

    def look(self):
        """Returns the seconds that judge and candidate have each computed, and that nothing happened."""
        now = time.monotonic()
        passed, self.seen = min(now - self.seen, 2 * POLL_SECONDS), now
        state, judge, ended = self.fields(f"{self.judge}/stat")
        children = self.text(f"{self.judge}/task/{self.judge}/children").split()
        candidate, busy = 0.0, state in "RD"
        if children:
            candidate = self.fields(f"{children[0]}/stat")[1]
            for task in self.threads(children[0]):
                busy |= self.fields(f"{children[0]}/task/{task}/stat")[0] in "RD"
            if children[0] != self.candidate:
                self.candidate, self.idle, busy = children[0], 0.0, True
                self.before = self.before or judge
        total = judge + ended + candidate
        # A process that waits for its processor is ready to run; one that sleeps is not, and computes nothing.
        if children and not busy and total == self.last:
            self.idle += passed
        self.last = total
        return (judge - self.before if children else 0.0), candidate, self.idle

    def threads(self, process):
        folder = os.open(f"{process}/task", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.proc)
        try:
            return os.listdir(folder)
        finally:
            os.close(folder)


def supervise(judge, config, proc, say):
    """Waits for the judge, and ends it when it or its candidate has used up its time."""
    watch, deadline, watched = os.pidfd_open(judge), time.monotonic() + config["wall_seconds"], None
    if proc is not None:
        try:
            me = os.readlink("self", dir_fd=proc)
            with os.fdopen(os.open(f"{me}/task/{me}/children", os.O_RDONLY, dir_fd=proc)) as file:
                watched = Watch(proc, int(file.read().split()[0]))
        except (OSError, IndexError):
            pass  # a kernel that does not tell: its own limits hold, and the wall time
    stopped = None
    while stopped is None and not select.select([watch], [], [], POLL_SECONDS)[0]:
        if time.monotonic() > deadline:
            stopped = "starved"
        if watched is not None:
            try:
                judge_seconds, candidate_seconds, idle = watched.look()
            except (OSError, IndexError, ValueError):
                continue  # it ended meanwhile
            if max(judge_seconds, candidate_seconds, idle) > config["seconds"]:
                stopped = "timeout"
    if stopped is not None:
        os.kill(judge, signal.SIGKILL)
    _, status = os.waitpid(judge, 0)
    if stopped is None and os.WIFSIGNALED(status):
        seconds = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = seconds.ru_utime + seconds.ru_stime
        stopped = "timeout" if spent > config["seconds"] else "killed"
    if stopped is not None:
        say({"status": "stopped", "detail": stopped})


def take(size):
    """Reads so much of the request, and nothing beyond it."""
    chunks = []
    while size:
        chunk = os.read(0, min(size, 1 << 20))
        if not chunk:
            raise OSError(errno.EIO, "the request is cut short")
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def main():
    config = json.loads(take(int(take(8))))
    isolated, machine = config["isolated"], os.uname().machine
    verdicts = os.dup(1)

    def say(message):
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(verdicts, data) :]

    libc.alarm(int(2 * config["wall_seconds"]) + 60)  # the launcher's, whatever becomes of who started it
    try:
        if machine not in MACHINES:
            raise OSError(errno.ENOSYS, f"no system call filter for {machine}")
        proc = config["proc"]
        if proc is None and os.path.isdir("/proc/self"):
            proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        # Root becomes nobody inside, because limits do not bind root. Inside a container nobody may not exist.
        user = os.geteuid()
        if isolated and user == 0:
            with open("/proc/self/uid_map") as file:
                spans = [list(map(int, line.split())) for line in file]
            user = NOBODY if any(first <= NOBODY < first + size for first, _, size in spans) else 0
        if isolated:
            enter_namespaces(user)
        else:
            prctl(PR_SET_DUMPABLE, 0, "dumpable")
        prctl(PR_SET_PDEATHSIG, 9, "pdeathsig")
        alive, holds_alive = os.pipe()
        judge = os.fork()
        if judge:
            if config["parent"] is None or os.getppid() == config["parent"]:
                os.close(alive)
                os.closerange(0, 3)
                supervise(judge, config, proc, say)
            os._exit(0)
        os.close(holds_alive)
        if proc is not None:
            os.close(proc)
        if isolated:
            build_file_view(machine, config["folder_bytes"], config["packages"])
        elif config["folder"]:
            os.chdir(config["folder"])
        drop_privileges(user)
        prctl(PR_SET_PDEATHSIG, 9, "pdeathsig")
        os.set_blocking(alive, False)
        try:
            os.read(alive, 1)
            os._exit(1)  # the launcher was gone before the line above could matter
        except BlockingIOError:
            os.close(alive)
        limit_resources(config)
        sys.stdout.reconfigure(line_buffering=True)  # nobody flushes at the end
        if config["mode"] == "nothing":
            say({"status": "ready"})
            sizes = config["tests_bytes"]
            passing = pass_without_program(len(sizes), sizes, config["entry_points"], config)
            say({"status": "done", "passing": passing})
            os._exit(0)
        setup, program = take(config["setup_bytes"]).decode(), take(config["program_bytes"]).decode()
        if config["mode"] == "cases":
            say({"status": "ready"})
            run_cases(setup, program, config, machine, say)
            os._exit(0)
        from_candidate, to_judge = os.pipe()
        from_judge, to_candidate = os.pipe()
        say({"status": "ready"})
        candidate = os.fork()
        if candidate == 0:
            try:
                prctl(PR_SET_PDEATHSIG, 9, "pdeathsig")
                filter_system_calls(machine)
                run_candidate(setup, program, from_judge, to_judge, config)
            except Gone:  # the tests are done
                os._exit(0)
            finally:
                if isinstance(sys.stdout, Printed):
                    sys.__stdout__.write(sys.stdout.take())
                    sys.stdout = sys.__stdout__
                sys.excepthook(*sys.exc_info())
                sys.stdout.flush()
                os._exit(1)
        os.close(to_judge)
        os.close(from_judge)
        filter_system_calls(machine)
    except OSError as error:
        say({"status": "refused", "detail": error.strerror})
        os._exit(1)
    tests = setup + "\n" + take(config["tests_bytes"]).decode() if setup else take(config["tests_bytes"]).decode()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(2, 1)
    if config["packages"]:
        sys.path.append(PACKAGES)
    without_runners(tests)
    box = Box()
    peer = Peer(from_candidate, to_candidate, serves_of_tests(box))
    peer.box, peer.room, box.shown = box, config["output_bytes"], peer.objects
    verdict = run_tests(tests, config["entry_point"], config["partial_credit"], peer)
    if verdict["score"] == 0 and verdict["detail"] == "the program ended":
        _, status, usage = os.wait4(candidate, 0)
        seconds = usage.ru_utime + usage.ru_stime
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            # Nothing in a sandbox can send this: the limit on processor time, or else the host
            late = seconds > config["seconds"] - 0.1
            say({"status": "stopped", "detail": "timeout" if late else "killed"})
            os._exit(0)
    say(verdict)
    os._exit(0)


if __name__ == "__main__":
    main()
