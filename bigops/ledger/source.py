"""A kernel's source as its meaning: comments, docstrings and formatting aside."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import textwrap
from types import ModuleType
from typing import Any


@functools.cache
def source_hash(kernel: Any) -> str:
    """Of a `triton.jit` function and of all that it calls or reads of its module.

    The text hashed is `ast.unparse`'s, which Python versions agree in better than in their trees.
    """
    parts: dict[str, str] = {}
    waiting = [kernel]
    while waiting:
        function = waiting.pop().fn
        name = f"{function.__module__}.{function.__qualname__}"
        if name in parts:
            continue
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        parts[name] = ast.unparse(_without_docstrings(tree))
        for label, value in _globals(tree, function.__globals__):
            if _is_kernel(value):
                waiting.append(value)
            else:
                parts[label] = repr(value)
    text = "\n".join(parts[name] for name in sorted(parts))
    return hashlib.sha256(text.encode()).hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return tree


def _globals(tree: ast.Module, names: dict[str, Any]) -> list[tuple[str, Any]]:
    """What the tree reads of the module's names, and of the modules among them."""
    found = []
    for node in ast.walk(tree):
        value = label = None
        if isinstance(node, ast.Name):
            label, value = node.id, names.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            if isinstance(module, ModuleType) and not module.__name__.startswith("triton"):
                label, value = f"{node.value.id}.{node.attr}", getattr(module, node.attr, None)
        if label and (_is_kernel(value) or _is_constant(value)):
            found.append((label, value))
    return found


def _is_kernel(value: Any) -> bool:
    return type(value).__name__ == "JITFunction" and not value.fn.__module__.startswith("triton")


def _is_constant(value: Any) -> bool:
    return type(value).__name__ == "constexpr" or isinstance(value, int | float | str | tuple)
