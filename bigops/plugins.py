"""Ops declared outside bigops, for the command line to find.

An installed package names them in its entry points, a project that is being worked on in the
pyproject.toml of the current folder:

    [project.entry-points."bigops.ops"]
    relu6 = "relu6"

The value is a module, and its ops are those among its attributes.
"""

from __future__ import annotations

import importlib
import sys
import tomllib
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from .ops import Op

GROUP = "bigops.ops"


@dataclass
class Plugins:
    """What `load` found.

    local: the entry points of ./pyproject.toml, module by name. here: names of their ops.
    broken: reason by entry point, for those that cannot be imported.
    """

    local: dict[str, str]
    here: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)


def load() -> Plugins:
    """Import every module that declares ops for bigops; their ops are in the table then."""
    found = Plugins(_local())
    folder = str(Path.cwd())
    if found.local and folder not in sys.path:
        sys.path.insert(0, folder)
    for name, module in found.local.items():
        found.here += _import(name, module, found)
    for entry in metadata.entry_points(group=GROUP):
        if entry.name not in found.local:
            _import(entry.name, entry.value, found)
    return found


def _local() -> dict[str, str]:
    """Entry points of the project in the current folder, by name."""
    path = Path("pyproject.toml")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        return {}  # the file is for other tools to judge
    table = content.get("project", {}).get("entry-points", {}).get(GROUP, {})
    return {str(name): str(module) for name, module in table.items()}


def _import(name: str, module: str, found: Plugins) -> list[str]:
    """Names of the module's ops."""
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # whatever is wrong with it, the others are not
        line = (str(error).strip().splitlines() or [""])[0]
        found.broken[name] = f"{type(error).__name__}: {line}"
        return []
    ops = [value.name for value in vars(imported).values() if isinstance(value, Op)]
    if not ops:
        found.broken[name] = f"module {module} has no bigops.ops.Op"
    return ops
