"""System calls that a program in the sandbox may not make: those that reach or hold what its limits do not count.

A stand-alone module of the standard library: :mod:`unmask.tasks.sandbox` loads it outside the package.
"""

import ctypes
import errno
import os
import struct

DENIED = {
    "x86_64": {
        # memory, and the machine's counters, that belong to no process
        "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240, "memfd_create": 319, "memfd_secret": 447,
        "io_uring_setup": 425, "io_setup": 206,
        # other namespaces, the keys of whoever started the sandbox, the kernel's debugging
        "unshare": 272, "add_key": 248, "request_key": 249, "keyctl": 250,
        "userfaultfd": 323, "bpf": 321, "perf_event_open": 298,
    },
    "aarch64": {
        "shmget": 194, "msgget": 186, "semget": 190, "mq_open": 180, "memfd_create": 279, "memfd_secret": 447,
        "io_uring_setup": 425, "io_setup": 0,
        "unshare": 97, "add_key": 217, "request_key": 218, "keyctl": 219,
        "userfaultfd": 282, "bpf": 280, "perf_event_open": 241,
    },
}  # fmt: skip
BY_ARGUMENT = {
    "x86_64": {"clone": 56, "prctl": 157, "prlimit64": 302, "socket": 41},
    "aarch64": {"clone": 220, "prctl": 167, "prlimit64": 261, "socket": 198},
}
"""Calls that are denied or not by their first argument, see :func:`filter_of`."""
CLONE3 = 435
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
NAMESPACES = 0x7E020000
"""All CLONE_NEW* flags: in a user namespace of its own the program could mount file systems of memory."""

LOAD, IF_EQUAL, IF_LEAST, IF_ANY, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT = 0, 4, 16
ALLOW, ERROR = 0x7FFF0000, 0x00050000
X32 = 0x40000000
"""The first number of x86-64's second set of calls."""
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_DUMPABLE = 22, 2, 4
KEYCTL_JOIN_SESSION_KEYRING = 1
AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def fail(test: int, value: int, error: int = errno.EPERM) -> bytes:
    """Let the call fail if the test of what is loaded holds."""
    return instruction(test, value, 0, 1) + instruction(RETURN, ERROR | error)


def by_argument(number: int, *tests: bytes) -> bytes:
    """For the call ``number``: ``tests`` of its first argument, and if none of them decides, it is allowed."""
    body = b"".join([instruction(LOAD, FIRST_ARGUMENT_AT), *tests, instruction(RETURN, ALLOW)])
    return instruction(IF_EQUAL, number, 0, len(body) // 8) + body


def fail_unless(*values: int) -> bytes:
    """Let the call fail unless what is loaded is one of ``values``."""
    allowed = (instruction(IF_EQUAL, value, 0, 1) + instruction(RETURN, ALLOW) for value in values)
    return b"".join([*allowed, instruction(RETURN, ERROR | errno.EPERM)])


def filter_of(machine: str) -> bytes:
    """The filter as instructions of classic BPF."""
    calls = BY_ARGUMENT[machine]
    return b"".join(
        [
            instruction(LOAD, ARCHITECTURE_AT),
            instruction(IF_EQUAL, ARCHITECTURES[machine], 1, 0) + instruction(RETURN, ERROR | errno.EPERM),
            instruction(LOAD, NUMBER_AT),
            fail(IF_LEAST, X32),
            fail(IF_EQUAL, CLONE3, errno.ENOSYS),  # its flags are in memory; libraries fall back on clone
            *(fail(IF_EQUAL, number) for number in DENIED[machine].values()),
            by_argument(calls["clone"], fail(IF_ANY, NAMESPACES)),
            by_argument(calls["prctl"], fail(IF_EQUAL, PR_SET_DUMPABLE)),  # its files in /proc are not its own
            by_argument(calls["prlimit64"], fail_unless(0)),  # of itself, not of the tests
            by_argument(calls["socket"], fail_unless(AF_UNIX, AF_INET, AF_INET6)),  # a namespace has no other networks
            instruction(RETURN, ALLOW),
        ]
    )


def filter_calls() -> None:
    """Filter the calls of this process and its children from here on, on the machines above; OSError if that fails."""
    machine = os.uname().machine
    if machine not in DENIED or struct.calcsize("P") != 8:
        return
    code = ctypes.create_string_buffer(filter_of(machine), len(filter_of(machine)))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), program, 0, 0):
        raise OSError(ctypes.get_errno(), "the system calls cannot be filtered")


def leave_keyring() -> None:
    """Take an empty session keyring in place of that of whoever started this, where the system has keyrings."""
    machine = os.uname().machine
    if machine in DENIED:
        ctypes.CDLL(None).syscall(DENIED[machine]["keyctl"], KEYCTL_JOIN_SESSION_KEYRING, None)
