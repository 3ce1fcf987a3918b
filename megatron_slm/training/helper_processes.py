"""Make the processes that this one forks end with it, even if it is ended by kill -9.

Importing this module is enough.  Megatron forks the writer of --async-save from a server process,
which imports the module as well: the writer ends with the server, and the server with the training
process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)
# The id of this process while its main thread forks; 0 while another thread does.
_forking: dict[str, int] = {}


def _before() -> None:
    # The kernel takes the end of the thread that forked for the end of the parent.
    main = threading.current_thread() is threading.main_thread()
    _forking["process"] = os.getpid() if main else 0


def _in_child() -> None:
    if _forking["process"]:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != _forking["process"]:  # the parent has ended already
            os._exit(1)


os.register_at_fork(before=_before, after_in_child=_in_child)
