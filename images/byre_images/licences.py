"""Under which licences the packages come, by name, for the manifest.

Source: Debian's machine-readable copyright format 1.0; older files are prose, in which we look for what they name.
"""

from __future__ import annotations

import re

from .tree import Tree

#: `License: NAME`, with names combined by "or", "and", "with"; some files have whole sentences there.
STATED = re.compile(r"^License: *([\w.+/-]+(?:,? (?:or|and|with) [\w.+/-]+)*)(?: exception)? *$", re.MULTILINE)
POINTED_TO = re.compile(r"/usr/share/common-licenses/([A-Za-z][\w.+-]*\w)")
PROSE = {
    "PSF-2.0": re.compile(r"PYTHON SOFTWARE FOUNDATION LICENSE|PSF LICENSE AGREEMENT"),
    "LGPL": re.compile(r"GNU\s+(?:Lesser|Library)\s+General\s+Public\s+License"),
}


def names(copyright_text: str) -> list[str]:
    """Names of the licences in a copyright file, sorted."""
    found = {*STATED.findall(copyright_text), *POINTED_TO.findall(copyright_text)}
    return sorted(found or {name for name, words in PROSE.items() if words.search(copyright_text)})


def of_package(tree: Tree, package: str) -> list[str]:
    """The same for a package whose documentation is in `tree`; some packages share another's by a link."""
    entry = tree.entries.get(f"usr/share/doc/{package}")
    owner = entry.link.rpartition("/")[2] if entry is not None and entry.link else package
    file = tree.entries.get(f"usr/share/doc/{owner}/copyright")
    return names(file.data.decode(errors="replace")) if file is not None else []
