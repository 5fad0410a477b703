"""What can be typed: commands, flags and their help.  Nothing here runs anything.

Options end where the image (or the command) begins, as container users expect: what follows belongs to the command.
"""

from __future__ import annotations

import argparse
import keyword
import sys

TYPE_CHECKING = False  # the typing module is not needed to print a version
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

DEFAULT_VM = "default"  # as byre.rundir has it; a test compares them

_WHICH_VM = """\
which VM: the one that --in names; else the VM "default" while it is up (byre up); else a VM of the command's
own, which is made for it and ends with it.  --fresh always takes a VM of its own.  With a terminal on stderr,
or --verbose, byre says which.  -d needs a VM that stays: "default" is brought up where it is not, and left up."""

_STATUS = """\
exit status: the command's own; 128+n when signal n killed it; 124 after --timeout; 125 an error of byre's own;
126 the command is not executable; 127 it is not found; 2 usage error.

signals: with -it Ctrl-C is a byte for the terminal inside.  SIGINT, SIGTERM, SIGHUP and SIGQUIT that byre gets
are passed on; the second SIGINT, SIGTERM or SIGQUIT kills, the third leaves at once.  What runs in the foreground
ends with byre, even when that is killed by SIGKILL; what -d started goes on."""

#: Flags of `run` that mean nothing for a process in the VM itself.
_CONTAINER_FLAGS = (
    *("detach", "rm", "name", "pids_limit", "entrypoint", "read_only", "privileged", "cap_add", "cap_drop"),
    *("allow_new_privileges", "tmpfs", "storage_opt", "volume", "rootfs", "hostname", "pod"),
    *("pull", "authfile", "tls_verify"),
)

_RUN = """\
Run a command in a new container, or (--vm) in the virtual machine itself.

    byre run NAME [--] [COMMAND...]              NAME: debian, docker.io/library/debian:12, host:5000/app@sha256:...
    byre run oci:PATH[:TAG] [--] [COMMAND...]    PATH: an OCI layout directory, an OCI or docker archive
    byre run --rootfs DIR [--] COMMAND...        DIR: a whole root file system on this host
    byre run --vm [--] COMMAND..."""

_NAMES = """\
image names: what begins with / or ./ or ../ or oci: or docker-archive: is a path; everything else is a name in a
registry, whatever files there are: debian is docker.io/library/debian:latest.  docker:// may stand before it."""

_IMAGE = """\
Containers' images, and the guest image that VMs boot from.

    byre image pull | inspect | rm | prune     containers' images, fetched by skopeo with its logins and mirrors
    byre image build | verify | export         the guest image
    byre image ls | import                     both: import looks what the file is"""

_POD = """\
Pods: containers of a VM that is up which share network, IPC and host name, and limits above their own.

    byre pod create [NAME]; byre run -d --pod NAME IMAGE; byre pod ls; byre pod rm NAME"""

_EXEC = """\
Run a command in a container that is there, or (--vm) in a VM that is up.

    byre exec CONTAINER [--] COMMAND...
    byre exec --vm [--] COMMAND...

If byre itself is killed, even by SIGKILL, so is the command, with its whole process tree."""


_CP = """\
Copy files between this host and a container, or the VM itself.

    byre cp SRC CONTAINER:PATH      byre cp CONTAINER:PATH DST      :PATH is a path of the VM itself
    byre cp - CONTAINER:PATH        unpack a tar from stdin in the directory PATH
    byre cp CONTAINER:PATH -        write a tar of PATH to stdout"""

_CP_RULES = """\
as cp: a file goes by the name DST, or into it where it is a directory; a directory becomes DST where that does not
exist, and goes into it where it does; of SRC/. all that is in it goes there.  Links are copied as links.  A local
name with a colon in it is written ./NAME.

Modes and times are kept.  Without -a the copy is root's inside and yours here, without set-user-id bits, and links
that may lead out of what is copied are refused here.  A tar has owners and all.  Devices and FIFOs stay inside."""


