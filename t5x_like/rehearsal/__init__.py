"""A job of several processes, rehearsed on this machine: real processes, with faults, against one process."""
