"""Triton's interpreter, taught to refuse what a GPU calls an illegal memory access, and to lose less time."""

from __future__ import annotations

import numpy


def teach_interpreter(setattr_=setattr):
    """Bounds and haste, both."""
    teach_bounds(setattr_)
    teach_haste(setattr_)


def flat(arguments):
    """The arguments of a kernel, and those in its tuples."""
    for x in arguments:
        if isinstance(x, tuple):
            yield from flat(x)
        else:
            yield x


def teach_bounds(setattr_=setattr):
    """Every load and store has to lie inside the storage of a tensor that the kernel was given."""
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, arguments = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst
    given = numpy.zeros([2, 0], numpy.uint64)

    def remember(self, args, kwargs):
        nonlocal given
        args, kwargs = arguments(self, args, kwargs)
        tensors = [x for x in flat((*args, *kwargs.values())) if hasattr(x, "untyped_storage")]
        storages = [(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in (x.untyped_storage() for x in tensors)]
        given = numpy.array(sorted(storages), numpy.uint64).reshape(-1, 2).T
        return args, kwargs

    def check(pointers, mask, what):
        address = pointers.data[numpy.broadcast_to(mask.data.astype(bool), pointers.data.shape)].astype(numpy.uint64)
        begins, ends = given
        place = numpy.searchsorted(begins, address, side="right") - 1
        size = numpy.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        if not ((place >= 0) & (address + size <= ends[place])).all():
            raise IndexError(f"{what} outside of every tensor that the kernel was given")

    def masked_load(self, pointers, mask, *rest):
        check(pointers, mask, "load")
        return load(self, pointers, mask, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        check(pointers, mask, "store")
        return store(self, pointers, value, mask, *rest)

    setattr_(executor, "_init_args_hst", remember)
    setattr_(builder, "create_masked_load", masked_load)
    setattr_(builder, "create_masked_store", masked_store)


def teach_haste(setattr_=setattr):
    """Half the time: the language is made interpretable once a kernel and module, not for each function that is called,
    and sums of small integers are not done again in 64 bits to see them overflow (test_offsets_beyond_32_bits does)."""
    from triton.runtime import interpreter

    patch, scopes = interpreter._patch_lang, {}

    class Scope:
        def restore(self):
            while scopes:
                scopes.popitem()[1].restore()

    def patch_once(fn):
        if fn.__module__ not in scopes:
            scopes[fn.__module__] = patch(fn)
        return Scope()

    setattr_(interpreter, "_patch_lang", patch_once)
    setattr_(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False))
