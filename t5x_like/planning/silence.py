"""Keeps the libraries of a compiler's process from talking. Imports nothing, so that it comes before they do."""

import logging
import os


def quietly(on_cpu: bool) -> None:
    """What libtpu says when it finds no TPU, and TensorFlow of processors, goes nowhere; so does Python's log.

    `on_cpu` leaves accelerators alone that may be here: for compiling for others.
    """
    if on_cpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    logging.disable(logging.WARNING)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
