"""Processes that this one forks end when it does, however it does: also by kill -9.

Importing this module arranges it.  The server from which Megatron forks the writer of --async-save
imports it as well, so that the writer ends with the server, and that with the training process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
_forking: dict[str, int] = {}  # the process that forks from its main thread


def _before() -> None:
    # The system counts the end of the forking thread as the parent's end.
    main = threading.current_thread() is threading.main_thread()
    _forking["process"] = os.getpid() if main else 0


def _in_child() -> None:
    if _forking["process"]:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _forking["process"]:  # it has ended already
            os._exit(1)


os.register_at_fork(before=_before, after_in_child=_in_child)
