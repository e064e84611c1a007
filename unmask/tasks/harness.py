"""The child process of :mod:`unmask.tasks.execution`, which compiles it; it is never imported.

Everything the grade depends on is bound to a local name before the program runs, because the program may patch any
module. Meanwhile the token is only on the interpreter's stack, where no variable names it.
"""

import builtins
import marshal
import os
import resource
import sys


def main() -> None:
    """Read the job, run it and write the verdict in one piece: the token if the tests ran to their end."""
    verdict, write, leave = int(sys.argv[1]), os.write, os._exit
    job = marshal.load(sys.stdin.buffer)  # importing json would take half as long as starting Python
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path += job["path"]
    if job["user"]:
        os.setgroups([])
        os.setresgid(job["user"], job["user"], job["user"])
        os.setresuid(job["user"], job["user"], job["user"])
    for kind, value in job["limits"].items():
        limit = getattr(resource, f"RLIMIT_{kind}")
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    write(verdict, job.pop("token") * passes(verdict, job["program"], job["tests"], job["entry_points"]))
    leave(0)


def passes(verdict: int, program: str, tests: str, entry_points: list[str]) -> bool:
    """Run the program as a module, then the tests in a namespace of their own; True if both ran to their end.

    The tests see the builtins as they were before the program, and the program's names; only entry points may replace
    a builtin. If something is raised, its type and text are the verdict.
    """
    write, run, own = os.write, exec, dict(vars(builtins))
    try:
        compiled = compile(tests, "<tests>", "exec")
        module = sys.modules["solution"] = type(sys)("solution")
        run(compile(program, "<program>", "exec"), module.__dict__)
        names = {name: x for name, x in module.__dict__.items() if name in entry_points or name not in own}
        run(compiled, {**names, "__name__": "tests", "__builtins__": own})
        return True
    except BaseException as error:
        write(verdict, f"{type(error).__name__}: {error}"[:1000].encode("utf-8", "replace"))
        return False


main()
