"""Triton's interpreter, without work whose results it drops: that is most of its time."""

import dataclasses

from triton.runtime import interpreter


def hasten():
    """Kernels compute the same numbers.

    Whether an integer operation overflows is computed, in int64, and asserted in debug mode alone, which it is not in.
    Each call of a function within a kernel replaces the builtins of the language: once a launch and module will do.
    """
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    replace_builtins, launch, replaced = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def replace_once(function):
        if id(function.__globals__) in replaced:
            return None
        replaced.add(id(function.__globals__))
        return replace_builtins(function)

    def launch_anew(self, *args, **kwargs):
        replaced.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, launch_anew