class Parser(argparse.ArgumentParser):
    """argparse with byre's form of errors: one line, a hint, status 2."""

    def error(self, message: str) -> NoReturn:
        print(f"byre: error: {message}", file=sys.stderr)
        print(f"hint: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)


class Version(argparse.Action):
    """--version, looked up only when asked for: importlib.metadata is slow to import."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> NoReturn:
        from importlib import metadata

        try:
            version = metadata.version("byre")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"byre {version}")
        parser.exit()


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments as a namespace; `command` is "module:function" of byre.cli.  Exits with 2 on a usage error."""
    parser = build()
    arguments = parser.parse_args(argv)
    if "command_line" in arguments:
        _split_command(arguments)
    return arguments


def build() -> Parser:
    """The parser of all commands."""
    parser = Parser("byre", description="Linux containers inside a utility virtual machine.", allow_abbrev=False)
    parser.add_argument("--version", nargs=0, action=Version, help="print the version and exit")
    _common(parser, default=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    def add(name: str, command: str, text: str, epilog: str = "") -> Parser:
        sub = commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=epilog,
        )
        sub.set_defaults(command=command, name_of_command=name, parser=sub)
        _common(sub, default=argparse.SUPPRESS, short=name != "run")
        return sub

    _run(add("run", "run:run", _RUN, epilog=f"{_NAMES}\n\n{_WHICH_VM}\n\n{_STATUS}"))
    _exec(add("exec", "execute:execute", _EXEC, epilog=_STATUS))
    _cp(add("cp", "copy:cp", _CP, epilog=_CP_RULES))
    _shell(add("shell", "execute:shell", "Open a shell in a VM that is up, or (-C) in a container of it."))
    _up(add("up", "vms:up", "Boot a VM that stays up, in the care of a keeper process; return when it is ready."))
    _down(add("down", "vms:down", "End a VM that is up, with all that runs in it."))
    add("ps", "vms:ps", "List the VMs that are up, their containers and their processes.")
    _containers(add)
    _watching(add)
    _port(add("port", "ports:port", "List the ports of this host that lead into a VM that is up."))
    _pod(add("pod", "pods:ls", _POD))
    add("doctor", "doctor:doctor", "Say what this host has: accelerator and why, transports, tools, image.")
    _image(add("image", "images:ls", _IMAGE))
    _volumes(add("volume", "volume:ls", "Look after named volumes, which outlive VMs (byre run -v NAME:/path)."))
    _template(add("template", "template:ls", "Look after the saved machines that VMs are cloned from."))
    return parser


def _common(parser: Parser, default: object, *, short: bool = True) -> None:
    """`short`: -v says it too; after `run` it is a mount, as container users expect."""
    parser.add_argument("--debug", action="store_true", default=default, help="show the traceback of an error")
    verbose = ("-v", "--verbose") if short else ("--verbose",)
    parser.add_argument(*verbose, action="store_true", default=default, help="say on stderr what is done")


def _run(parser: Parser) -> None:
    _process_flags(parser)
    add = parser.add_argument
    add("--vm", action="store_true", help="run in the virtual machine itself, not in a container")
    add("-d", "--detach", action="store_true", help="leave it running and print the container's id")
    add("--rm", action="store_true", help="delete the container when it has ended")
    add("--name", default="", help="id of the container; a random one without it")
    _publish(parser)
    _volume(parser)
    add(
        "--rootfs",
        metavar="DIR",
        default="",
        help="a directory of this host in place of an image; it is not written to",
    )
    add("--in", dest="vm_name", metavar="VM", default="", help="run in this VM, which is up")
    add("--pod", metavar="NAME", default="", help="in this pod of the VM that is up (byre pod create)")
    _net(parser)
    add("--fresh", action="store_true", help="a VM for this command alone even while another one is up")
    parser.add_argument("--timings", action="store_true", help="say on stderr where the time went")
    _template_mode(parser)
    add("-m", "--memory", type=size, metavar="BYTES", help="memory limit, as 512m or 2g (--vm: size of the VM)")
    add("--cpus", type=_positive_float, metavar="N", help="processors' worth of time (--vm: how many the VM has)")
    add("--pids-limit", type=int, metavar="N", help="most processes and threads at once; -1 for no limit")
    add("--entrypoint", metavar="PROGRAM", help="run this instead of the image's entrypoint")
    add("--read-only", action="store_true", help="the container cannot write its root file system")
    add("--tmpfs", action="append", default=[], metavar="PATH[:OPTIONS]", help="a tmpfs at this path")
    add("--storage-opt", type=_scratch_size, metavar="size=BYTES",
        help="what it writes goes to a disk of at most this size, as size=10g, not to memory")  # fmt: skip
    add("--pull", choices=("missing", "always", "never"), default="", help="when to fetch the image (missing)")
    _registry(parser)
    add("--hostname", metavar="NAME", help="host name inside; the container's id without it")
    add("--privileged", action="store_true", help="all capabilities and devices: the VM is the boundary")
    add("--cap-add", action="append", default=[], metavar="CAP", help="one capability more")
    add("--cap-drop", action="append", default=[], metavar="CAP", help="one capability less; ALL for none")
    add("--allow-new-privileges", action="store_true", help="let set-user-id programs work (no_new_privileges off)")
    _command(parser, "[IMAGE] [--] [COMMAND...]")


def _exec(parser: Parser) -> None:
    _process_flags(parser)
    parser.add_argument("--vm", action="store_true", help="run in the virtual machine itself")
    _in(parser)
    _command(parser, "[CONTAINER] [--] COMMAND...")


def _shell(parser: Parser) -> None:
    parser.add_argument("name", nargs="?", default=DEFAULT_VM, metavar="NAME", help="the VM (%(default)s)")
    parser.add_argument("-C", "--container", default="", metavar="ID", help="in this container")
    parser.add_argument("-u", "--user", default="", help="as uid, uid:gid, name or name:group")
    parser.set_defaults(env=[], workdir="", timeout=None)


def _cp(parser: Parser) -> None:
    _in(parser)
    add = parser.add_argument
    add("-a", "--archive", action="store_true", help="exactly: owners by number, all mode bits, attributes, links")
    add("-L", "--follow-link", action="store_true", help="copy what SRC leads to, where it is a link")
    add("source", metavar="SRC")
    add("destination", metavar="DST")


def _process_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("-i", "--interactive", action="store_true", help="pass stdin on; without it stdin is empty")
    add("-t", "--tty", action="store_true", help="with a terminal")
    add("-e", "--env", action="append", default=[], metavar="NAME[=VALUE]", help="set, or pass on, a variable")
    add("-w", "--workdir", default="", metavar="PATH", help="working directory inside")
    add("-u", "--user", default="", help="as uid, uid:gid, name or name:group, looked up inside")
    add("--timeout", type=_positive_float, metavar="SECONDS", help="kill it, with its process tree, after that")


def _command(parser: Parser, shown: str) -> None:
    parser.add_argument("command_line", nargs=argparse.REMAINDER, metavar=shown)


def _in(parser: Parser) -> None:
    parser.add_argument("--in", dest="vm_name", metavar="VM", default=DEFAULT_VM, help="the VM (%(default)s)")


def _up(parser: Parser) -> None:
    add = parser.add_argument
    add("name", nargs="?", default=DEFAULT_VM, metavar="NAME", help="its name (%(default)s)")
    add("-m", "--memory", type=size, metavar="BYTES", help="memory of the VM, as 512m or 2g")
    add("--cpus", type=int, metavar="N", help="processors of the VM")
    add("--accelerator", choices=("auto", "kvm", "tcg"), default="auto", help="require one (%(default)s)")
    add("--machine", choices=("auto", "microvm", "pc", "q35"), default="auto", help="require one (%(default)s)")
    add(
        "--transport",
        choices=("auto", "virtio-serial", "vsock", "serial"),
        default="auto",
        help="require one (%(default)s)",
    )
    add("--timeout", type=_positive_float, metavar="SECONDS", help="time to boot; by default what this host needs")
    _publish(parser)
    _net(parser)
    _template_mode(parser)


def _publish(parser: Parser) -> None:
    parser.add_argument(
        "-p",
        "--publish",
        action="append",
        default=[],
        type=_published,
        metavar="[IP:]HOST:GUEST[/tcp]",
        help="connect a port of this host to one inside; only from this host (IP is 127.0.0.1) unless IP says "
        "otherwise, as 0.0.0.0; HOST 0 is a free one, and is printed",
    )


def _net(parser: Parser) -> None:
    parser.add_argument(
        "--net",
        choices=("none", "user"),
        default="none",
        help="user: a way out to what this host reaches, but for this host itself (%(default)s)",
    )


def _published(text: str) -> object:
    from .ports import published

    return published(text)


def _volume(parser: Parser) -> None:
    parser.add_argument(
        "-v",
        "--volume",
        action="append",
        default=[],
        type=_mount,
        metavar="SRC:DST[:ro]",
        help="mount SRC at DST: a directory of this host (with a /, or . or ~ in front), else a named volume",
    )


def _mount(text: str) -> object:
    from byre.errors import InvalidRequest
    from byre.mounts import parse_mount

    try:
        return parse_mount(text)
    except InvalidRequest as error:
        raise argparse.ArgumentTypeError(f"{error.message}: {error.hint}") from None


def _port(parser: Parser) -> None:
    _in(parser)
    parser.add_argument("container", nargs="?", default="", metavar="CONTAINER", help="of this one only")


def _template_mode(parser: Parser) -> None:
    parser.add_argument(
        "--template",
        choices=("auto", "off"),
        default="auto",
        help="clone the VM from a saved one, made now if need be; off: boot it (%(default)s)",
    )


def _actions(parser: Parser, module: str) -> Callable[[str, str], Parser]:
    """Makes the parsers of a command's actions, each a function of that name in the module."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, parser_class=Parser)

    def add(name: str, text: str) -> Parser:
        sub = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        function = f"{name}_" if keyword.iskeyword(name) else name
        sub.set_defaults(command=f"{module}:{function}", parser=sub)
        _common(sub, default=argparse.SUPPRESS)
        return sub

    return add


def _pod(parser: Parser) -> None:
    add = _actions(parser, "pods")
    create = add("create", "Make a pod, and print its name.")
    _in(create)
    create.add_argument("name", nargs="?", default="", metavar="NAME", help="a random one without it")
    create.add_argument("--hostname", default="", metavar="NAME", help="host name inside; the pod's without it")
    create.add_argument("--share-pid", action="store_true", help="its containers see and signal each other")
    _net(create)
    create.add_argument("-m", "--memory", type=size, metavar="BYTES", help="limit of all together, as 512m or 2g")
    create.add_argument("--cpus", type=_positive_float, metavar="N", help="processors' worth of time, all together")
    create.add_argument("--pids-limit", type=int, metavar="N", help="most processes and threads, all together")
    _in(add("ls", "List the pods."))
    rm = add("rm", "Delete pods, with their containers, which have ended.")
    _in(rm)
    rm.add_argument("-f", "--force", action="store_true", help="kill those that run")
    rm.add_argument("pods", metavar="POD", nargs="+")


def _down(parser: Parser) -> None:
    parser.add_argument("name", nargs="?", default=DEFAULT_VM, metavar="NAME", help="the VM (%(default)s)")
    parser.add_argument(
        "--timeout", type=_positive_float, default=10.0, metavar="SECONDS", help="then by force (%(default)s)"
    )


def _containers(add: Callable[[str, str, str], Parser]) -> None:
    for name, text in (
        ("stop", "Stop containers: their stop signal, and SIGKILL after a time."),
        ("rm", "Delete containers that have ended."),
        ("logs", "Print what a container without a reader wrote (the last part, bounded)."),
    ):
        parser = add(name, f"containers:{name}", text)
        _in(parser)
        if name == "stop":
            parser.add_argument(
                "-t", "--time", type=_positive_float, default=10.0, metavar="SECONDS", help="patience (%(default)s)"
            )
        if name == "rm":
            parser.add_argument("-f", "--force", action="store_true", help="kill those that run")
        if name == "logs":
            parser.add_argument("-f", "--follow", action="store_true", help="go on until the container has ended")
            parser.add_argument("container", metavar="CONTAINER")
        else:
            parser.add_argument("containers", metavar="CONTAINER", nargs="+")


def _watching(add: Callable[[str, str, str], Parser]) -> None:
    parser = add("events", "watch:events", "Print what happens in a VM that is up: a line each, until it ends.")
    _in(parser)
    parser.add_argument("--since", type=age, metavar="AGE", help="what happened since then too, as 90s, 12h or 30d")
    parser.add_argument(
        "--no-follow", action="store_true", help="only what has happened; all that is kept, or --since"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="json: an object a line (text)")
    parser = add("stats", "watch:stats", "Show what containers use: a live table on a terminal, a line each else.")
    _in(parser)
    parser.add_argument("--no-stream", action="store_true", help="once, and end")
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="json: an object a line (table)"
    )
    parser.add_argument("containers", metavar="CONTAINER", nargs="*", help="these only")
    parser = add("top", "watch:top", "List the processes of a container.")
    _in(parser)
    parser.add_argument("container", metavar="CONTAINER")


def _image(parser: Parser) -> None:
    add = _actions(parser, "images")
    for name, text in (
        ("pull", "Fetch images from their registries, or what has changed of them."),
        ("inspect", "Print what images are, as JSON: configuration, layers, digests."),
        ("rm", "Remove images by name or digest, and what only they needed."),
    ):
        sub = add(name, text)
        sub.add_argument("names", metavar="NAME", nargs="+", help="[REGISTRY[:PORT]/]NAME[:TAG][@DIGEST]")
        if name == "pull":
            _registry(sub)
    sub = add("prune", "Remove what no image needs, and converted layers that nobody used for long; say how much.")
    sub.add_argument("--older-than", type=age, default=age("30d"), metavar="AGE",
                     help="layers not used for so long, as 90s, 12h or 30d (30d)")  # fmt: skip
    sub.add_argument("--keep", type=size, metavar="BYTES", help="and the oldest, until this much is left, as 10g")
    add("ls", "List containers' images, and the guest images that are built.")
    sub = add("import", "Take in a file: an OCI or docker archive or layout, or what `byre image export` wrote.")
    sub.add_argument("file", metavar="FILE", help="PATH[:TAG]")
    sub.add_argument("name", metavar="NAME", nargs="?", default="", help="of the image; the one that it has itself")
    for name, text in (
        ("build", "Build the guest image from Debian packages, or find the one that is built."),
        ("verify", "Compare the guest images' files with their manifests."),
        ("export", "Write the guest image to one file, for hosts that cannot build it."),
    ):
        sub = add(name, text)
        sub.set_defaults(command=f"image:{name}")
        if name == "export":
            sub.add_argument("file")


def _registry(parser: Parser) -> None:
    parser.add_argument(
        "--authfile", metavar="FILE", default="", help="logins; those of skopeo and podman without it"
    )
    parser.add_argument(
        "--tls-verify", choices=("true", "false"), default="", help="false: a registry without TLS or certificate"
    )


def _volumes(parser: Parser) -> None:
    add = _actions(parser, "volume")
    sub = add("create", "Make a volume; byre run -v makes what is missing, too.")
    sub.add_argument("--size", type=size, metavar="BYTES", help="what fits in it at most, as 20g (10g)")
    sub.add_argument("names", metavar="NAME", nargs="+")
    add("ls", "List them: what fits, what it takes on this host's disk, and who has it.")
    add("inspect", "Print what volumes are, as JSON.").add_argument("names", metavar="NAME", nargs="+")
    add("rm", "Remove volumes, with all that is in them.").add_argument("names", metavar="NAME", nargs="+")
    add("prune", "Remove all that no VM has now, with all that is in them; asks first.").add_argument(
        "-f", "--force", action="store_true", help="do not ask"
    )


def _template(parser: Parser) -> None:
    add = _actions(parser, "template")
    add("ls", "List them, the last used first.")
    add("rm", "Remove some; VMs that run are not harmed.").add_argument("templates", metavar="TEMPLATE", nargs="+")
    add("prune", "Remove all, and what killed makers left; VMs that run are not harmed.").add_argument(
        "--keep", type=int, default=0, metavar="N", help="but the N that were used last (%(default)s)"
    )
    add("verify", "Read all of them, and remove those that are not as they were made.")


def _split_command(arguments: argparse.Namespace) -> None:
    """Cut REMAINDER into what it names (an image or a container) and the command; drop one "--" before each."""
    words = list(arguments.command_line)
    parser, what = arguments.parser, "an image" if arguments.name_of_command == "run" else "a container"
    if words[:1] == ["--"]:
        del words[0]
    arguments.target = ""
    if not arguments.vm and not getattr(arguments, "rootfs", ""):
        if not words:
            parser.error(f"{what} is needed, or --vm")
        arguments.target = words.pop(0)
        if words[:1] == ["--"]:
            del words[0]
    arguments.command_line = words
    if not words and (not arguments.target or arguments.name_of_command == "exec"):
        parser.error("a command is needed")
    if arguments.name_of_command == "run":
        _check_run(arguments)


def _check_run(arguments: argparse.Namespace) -> None:
    """Flags that exclude each other."""
    error = arguments.parser.error
    if arguments.fresh and (arguments.vm_name or arguments.detach or arguments.pod):
        error("--fresh takes a VM of its own: not with --in, -d or --pod")
    if arguments.pod and arguments.net != "none":
        error("the network is the pod's: not with --net (byre pod create --net)")
    if arguments.pod and arguments.hostname:
        error("the host name is the pod's: not with --hostname")
    if arguments.detach and (arguments.interactive or arguments.tty):
        error("-d leaves nobody at the container's terminal or stdin: not with -i or -t")
    if arguments.detach and arguments.timeout:
        error("--timeout needs somebody who waits: not with -d")
    if not arguments.vm:
        return
    for flag in _CONTAINER_FLAGS:
        if getattr(arguments, flag):
            error(f"--{flag.replace('_', '-')} is about a container: not with --vm")


def size(text: str) -> int:
    """Bytes, from a number with an optional unit b, k, m, g or t (powers of 1024)."""
    digits, unit = (text[:-1], text[-1:].lower()) if text[-1:].isalpha() else (text, "b")
    scale = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40}.get(unit)
    if scale is None or not digits.isascii() or not digits.isdecimal() or not int(digits):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512m or 2g")
    return int(digits) << scale


def _scratch_size(text: str) -> int:
    """Bytes, from ``size=10g``, as docker has it."""
    name, _, value = text.partition("=")
    if name != "size":
        raise argparse.ArgumentTypeError(f"{text!r} is not size=BYTES, such as size=10g")
    return size(value)


def age(text: str) -> float:
    """Seconds, from a number with a unit s, m, h or d."""
    scale = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:])
    if scale is None or not text[:-1].isascii() or not text[:-1].isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not an age such as 12h or 30d")
    return float(int(text[:-1]) * scale)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value
