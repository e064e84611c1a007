"""System calls that a program in the sandbox may not make: those that hold memory outside of its limits.

A stand-alone module of the standard library: :mod:`unmask.tasks.sandbox` loads it outside the package.
"""

import ctypes
import errno
import os
import struct

CALLS = {
    "x86_64": {
        "shmget": 29, "msgget": 68, "mq_open": 240, "memfd_create": 319, "memfd_secret": 447, "io_uring_setup": 425,
        "unshare": 272, "clone": 56, "clone3": 435,
    },
    "aarch64": {
        "shmget": 194, "msgget": 186, "mq_open": 180, "memfd_create": 279, "memfd_secret": 447, "io_uring_setup": 425,
        "unshare": 97, "clone": 220, "clone3": 435,
    },
}  # fmt: skip
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
NAMESPACES = 0x7E020000
"""All CLONE_NEW* flags: in a user namespace of its own the program could mount file systems of memory."""

LOAD, IF_EQUAL, IF_LEAST, IF_ANY, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER_AT, ARCHITECTURE_AT, FIRST_ARGUMENT_AT = 0, 4, 16
ALLOW, ERROR = 0x7FFF0000, 0x00050000
X32 = 0x40000000
"""The first number of x86-64's second set of calls."""
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2


def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def fail(test: int, value: int, error: int = errno.EPERM) -> bytes:
    """Let the call fail if the test of what is loaded holds."""
    return instruction(test, value, 0, 1) + instruction(RETURN, ERROR | error)


def filter_of(machine: str) -> bytes:
    """The filter as instructions of classic BPF."""
    calls = dict(CALLS[machine])
    clone, clone3 = calls.pop("clone"), calls.pop("clone3")
    return b"".join(
        [
            instruction(LOAD, ARCHITECTURE_AT),
            instruction(IF_EQUAL, ARCHITECTURES[machine], 1, 0) + instruction(RETURN, ERROR | errno.EPERM),
            instruction(LOAD, NUMBER_AT),
            fail(IF_LEAST, X32),
            fail(IF_EQUAL, clone3, errno.ENOSYS),  # its flags are in memory; libraries fall back on clone
            *(fail(IF_EQUAL, number) for number in calls.values()),
            instruction(IF_EQUAL, clone, 1, 0) + instruction(RETURN, ALLOW),
            instruction(LOAD, FIRST_ARGUMENT_AT),
            fail(IF_ANY, NAMESPACES),
            instruction(RETURN, ALLOW),
        ]
    )


def filter_calls() -> None:
    """Filter the calls of this process and its children from here on, where the system is able to."""
    machine = os.uname().machine
    if machine not in CALLS or struct.calcsize("P") != 8:
        return
    code = ctypes.create_string_buffer(filter_of(machine))
    program = struct.pack("@HP", len(code.raw) // 8, ctypes.addressof(code))
    ctypes.CDLL(None).prctl(PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), program, 0, 0)
