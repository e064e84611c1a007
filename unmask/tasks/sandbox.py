"""The child side of :mod:`unmask.tasks.execution`: a script of the standard library alone, never imported.

Three processes. The *supervisor* (this script as started) makes the namespaces, forks the *judge* and removes
everything that is left at the end. The judge, process 1 of its own pid namespace, builds the file system, gives up
every privilege, forks the *candidate*, and only then reads the tests. The candidate runs the program and answers
calls; it never holds the tests, the verdict pipe or the judge's memory. The tests run in the judge, where the
program's functions are proxies, and what comes back is plain data: a program can choose what its functions return,
what they leave in the lists, sets and dicts they are given, and what they call the tests' functions with, and nothing
else. It passes if the tests run to their end in the judge.
"""

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import struct
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from unmask.tasks.sandbox_calls import Client, serve
    from unmask.tasks.sandbox_data import CannotGrade
    from unmask.tasks.sandbox_filter import filter_calls, leave_keyring
    from unmask.tasks.sandbox_remote import Names
else:
    from sandbox_calls import Client, serve
    from sandbox_data import CannotGrade
    from sandbox_filter import filter_calls, leave_keyring
    from sandbox_remote import Names

    sys.path.pop(0)  # this folder, whose modules are not for the program

NOBODY = 65534
HOME = "/sandbox"

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
KEPT_FLAGS = {"nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "nodiratime": 2048, "relatime": 1 << 21}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}
MOUNT_SETATTR, AT_RECURSIVE, MNT_DETACH = 442, 0x8000, 2


# --- Isolation ------------------------------------------------------------------------------------------------------


def check(result: int, what: str) -> None:
    if result:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    args = source.encode(), target.encode(), kind and kind.encode(), ctypes.c_ulong(flags), data.encode()
    check(LIBC.mount(*args), f"mount {target}")


def prctl(option: int, value: int) -> None:
    check(LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def enter_namespaces() -> None:
    """New mount, net, ipc, uts and pid namespaces; without root, inside a new user namespace with the same ids."""
    flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    uid, gid = os.geteuid(), os.getegid()
    check(LIBC.unshare(flags | (CLONE_NEWUSER if uid else 0)), "unshare")
    if uid:
        write("/proc/self/setgroups", "deny")
        write("/proc/self/uid_map", f"{uid} {uid} 1")
        write("/proc/self/gid_map", f"{gid} {gid} 1")


def read_only(target: str) -> None:
    """Make a mount and all below it read-only."""
    attributes = struct.pack("=QQQQ", MS_RDONLY, 0, 0, 0)
    if not LIBC.syscall(MOUNT_SETATTR, -100, target.encode(), AT_RECURSIVE, attributes, ctypes.c_size_t(32)):
        return
    with open("/proc/self/mountinfo", encoding="utf-8") as file:  # before Linux 5.12: one by one
        rows = [line.split() for line in file]
    for row in rows:
        point = row[4].encode().decode("unicode_escape")
        if point == target or point.startswith(target + "/"):
            kept = sum(KEPT_FLAGS.get(option, 0) for option in row[5].split(","))
            mount("none", point, None, MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def python_folders() -> list[str]:
    """Folders the interpreter lives in, and the system's libraries, outermost only."""
    wanted = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/localtime"]
    wanted += [sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix, *sys.path]
    found: list[str] = []
    for path in sorted({os.path.normpath(p) for p in wanted if os.path.isabs(p) and os.path.exists(p)}, key=len):
        if path != "/" and not any(path.startswith(f + "/") for f in found if not os.path.islink(f)):
            found.append(path)
    return found


def build_root(root: str, disk: int) -> None:
    """A file system of the interpreter and the system's libraries, read-only, and an empty writable ``HOME``."""
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    folders = python_folders()
    for path in (*folders, *(f"/dev/{d}" for d in ("null", "zero", "full", "random", "urandom"))):
        inside = root + path
        os.makedirs(os.path.dirname(inside), exist_ok=True)
        if os.path.islink(path) and path.count("/") == 1:
            os.symlink(os.readlink(path), inside)
            continue
        if os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
        else:
            write(inside, "")
        mount(path, inside, None, MS_BIND | MS_REC)
        if not path.startswith("/dev/"):
            read_only(inside)
    for name in (HOME, "/proc"):
        os.mkdir(root + name)
    if not os.path.lexists(root + "/tmp"):
        os.symlink(HOME, root + "/tmp")
    with contextlib.suppress(OSError):  # a container that masks parts of /proc forbids it: the program has none
        mount("proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("none", root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    mount("tmpfs", root + HOME, "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk},nr_inodes=4096,mode=1777")
    os.chdir(root)
    check(LIBC.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    check(LIBC.umount2(b".", MNT_DETACH), "umount2")
    os.chdir(HOME)


def drop_privileges() -> None:
    """Become nobody if root, and hold no capability in any namespace from here on."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    prctl(PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    header, empty = struct.pack("=II", 0x20080522, 0), bytes(24)
    check(LIBC.capset(header, empty), "capset")


def threads_of(uid: int) -> int:
    """Threads of a user on the machine: what the limit on processes counts where it is not per namespace."""
    total = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}").st_uid == uid:
                total += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            continue
    return total


def kill_descendants() -> None:
    """Kill what the program left running; this process is the reaper of its orphans."""
    for _ in range(100):
        parents = {}
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue
        mine = {os.getpid()}
        while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
            mine |= more
        for pid in mine - {os.getpid()}:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while True:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
        except ChildProcessError:
            return


# --- The processes --------------------------------------------------------------------------------------------------


def read_part() -> dict[str, Any]:
    """The next length-prefixed JSON object of standard input, not a byte more."""
    (size,) = struct.unpack("=I", os.read(0, 4))
    data = b""
    while len(data) < size:
        data += os.read(0, size - len(data))
    return json.loads(data)


def set_limits(limits: dict[str, int], processes: int) -> None:
    values = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: limits["file_size"],
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in values.items():
        lower(kind, value)


def lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:1000]
    except BaseException:  # its text asks the program, which may not answer
        return type(error).__name__


def candidate(channel: socket.socket, verdict: int, program: str, limits: dict[str, int], processes: int) -> NoReturn:
    """The program's process: nothing but its channel, its limits and its filter, then answers until the tests end."""
    try:
        os.close(verdict)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.closerange(3, channel.fileno())
        os.closerange(channel.fileno() + 1, 4096)
        set_limits(limits, processes)
        filter_calls()
        serve(channel, program)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(1)


def judge(job: dict[str, Any], verdict: int) -> None:
    """Build the sandbox, fork the candidate, then read the tests and run them; the verdict goes to a pipe."""
    limits, token, report = job["limits"], "", {}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        uid = os.geteuid() or NOBODY
        processes = limits["processes"] + (threads_of(uid) if job["weak"] else 0)
        if not job["weak"]:
            threads, release = threads_of(uid), tuple(map(int, os.uname().release.split(".")[:2]))
            build_root(job["folder"], limits["disk"])
        was_root = os.geteuid() == 0
        drop_privileges()
        if not job["weak"]:
            counted_apart = not was_root or LIBC.unshare(CLONE_NEWUSER) == 0
            processes += 0 if counted_apart and release >= (5, 14) else threads
        drop_capabilities()
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(PR_SET_DUMPABLE, 0)  # the candidate has the same user: keep it out of this memory
        mine, other = socket.socketpair()
        if os.fork() == 0:
            candidate(other, verdict, job["program"], limits, processes)
        other.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the candidate may send it
        lower(resource.RLIMIT_AS, limits["memory"])  # what the program returns takes memory here
    except BaseException as error:
        os.write(verdict, json.dumps({"setup": f"{type(error).__name__}: {error}"}).encode())
        os._exit(1)
    try:
        tests = read_part()
        token = tests["token"]
        client = Client(mine)
        client.ask("load")
        client.calls = 0
        exec(compile(tests["tests"], "<tests>", "exec"), Names(client, tests["entry_points"]))
        report = {"passed": client.calls > 0, "reason": "" if client.calls else "the tests never used the program"}
    except BaseException as error:
        report = {"passed": False, "reason": described(error)}
    if CannotGrade.reasons:
        report = {"passed": False, "gradable": False, "reason": CannotGrade.reasons[0][:1000]}
    os.write(verdict, json.dumps({"token": token, **report}).encode())
    os._exit(0)


def main() -> None:
    verdict = int(sys.argv[1])
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    write("/proc/self/oom_score_adj", "1000")
    leave_keyring()
    job = read_part()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        if not job["weak"]:
            enter_namespaces()
        elif os.geteuid() == 0:
            shutil.chown(job["folder"], NOBODY, NOBODY)
    except (OSError, KeyError) as error:
        os.write(verdict, json.dumps({"setup": str(error)}).encode())
        os._exit(1)
    prctl(PR_SET_DUMPABLE, 0)
    pid = os.fork()
    if pid == 0:
        judge(job, verdict)
    try:
        os.waitpid(pid, 0)
    finally:
        kill_descendants()


if __name__ == "__main__":
    main()
