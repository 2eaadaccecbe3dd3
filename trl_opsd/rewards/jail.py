"""
What runs inside the sandbox, started by `sandbox.py` as a script; it imports nothing but the standard library.

Three processes. The *launcher* makes the namespaces and waits. The *judge* is the first process of the new process
namespace, so that everything ends with it: it builds the file view, drops every privilege, starts the candidate, runs
the tests and writes the verdict. The *candidate* runs the program that is judged. It has none of the judge's memory or
files: the tests reach the sandbox after it was forked, and what the tests want from it they ask for over two pipes, as
data. So nothing that the program does to its own interpreter changes what the tests see or what they say.
"""

import builtins
import ctypes
import errno
import importlib
import json
import operator
import os
import resource
import sys


# Numbers of <linux/prctl.h>, <linux/mount.h> and <sched.h>
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
# Of mounts, cgroups, host name, IPC, users, processes, network
NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH, AT_FDCWD, AT_RECURSIVE = 2, -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
SYS_MOUNT_SETATTR = 442
CLONE_THREAD, AF_UNIX = 0x00010000, 1
NOBODY = 65534

# Per machine: its name for seccomp, pivot_root, clone, socketpair, prctl, and what no program may call, in this order:
# fork vfork execve execveat; kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo; setsid setpgid; ptrace
# process_vm_readv process_vm_writev kcmp; unshare setns mount umount2 pivot_root chroot; shmget shmat semget msgget
# mq_open memfd_create io_setup vmsplice (memory that no limit counts); inotify_init inotify_init1 fanotify_init
# userfaultfd perf_event_open bpf; add_key request_key keyctl; personality name_to_handle_at open_by_handle_at; socket
# fmt: off
MACHINES = {
    "x86_64": (0xC000003E, 155, 56, 53, 157, (
        57, 58, 59, 322, 62, 200, 234, 129, 297, 112, 109, 101, 310, 311, 312, 272, 308, 165, 166, 155, 161,
        29, 30, 64, 68, 240, 319, 206, 278, 253, 294, 300, 323, 298, 321, 248, 249, 250, 135, 303, 304, 41,
    )),
    "aarch64": (0xC00000B7, 41, 220, 199, 167, (
        221, 281, 129, 130, 131, 138, 240, 157, 154, 117, 270, 271, 272, 97, 268, 40, 39, 41, 51,
        194, 196, 190, 186, 180, 279, 0, 75, 26, 262, 282, 241, 280, 217, 218, 219, 92, 264, 265, 198,
    )),
}
# fmt: on
# From here on (io_uring, pidfd, clone3, the new mount calls, ...) the C library does without what is missing, but for
# close_range, whose absence it makes good from /proc.
FIRST_NEW_CALL, CLOSE_RANGE = 424, 436

MAX_MESSAGE = 32 << 20  # bytes
STARTUP_SECONDS = 60


# --------------------------------------------------------------------------------------------------------- isolation


libc = ctypes.CDLL(None, use_errno=True)


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


