"""Triton's interpreter in a quarter of its time; its results stay as they are.

Most of that time goes into bookkeeping around numpy's calls. `apply` changes, for Triton 3.6 to
3.9:
    - The language is patched once instead of at each call of a device function.
    - Block types, numpy's dtypes and the sizes that each tensor holds are made once for each kind.
    - Equal shapes are not broadcast, and a type is compared with itself by identity.
    - No integer is checked for overflow: Triton drops the result of that check unless its debug
      option is on, which it is not.
    - A launch has room for its calls' frames. CPython keeps these in blocks of 16 KiB, and a call
      at the end of a block maps a new one that its return unmaps: a third of the time, where the
      frames happen to lie so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

ROOM = 2**16  # words: what is left of a block of twice as many bytes serves the frames below


def roomy(call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, below a frame so large that it gets a block of its own."""

    def run(*arguments: Any, **named: Any) -> Any:
        return call(*arguments, **named)

    run.__code__ = run.__code__.replace(co_stacksize=ROOM)
    return run


def apply() -> None:
    """Of this process; the environment must hold TRITON_INTERPRET=1."""
    from triton.language import core
    from triton.runtime import interpreter

    semantic = interpreter.TritonSemantic(interpreter.interpreter_builder)
    plain_patch_lang, plain_numpy_dtype = interpreter._patch_lang, interpreter._get_np_dtype
    plain_block, plain_tensor = core.block_type.__init__, core.tensor.__init__
    plain_broadcast = interpreter.TritonSemantic.broadcast_impl_value
    patched: dict[int, Any] = {}
    dtypes: dict[str, Any] = {}
    blocks: dict[Any, dict[str, Any]] = {}

    def patch_lang(fn: Any) -> Any:
        if id(fn.__globals__) not in patched:
            patched[id(fn.__globals__)] = (fn.__globals__, plain_patch_lang(fn))
        return interpreter._LangPatchScope()

    def patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)

        def call(*arguments: Any, **named: Any) -> Any:
            named["_semantic"] = semantic
            return function(*arguments, **named)

        scope.set_attr(owner, name, call)

    def numpy_dtype(kind: Any) -> Any:
        name = kind.scalar.name
        if name not in dtypes:
            dtypes[name] = plain_numpy_dtype(kind.scalar)
        return dtypes[name]

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        """Blocks of one kind share one __dict__."""
        key = element_ty.name, *(getattr(size, "value", size) for size in shape)
        if key not in blocks:
            plain_block(self, element_ty, shape)
            blocks[key] = vars(self)
        self.__dict__ = blocks[key]

    def tensor(self: Any, handle: Any, type: Any) -> None:
        if "_sizes" not in vars(type):
            plain_tensor(self, handle, type)
            type._sizes = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = type._sizes

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        blocked = a.is_block()
        if blocked == b.is_block() and (not blocked or a.shape.values == b.shape.values):
            return lhs, rhs
        return plain_broadcast(self, lhs, rhs)

    def identical(plain: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
        return lambda self, other: self is other or plain(self, other)

    interpreter._patch_lang = patch_lang
    interpreter._patch_attr = patch_attr
    interpreter._get_np_dtype = numpy_dtype
    interpreter.GridExecutor.__call__ = roomy(interpreter.GridExecutor.__call__)
    interpreter.TritonSemantic.broadcast_impl_value = broadcast
    core.block_type.__init__ = block
    core.tensor.__init__ = tensor
    core.dtype.__eq__ = identical(core.dtype.__eq__)
    core.pointer_type.__eq__ = identical(core.pointer_type.__eq__)
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
