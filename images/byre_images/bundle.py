"""The agent as one file of bytecode: /usr/lib/byre/agent.pyc, which Python runs as its main program.

    LOADER      its own code: serves imports out of MODULES, then runs the agent
    MODULES     name -> (whether it is a package, its bytecode): the agent, the protocol, what of others they import
    EXTENSIONS  name -> the file of an extension module

Under emulation to find, open and check a module takes some milliseconds, and the agent has forty.  A main program
that is text would bring in Python's compiler: 3,400 blocks of code that the emulator has to translate, where the
rest of the agent's start is 42,000.

Rule: what is here in place of another's module says why it is the same for the agent.
"""

from __future__ import annotations

from . import programs
from .tree import Tree

AGENT = "usr/lib/byre"
FILE = f"{AGENT}/agent.pyc"

PACKAGES = "usr/lib/python3/dist-packages"

LOADER = """\
import gc
import marshal
import sys
from _frozen_importlib_external import ExtensionFileLoader


class Bundle:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in MODULES:
            return type(sys.__spec__)(name, Bundle, origin="agent.pyc", is_package=MODULES[name][0])
        if name in EXTENSIONS:
            loader = ExtensionFileLoader(name, EXTENSIONS[name])
            return type(sys.__spec__)(name, loader, origin=EXTENSIONS[name])

    @staticmethod
    def create_module(spec):
        return None

    @staticmethod
    def exec_module(module):
        exec(marshal.loads(MODULES.pop(module.__name__)[1]), module.__dict__)


gc.disable()  # until the agent says otherwise: nothing that is made in the beginning goes away
sys.meta_path.insert(0, Bundle)
from byre_guest.__main__ import main

main()
"""

#: Modules of the standard library that the agent imports and Python has not in itself.
STANDARD = ("__future__", "struct", "types", "ctypes/__init__", "ctypes/_endian")

#: The part of msgpack that is written in C.
CODEC = "msgpack._cmsgpack"

#: In place of others' modules.
REPLACED = {
    # Python 3.12's is this; before, the same was written in Python first and then thrown away.
    "datetime": "from _datetime import *\nfrom _datetime import datetime_CAPI\n",
    # Without the implementation in Python and the helpers that nobody here calls.
    "msgpack/__init__": "from ._cmsgpack import Packer, Unpacker, unpackb\n",
    # The wire has no extension types, and the codec asks only whether a value is one.  msgpack's own have
    # `collections` and Python's compiler (for a named tuple) in their train.
    "msgpack/ext": "class ExtType(tuple):\n    pass\n\n\nclass Timestamp:\n    pass\n",
}

#: In the interpreter's bytecode files: magic number, flags and hash of the source (PEP 552).
HEADER_SIZE = 16


def build(tree: Tree, agent: dict[str, bytes]) -> bytes:
    """The bytes of FILE, from the agent's sources (by path below /usr/lib/byre) and the tree's packages."""
    sources = {f"{AGENT}/{path}": data for path, data in agent.items() if path.endswith(".py")}
    library = f"usr/lib/python{programs.python_version(tree)}"
    sources |= {f"{library}/{name}.py": tree.read(f"{library}/{name}.py") for name in STANDARD}
    sources[f"{PACKAGES}/msgpack/exceptions.py"] = tree.read(f"{PACKAGES}/msgpack/exceptions.py")
    sources |= {f"{PACKAGES}/{name}.py": text.encode() for name, text in REPLACED.items()}
    modules = {}
    for path, code in zip(sorted(sources), programs.bytecode(tree, sources).values(), strict=True):
        name = path.removeprefix(f"{AGENT}/").removeprefix(f"{library}/").removeprefix(f"{PACKAGES}/")
        name = name.removesuffix(".py").replace("/", ".")
        modules[name.removesuffix(".__init__")] = (name.endswith(".__init__"), code[HEADER_SIZE:])
    codec = next(path for path in sorted(tree.entries) if path.startswith(f"{PACKAGES}/{CODEC.replace('.', '/')}."))
    text = f"MODULES = {modules!r}\nEXTENSIONS = { ({CODEC: f'/{codec}'})!r}\n{LOADER}".encode()
    (program,) = programs.bytecode(tree, {f"{AGENT}/agent.py": text}).values()
    return program
