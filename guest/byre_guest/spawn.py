"""From what a new process is told to be to the running program: the only place where the agent starts one.

    parent   `Plan` checks and prepares everything that can be prepared; `fork` forks
    child    goes through its steps, execs; a step that fails is written to the error pipe, with its errno
    parent   `failure` turns that report into the typed error (B14); an empty one means that the program runs

Rule: the child may block (a path on a dead file system, a FIFO named /etc/passwd); the parent may not, so it gets
the report through the loop.  The child's way is short: each page that it touches is copied.

Copying the interpreter's memory is more than half of the time that a small program takes.  So `quick` spawns
without a copy what needs no steps but the kernel's: no user, directory, limits or capabilities of its own, a
program on the root file system itself, where nothing can block.  Whatever else it meets, it leaves to `fork`.
"""

from __future__ import annotations

import errno
import os
import select

from byre_proto.errors import (
    ByreError,
    InvalidRequest,
    PermissionRefused,
    ProgramNotExecutable,
    ProgramNotFound,
    StartFailed,
    UserNotFound,
    WorkingDirectoryNotFound,
)

from . import linux, scheduling, terminals
from .reaper import IGNORED
from .signals import signals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Where programs are looked for when the environment has no PATH.
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: Longest report of a child: step, errno, a name.
MAX_REPORT = 4096

#: File systems that nobody writes to while they are mounted: squashfs, erofs (`linux/magic.h`).
UNCHANGING = (0x73717368, 0xE0F5E1E2)

#: Programs remembered by name and search path; with more, all are forgotten.
MAX_FOUND = 256

#: The limits of open files, soft and hard, that programs get; None until the agent has raised its own.
_files: tuple[int, int] | None = None


def settle() -> None:
    """Let the agent hold as many descriptors as the kernel allows it: three pipes and more per process.

    From now on somebody else may have changed this machine.
    """
    global _files
    import resource  # an extension module of its own: not for the first process

    _programs.settle()
    if _files is None:
        _files = resource.getrlimit(resource.RLIMIT_NOFILE)
        _limit_files(_files[1])


def _limit_files(soft: int) -> None:
    import resource

    if _files is not None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, _files[1]))


class Plan:
    """What the process is to be, made from the arguments of `process.create`.  Raises `InvalidRequest`."""

    def __init__(self, arguments: dict[str, Any], default_env: dict[str, str]) -> None:
        self.args: list[str] = _command(arguments)
        env = arguments["env"]
        self.env: dict[str, str] = {**(default_env if env is None else env), **arguments["add_env"]}
        _refuse_nul(arguments, self.args, self.env)
        self.paths = _candidates(self.args[0], self.env.get("PATH") or DEFAULT_PATH)
        self.cwd: str = arguments["cwd"]
        self.user: str = arguments["user"]
        self.groups: list[int] = arguments["additional_gids"]
        self.no_new_privileges: bool = arguments["no_new_privileges"]
        self.rlimits = [*map(_rlimit, arguments["rlimits"])]
        names = arguments["capabilities"]
        #: Whether `quick` may try.
        self.plain = not (
            self.cwd
            or self.user
            or self.groups
            or self.no_new_privileges
            or arguments["rlimits"]
            or names is not None
        )
        try:
            self.capabilities = None if names is None else linux.capability_mask(names)
        except ValueError as error:
            raise InvalidRequest(f"there is no capability {error.args[0]!r}", field="capabilities") from None


def _command(arguments: dict[str, Any]) -> list[str]:
    args, line = arguments["args"], arguments["command_line"]
    if bool(args) == bool(line):
        raise InvalidRequest("give either args or a command line", hint="args is a list of strings")
    if args and not args[0]:
        raise InvalidRequest("the program's name is empty", field="args")
    return ["/bin/sh", "-c", line] if line else list(args)


def _refuse_nul(arguments: dict[str, Any], args: list[str], env: dict[str, str]) -> None:
    for field, texts in (("args", args), ("env", (*env, *env.values())), ("cwd", (arguments["cwd"],))):
        if "\0" in "".join(texts):
            raise InvalidRequest(f"{field} has a NUL character in it", field=field)
    if "" in env or "=" in "".join(env):
        raise InvalidRequest("env has a name that is empty or has '=' in it", field="env")


