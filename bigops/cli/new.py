"""`bigops new`: a project of one's own around one op, which passes its checks as it is written."""

from __future__ import annotations

import argparse
import importlib.util
import keyword
import os
import re
import shutil
import symtable
import tempfile
from pathlib import Path
from typing import Any

from .. import plugins
from ..ops import table
from . import UserError

ABOUT = "Write a project around an op of your own: reference, Triton kernel, declaration, test."
EPILOG = "example: bigops new relu6 && cd relu6 && pytest && bigops check"
TEMPLATE = Path(__file__).resolve().parents[1] / "templates" / "relu6"
# A line that ends so is written only if one of these options was given.
ONLY_WITH = re.compile(r"\s*(?:#|//|<!--)((?: --\w+)+)(?: -->)?$")
SUFFIXES = (".cpp", ".cu", ".h", ".md", ".py", ".toml")
FILES_ONLY_WITH = {
    "native.py": ("--cpp", "--cuda"),
    "bind.cpp": ("--cpp", "--cuda"),
    "relu6.h": ("--cpp", "--cuda"),
    "relu6.cpp": ("--cpp",),
    "relu6.cu": ("--cuda",),
}


def add_parser(subparsers: Any) -> None:
    """Add `new` to the command line."""
    parser = subparsers.add_parser("new", help=ABOUT, description=ABOUT, epilog=EPILOG)
    parser.add_argument("name", metavar="NAME", help="the op's name: a Python identifier")
    parser.add_argument("folder", nargs="?", metavar="DIR", help="where (default: ./NAME)")
    parser.add_argument("--cpp", action="store_true", help="with a C++ kernel for the CPU")
    parser.add_argument("--cuda", action="store_true", help="with a CUDA C++ kernel")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 when the project is written, as a whole."""
    given = {"--" + option for option in ("cpp", "cuda") if getattr(args, option)}
    check_name(args.name)
    folder = Path(args.folder or args.name)
    try:
        write(folder, project(args.name, given))
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    print(f"{args.name} is in {folder}; now:")
    print(f"  cd {folder} && pytest && bigops check")
    return 0


def check_name(name: str) -> None:
    """UserError unless an op, its module and its torch op can have this name."""
    plugins.load()
    taken = {*table(), *(f"{op}_backward" for op in table())}
    if not (name.isidentifier() and name.isascii()) or re.fullmatch("_+|__.*__", name):
        reason = "is not a Python identifier of ASCII letters, digits and underscores"
    elif keyword.iskeyword(name):
        reason = "is a keyword of Python"
    elif name in taken:
        reason = "is an op already"
    elif importlib.util.find_spec(name) is not None:
        reason = "is a module already"
    elif name in words_of_the_template():
        reason = "means something else within the project"
    else:
        return
    raise UserError(f"NAME: {name!r} {reason}")


def template_files() -> list[Path]:
    """The project as it is for relu6 with all options."""
    return sorted(path for path in TEMPLATE.rglob("*") if path.suffix in SUFFIXES)


def words_of_the_template() -> set[str]:
    """What an op cannot be called, because a module that holds it needs the name."""
    files = [path for path in template_files() if path.suffix == ".py"]
    found = {path.stem for path in files} | {"csrc", "tests", "build"}
    for path in files:
        todo = [symtable.symtable(path.read_text(), path.name, "exec")]
        while todo:
            scope = todo.pop()
            todo += scope.get_children()
            is_module = scope.get_type() == "module"
            found |= {s.get_name() for s in scope.get_symbols() if is_module or s.is_global()}
    return found - {"relu6"}


def project(name: str, given: set[str]) -> dict[str, str]:
    """The project's files by their paths."""
    found = {}
    for path in template_files():
        only_with = FILES_ONLY_WITH.get(path.name)
        if only_with is not None and given.isdisjoint(only_with):
            continue
        where = str(path.relative_to(TEMPLATE)).replace("relu6", name)
        text = "\n".join(_lines(path.read_text(encoding="utf-8"), given)).strip() + "\n"
        # A project's name, other than a module's, begins and ends with a letter or digit.
        text = text.replace("bigops-relu6", f"bigops-{name.strip('_')}")
        found[where] = text.replace("relu6", name)
    return found


def _lines(text: str, given: set[str]) -> list[str]:
    lines = []
    for line in text.splitlines():
        marker = ONLY_WITH.search(line)
        if marker is None:
            lines.append(line)
        elif not given.isdisjoint(marker[1].split()):
            lines.append(line[: marker.start()])
    return lines


def write(folder: Path, files: dict[str, str]) -> None:
    """Put the files into a new or empty folder, all of them or none."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"DIR: {folder} exists and is not an empty folder")
    parent = folder.resolve().parent
    if not parent.is_dir():
        raise UserError(f"DIR: there is no folder {parent}")
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    try:
        for where, text in files.items():
            path = partial / where
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        partial.chmod(0o755)
        os.replace(partial, folder.resolve())
    finally:
        shutil.rmtree(partial, ignore_errors=True)
