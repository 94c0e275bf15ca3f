"""How a compiler's process begins. Imports nothing of the library, so that it comes before what that imports."""

import logging
import multiprocessing
import os
import threading


def quietly(on_cpu: bool) -> None:
    """What libtpu says when it finds no TPU, and TensorFlow of processors, goes nowhere; so does Python's log.

    `on_cpu` leaves accelerators alone that may be here: for compiling for others. A process whose parent was killed
    ends too, in the middle of what it compiles.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if on_cpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.disable(logging.WARNING)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