def _candidates(program: str, path: str) -> list[str]:
    return [program] if "/" in program else [f"{directory or '.'}/{program}" for directory in path.split(":")]


def _rlimit(entry: Any) -> tuple[int, tuple[int, int]]:
    import resource

    try:
        name, soft, hard = entry
        limits = {name: getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
        return limits[name], (int(soft), int(hard))
    except (KeyError, TypeError, ValueError):
        raise InvalidRequest(
            f"{entry!r} is not a limit", hint='give ["RLIMIT_NOFILE", soft, hard]', field="rlimits"
        ) from None


def quick(plan: Plan, stdio: list[int], terminal: bool) -> int:
    """Spawn a plain program without a copy of the agent; returns its pid, 0 when it is for `fork` after all.

    The child begins in the agent's own cgroup.  The agent stands still until the program is loaded.
    """
    path = _programs.find(plan.paths)
    if not path:
        return 0
    actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(stdio)]
    try:
        if terminal:  # a session's leader gets the first terminal that it opens
            actions[0] = (os.POSIX_SPAWN_OPEN, 0, os.ttyname(stdio[0]), os.O_RDWR, 0)
        if _files is not None:
            _limit_files(_files[0])
        return os.posix_spawn(
            path,
            plan.args,
            plan.env,
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=IGNORED,
            **scheduling.of_spawned,
        )
    except (OSError, NotImplementedError):
        return 0  # the report of `fork` says what is wrong
    finally:
        if _files is not None:
            _limit_files(_files[1])


class Programs:
    """Where programs are on the root file system.

    What was found is remembered as long as it cannot change: on a root that nobody can write to, until something is
    mounted or unmounted.  To look through PATH takes an emulated agent a millisecond.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], str] = {}
        self._mounts: select.poll | None = None  # reports that what is mounted has changed

    def settle(self) -> None:
        """Begin to remember, where that is right.  Harmless when repeated."""
        if self._mounts is not None:
            return
        root = os.open("/", os.O_PATH | os.O_CLOEXEC)
        try:
            unchanging = linux.filesystem_type(root) in UNCHANGING
        finally:
            os.close(root)
        if unchanging:
            self._mounts = select.poll()
            self._mounts.register(os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC), select.POLLPRI)

    def find(self, paths: list[str]) -> str:
        """The first of `paths` that exists, if all that was looked through is on the root file system; or ""."""
        if self._mounts is None:
            return _on_root(paths)
        if self._mounts.poll(0) or len(self._found) >= MAX_FOUND:
            self._found.clear()
        key = tuple(paths)
        found = self._found.get(key) or _on_root(paths)
        if found:
            self._found[key] = found
        return found


_programs = Programs()


def _on_root(paths: list[str]) -> str:
    """See `Programs.find`.

    For the first process of a VM any will do: what init has mounted does not block.
    """
    for path in paths:
        try:
            if _files is None:
                os.stat(path)
            else:
                os.close(linux.openat2(path, os.O_PATH, linux.RESOLVE_NO_XDEV))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return ""
        return path if path.startswith("/") else ""
    return ""


def fork(plan: Plan, stdio: list[int], terminal: bool, report: int) -> int:
    """Fork and exec; returns the pid.  `report` is the error pipe's end.  Raises OSError: no new process."""
    pid = os.fork()
    if pid == 0:
        _child(plan, stdio, terminal, report)
    return pid


def _child(plan: Plan, stdio: list[int], terminal: bool, report: int) -> None:
    """Never returns."""
    step, number, detail = "setup", 0, ""
    try:
        os.setsid()
        if terminal:
            terminals.make_controlling(stdio[0])
        for target, fd in enumerate(stdio):
            os.dup2(fd, target)
        step = "rlimits"
        if _files is not None:
            _limit_files(_files[0])
        if plan.rlimits:
            _set_limits(plan)
        if plan.capabilities is not None:
            step = "capabilities"
            _drop_bounding(plan.capabilities)
        if plan.user or plan.groups:
            step = "user"
            _become(plan)
        if plan.capabilities is not None:
            step = "capabilities"
            _set_capabilities(plan.capabilities)
        if plan.cwd:
            step = "cwd"
            os.chdir(plan.cwd)
        if plan.no_new_privileges:
            step = "no_new_privileges"
            linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        for ignored in IGNORED:
            signals.signal(ignored, signals.SIG_DFL)
        signals.pthread_sigmask(signals.SIG_SETMASK, ())
        step = "exec"
        _exec(plan)
    except OSError as error:
        number, detail = error.errno or 0, str(error.filename or "")
    except ByreError as error:
        detail = error.message
    except BaseException as error:
        detail = repr(error)
    os.write(report, f"{step}\0{number}\0{detail}".encode(errors="replace")[:MAX_REPORT])
    os._exit(255)


