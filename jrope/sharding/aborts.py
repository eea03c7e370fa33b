"""A last word where XLA ends the process by `abort`, which lost coordination does."""

import ctypes
import os
import signal
from collections.abc import Callable
from typing import Any, TypeAlias

Undo: TypeAlias = Callable[[], Any]


def on_abort(last_word: Callable[[], Any]) -> Undo:
    """Have `abort` call a function first, in whichever thread it is called.

    Python's own `signal` would let the main thread run it later, and there is no later.
    Elsewhere than on POSIX systems nothing changes.

    Returns:
      What puts the former handler back.
    """
    if os.name != "posix":
        return lambda: None
    library, number = ctypes.CDLL(None), int(signal.SIGABRT)
    library.signal.restype = ctypes.c_void_p
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: last_word())
    before = library.signal(number, ctypes.cast(handler, ctypes.c_void_p))

    def undo() -> object:
        library.signal(number, before)
        return handler  # which has to live until here

    return undo