def build_file_view(machine, folder_bytes):
    """Makes a root of nothing but the interpreter's libraries, read-only, and an empty /tmp of limited size."""
    stdlib = os.path.dirname(os.__file__)
    libraries = os.path.dirname(stdlib)
    shown = [path for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", libraries) if os.path.isdir(path)]
    sources = {path: os.path.realpath(path) for path in shown}
    links = {path: os.readlink(path) for path in shown if os.path.islink(path)}
    # Installed packages are the host's business, not the interpreter's.
    packages = [f"{stdlib}/site-packages", f"{stdlib}/dist-packages", f"{libraries}/python3/dist-packages"]

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
    for path in packages:
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
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def filter_system_calls(machine):
    """No new process (threads only), no other program, no signal to others, no socket but a pair of local ones."""
    name, _, clone, socketpair, prctl_number, denied = MACHINES[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF opcodes
    allow, kill = 0x7FFF0000, 0x80000000
    refuse, missing = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    number, architecture, first = 0, 4, 16  # offsets in struct seccomp_data
    code = [(load, 0, 0, architecture), (equal, 1, 0, name), (give, 0, 0, kill), (load, 0, 0, number)]
    code += [(equal, 0, 1, CLOSE_RANGE), (give, 0, 0, allow)]
    code += [(at_least, 0, 1, FIRST_NEW_CALL), (give, 0, 0, missing)]
    for call in denied:
        code += [(equal, 0, 1, call), (give, 0, 0, refuse)]
    for call, test, value, then, otherwise in (
        (clone, any_bit, CLONE_THREAD, allow, refuse),
        (socketpair, equal, AF_UNIX, allow, refuse),
        (prctl_number, equal, PR_SET_PDEATHSIG, refuse, allow),
    ):
        code += [(equal, 0, 4, call), (load, 0, 0, first), (test, 0, 1, value), (give, 0, 0, then)]
        code += [(give, 0, 0, otherwise)]
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


class Remote:
    """
    An object of the other process that is not plain data: functions, classes and their instances, iterators.

    It compares and computes with other objects of the candidate only. `==` with the tests' own data is `False` without
    asking: an object that says it equals everything equals nothing, and is never shown what is expected of it.
    """

    def __init__(self, peer, handle):
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_handle", handle)


VALUES = {("decimal", "Decimal"), ("fractions", "Fraction")} | {
    ("datetime", name) for name in ("date", "datetime", "time", "timedelta")
}
SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
BINARY = {
    f"__{name}__": getattr(operator, f"__{name}__")
    for name in "eq ne lt le gt ge add sub mul truediv floordiv mod pow matmul and or xor".split()
}
OPERATIONS = {
    "__call__": lambda function, *args, **kwargs: function(*args, **kwargs),
    "__getattr__": getattr,
    "__setattr__": setattr,
    **{f"__{f.__name__}__": f for f in (repr, str, len, bool, iter, next, hash, int, float, abs, reversed)},
    **{f"__{name}__": getattr(operator, name) for name in ("neg", "getitem", "setitem", "delitem")},
}


def add_methods():
    def forward(name):
        return lambda self, *args, **kwargs: self._peer.ask(name, self, *args, **kwargs)

    def compare(name):
        return lambda self, other: self._peer.ask(name, self, other) if type(other) is Remote else NotImplemented

    for name in OPERATIONS:
        setattr(Remote, name, forward(name))
    for name in BINARY:
        setattr(Remote, name, compare(name))
    Remote.__instancecheck__ = lambda self, other: type(other) is Remote and self._peer.ask("isinstance", other, self)


add_methods()


class Peer:
    """One end of the conversation. What crosses is JSON: plain data by value, everything else as a handle."""

    def __init__(self, reads, writes, serves):
        self.reads, self.writes, self.serves = reads, writes, serves
        self.objects, self.handles, self.remotes = {}, {}, {}

    def encode(self, value):
        if value is None or isinstance(value, bool):
            return value
        if type(value) is Remote:
            return ["yours", value._handle]
        if isinstance(value, int):
            return int(value) if -(1 << 63) <= value < 1 << 63 else ["int", hex(value)]
        if isinstance(value, float):
            return float(value)
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, (bytes, bytearray)):
            return ["bytes" if isinstance(value, bytes) else "bytearray", value.hex()]
        for name, kind in SEQUENCES.items():
            if isinstance(value, kind):
                return [name, *map(self.encode, kind.__iter__(value))]
        if isinstance(value, dict):
            return ["dict", *(self.encode(part) for item in dict.items(value) for part in item)]
        kind = type(value)
        if kind is complex:
            return ["complex", value.real, value.imag]
        if kind is range:
            return ["range", value.start, value.stop, value.step]
        if kind is type(sys) and value.__name__ in sys.stdlib_module_names:
            return ["module", value.__name__]
        if (kind.__module__, kind.__qualname__) in VALUES:
            return ["value", kind.__module__, kind.__qualname__, *map(self.encode, value.__reduce__()[1])]
        handle = self.handles.setdefault(id(value), len(self.handles))
        self.objects[handle] = value
        return ["mine", handle]

    def decode(self, message):
        if not isinstance(message, list):
            return message
        tag, *rest = message
        if tag in SEQUENCES:
            return SEQUENCES[tag](map(self.decode, rest))
        if tag == "dict":
            parts = [self.decode(part) for part in rest]
            return dict(zip(parts[::2], parts[1::2], strict=True))
        if tag == "mine":
            (handle,) = rest
            return self.remotes.setdefault(handle, Remote(self, handle))
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
        raise Gone("unknown data")

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
        self.send(["ask", operation, [self.encode(value) for value in args], named])
        while True:
            kind, *rest = self.receive()
            if kind != "ask":
                break
            self.answer(*rest)
        if kind == "raise":
            names, text = rest
            for name in names:
                found = vars(builtins).get(name)
                if isinstance(found, type) and issubclass(found, Exception):
                    # Out of a plain call it would silently end a loop of the tests, and their asserts with it.
                    misplaced = found is StopIteration and operation != "__next__"
                    raise (RuntimeError if misplaced or issubclass(found, UnicodeError) else found)(text)
            raise RuntimeError(text)
        value, changed = rest
        for argument, new in zip(args, changed, strict=True):
            if new is not None and type(argument) is list:
                argument[:] = self.decode(new)
            elif new is not None and type(argument) in (dict, set):
                new = self.decode(new)
                argument.clear()
                argument.update(new)
        return self.decode(value)

    def answer(self, operation, args, kwargs):
        try:
            values = [self.decode(value) for value in args]
            named = {name: self.decode(value) for name, value in kwargs.items()}
            result = self.encode(self.serves[operation](*values, **named))
            after = [self.encode(value) for value in values]
            changed = [None if new == old else new for new, old in zip(after, args, strict=True)]
            reply = ["value", result, changed]
        except Exception as error:
            reply = ["raise", [kind.__name__ for kind in type(error).__mro__], str(error)[:1000]]
        self.send(reply)


def run_candidate(program, reads, writes):
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(2, 1)
    low, high = sorted((reads, writes))
    os.closerange(3, low)
    os.closerange(low + 1, high)
    os.closerange(high + 1, 1024)
    sys.argv = [""]
    module = type(sys)("solution")
    sys.modules["solution"] = module
    space = vars(module)
    serves = {
        **OPERATIONS,
        **BINARY,
        "isinstance": isinstance,
        "names": lambda names: {name: space[name] for name in names if name in space},
    }
    peer = Peer(reads, writes, serves)
    exec(compile(program, "solution.py", "exec", dont_inherit=True), space)
    while True:
        peer.answer(*peer.receive()[1:])


# ----------------------------------------------------------------------------------------------------------- verdict


def used_names(code):
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            names |= used_names(constant)
    return names


def count_asserts(tree):
    """Makes every assert at the top level of the module and of `check` count instead of raise; returns how many."""
    import ast

    bodies = [tree.body]
    bodies += [node.body for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    total = 0
    for body in bodies:
        for index, node in enumerate(body):
            if isinstance(node, ast.Assert):
                counted = ast.parse("try: pass\nexcept Exception: pass\nelse: __passed__()").body[0]
                counted.body = [node]
                body[index] = ast.fix_missing_locations(ast.copy_location(counted, node))
                total += 1
    return total


def run_tests(tests, entry_point, partial_credit, peer):
    try:
        tree = compile(tests, "tests", "exec", 0x400, dont_inherit=True)  # ast.PyCF_ONLY_AST
        total, passed = 0, []
        if partial_credit:
            total = count_asserts(tree)
        code = compile(tree, "tests", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return {"status": "invalid", "score": None, "detail": f"the tests are not Python ({type(error).__name__})"}
    if not tree.body:
        return {"status": "invalid", "score": None, "detail": "there are no tests"}
    module = sys.modules["__main__"] = type(sys)("__main__")
    space = vars(module)
    detail = None
    try:
        # A program that defines `abs` must not decide what `abs` means in the tests.
        names = {name for name in used_names(code) - set(dir(builtins)) if not name.startswith("__")}
        names |= {entry_point} if entry_point else set()
        found = dict(peer.ask("names", sorted(names)))
        space.update({name: found[name] for name in names if name in found})  # and nothing else that it may send
        space["__passed__"] = lambda: passed.append(None)
        exec(code, space)
        if entry_point and "check" in space:
            space["check"](found[entry_point])
    except SystemExit as error:  # of the tests: what the program raises arrives as an `Exception`, or ends it
        detail = "SystemExit" if error.code else None
    except Gone as error:
        detail = str(error)
    except BaseException as error:
        trace, line = error.__traceback__, None
        while trace:
            line = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "tests" else line
            trace = trace.tb_next
        detail = type(error).__name__ + (f" at line {line} of the tests" if line else "")
    if total:
        score = len(passed) / (total if detail is None else max(total, len(passed) + 1))
        detail = detail or (f"{len(passed)} of {total} asserts" if score < 1 else None)
    else:
        score = float(detail is None)
    return {"status": "passed" if score == 1 else "failed", "score": score, "detail": detail}


def main():
    size = int.from_bytes(os.pread(0, 8, 0), "big")
    config = json.loads(os.pread(0, size, 8))
    isolated, machine = config["isolated"], os.uname().machine
    verdicts = os.dup(1)

    def say(message):
        os.write(verdicts, json.dumps(message).encode() + b"\n")

    libc.alarm(STARTUP_SECONDS + config["wall_seconds"])  # the launcher's, whatever becomes of who started it
    try:
        if machine not in MACHINES:
            raise OSError(errno.ENOSYS, f"no system call filter for {machine}")
        # Root becomes nobody inside, because limits do not bind root. Inside a container nobody may not exist.
        with open("/proc/self/uid_map") as file:
            mapped = any(int(line.split()[0]) <= NOBODY < sum(map(int, line.split()[::2])) for line in file)
        user = NOBODY if isolated and os.geteuid() == 0 and mapped else os.geteuid()
        if isolated:
            enter_namespaces(user)
        prctl(PR_SET_PDEATHSIG, 9, "pdeathsig")
        alive, holds_alive = os.pipe()
        judge = os.fork()
        if judge:
            if os.getppid() == config["parent"]:
                os.close(alive)
                os.close(verdicts)
                os.closerange(0, 3)
                os.waitpid(judge, 0)
            os._exit(0)
        os.close(holds_alive)
        if isolated:
            build_file_view(machine, config["folder_bytes"])
        else:
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
        program = os.pread(0, config["program_bytes"], 8 + size).decode()
        from_candidate, to_judge = os.pipe()
        from_judge, to_candidate = os.pipe()
        say({"status": "ready"})
        if os.fork() == 0:
            try:
                prctl(PR_SET_PDEATHSIG, 9, "pdeathsig")
                filter_system_calls(machine)
                run_candidate(program, from_judge, to_judge)
            except Gone:  # the tests are done
                os._exit(0)
            finally:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        os.close(to_judge)
        os.close(from_judge)
        filter_system_calls(machine)
    except OSError as error:
        say({"status": "refused", "detail": error.strerror})
        os._exit(1)
    tests = os.pread(0, config["tests_bytes"], 8 + size + config["program_bytes"]).decode()
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    os.dup2(2, 1)
    peer = Peer(
        from_candidate, to_candidate, {name: OPERATIONS[name] for name in ("__call__", "__iter__", "__next__")}
    )
    say(run_tests(tests, config["entry_point"], config["partial_credit"], peer))
    os._exit(0)


if __name__ == "__main__":
    main()