def _set_limits(plan: Plan) -> None:
    import resource

    for limit, values in plan.rlimits:
        resource.setrlimit(limit, values)


def _become(plan: Plan) -> None:
    """Groups first, then the user: afterwards neither could be changed.  No saved id leads back to root."""
    uid, gid, groups = _look_up(plan.user) if plan.user else (os.getuid(), os.getgid(), os.getgroups())
    if uid and (uid, gid) == (os.getuid(), os.getgid()) and not plan.groups:
        return  # what an ordinary user's agent is already
    os.setgroups([*groups, *plan.groups])
    os.setresgid(gid, gid, gid)
    if plan.capabilities is not None:
        linux.prctl(linux.PR_SET_KEEPCAPS, 1)
    os.setresuid(uid, uid, uid)


def _look_up(user: str) -> tuple[int, int, list[int]]:
    from . import rootfs, users

    found = users.look_up(rootfs.open_root("/"), user)
    return found["uid"], found["gid"], found["gids"]


def _drop_bounding(mask: int) -> None:
    """Done while the process still has CAP_SETPCAP."""
    for number in range(linux.last_capability() + 1):
        if not mask >> number & 1:
            linux.prctl(linux.PR_CAPBSET_DROP, number)


def _set_capabilities(mask: int) -> None:
    """The same set everywhere, as container users expect; ambient too, so that it survives an exec by a user."""
    linux.capset(mask, mask, mask)
    linux.prctl(linux.PR_CAP_AMBIENT, linux.PR_CAP_AMBIENT_CLEAR_ALL)
    for number in range(linux.last_capability() + 1):
        if mask >> number & 1:
            linux.prctl(linux.PR_CAP_AMBIENT, linux.PR_CAP_AMBIENT_RAISE, number)


def _exec(plan: Plan) -> None:
    """Try each place as execvp(3) does: a program that may not be run is remembered, the search goes on."""
    refused: OSError | None = None
    last = OSError(errno.ENOENT, "", plan.args[0])
    for path in plan.paths:
        try:
            os.execve(path, plan.args, plan.env)
        except OSError as error:
            last = error
            if error.errno == errno.EACCES:
                refused = refused or error
            elif error.errno not in (errno.ENOENT, errno.ENOTDIR):
                break
    raise refused or last


def failure(plan: Plan, report: bytes) -> ByreError:
    """The typed error of a child's report."""
    step, number_text, detail = (*report.decode(errors="replace").split("\0", 2), "", "")[:3]
    number = int(number_text) if number_text.isdigit() else 0
    reason = os.strerror(number) if number else detail
    if step == "exec":
        return _exec_failure(plan.args[0], number, reason)
    if step == "cwd":
        return WorkingDirectoryNotFound(f"the working directory {plan.cwd!r}: {reason}", cwd=plan.cwd, errno=number)
    if step == "user":
        if not number:
            return UserNotFound(reason, user=plan.user)
        return PermissionRefused(f"the agent may not start a process as {plan.user!r}: {reason}", user=plan.user)
    return StartFailed(f"the process could not be started: {step}: {reason}", step=step, errno=number)


def _exec_failure(program: str, number: int, reason: str) -> ByreError:
    if number in (errno.ENOENT, errno.ENOTDIR):
        return ProgramNotFound(
            f"the program {program!r} was not found",
            hint="or it is a script or binary whose interpreter is missing" if "/" in program else "check PATH",
            program=program,
        )
    if number in (errno.EACCES, errno.ENOEXEC, errno.EISDIR, errno.EPERM, errno.ELIBBAD):
        return ProgramNotExecutable(f"the program {program!r} cannot be executed: {reason}", program=program)
    if number == errno.E2BIG:
        return InvalidRequest(f"the arguments and the environment of {program!r} are too large", field="args")
    return StartFailed(f"the program {program!r}: {reason}", program=program, errno=number)
