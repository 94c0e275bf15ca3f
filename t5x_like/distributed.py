"""One job on many hosts: how its processes find each other, what each of them feeds, and how they stop together."""

import os
import sys
import threading
from collections.abc import Collection, Mapping, Sequence

import jax
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from t5x_like.errors import RunFailed, UserError

VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
"""What a launcher may set instead of the option of the same name."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    connect_seconds: int = 300,
    heartbeat_seconds: int = 100,
) -> None:
    """Joins the processes of a job, before anything asks JAX for a device. Does nothing in a job of one process.

    What is not given is taken from `VARIABLES`. Where they say nothing either, JAX looks around: it knows Cloud TPU
    pods, GKE, SLURM and Open MPI.

    Args:
      coordinator: HOST:PORT at which process 0 listens.
      num_processes: of the whole job.
      process_id: which of them this is, from 0.
      connect_seconds: to wait for the others.
      heartbeat_seconds: a process that is silent for so long counts as dead, and every other one ends.

    Raises:
      UserError: one of the three is missing or makes no sense.
      RunFailed: not all processes were there in time.
    """
    options = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    variables = {name: os.environ[variable] for name, variable in VARIABLES.items() if variable in os.environ}
    given = variables | {name: value for name, value in options.items() if value is not None}
    if jax.distributed.is_initialized():
        return
    found = _checked(given) if given else _detected(connect_seconds)
    if found is None:
        return
    address, count, index = found
    loopback = address.rpartition(":")[0] in ("127.0.0.1", "localhost")
    failures: list[Exception] = []

    def connect() -> None:
        try:
            jax.distributed.initialize(
                *found,
                # JAX ends the process, with a stack of C++, where its own patience does.
                initialization_timeout=connect_seconds + 60,
                heartbeat_timeout_seconds=heartbeat_seconds,
                coordinator_bind_address=address if loopback and index == 0 else None,
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(connect_seconds)
    if failures or thread.is_alive():
        where = f"process {index} of {count}, coordinator {address}"
        if failures:
            raise RunFailed(f"{where}: {failures[0]}")
        if index == 0:
            raise RunFailed(
                f"{where}: not all of the others came within {connect_seconds} s. Look at their logs: do they run, "
                f"with this address and --num_processes={count}, and each with a --process_id of its own?"
            )
        raise RunFailed(
            f"{where}: no connection within {connect_seconds} s. Does process 0 run, is {address} its address as seen "
            "from here, is the port open between the hosts, and have all processes started?"
        )


def _checked(given: Mapping[str, str | int]) -> tuple[str, int, int] | None:
    """Coordinator, number of processes and index of this one; None for a job of one."""
    missing = [f"--{name} (or {VARIABLES[name]})" for name in VARIABLES if name not in given]
    if missing:
        named = ", ".join(f"--{name}={value}" for name, value in given.items())
        raise UserError(f"a job of several processes: {named} is given, and {' and '.join(missing)} is missing")
    numbers = {}
    for name in ("num_processes", "process_id"):
        try:
            numbers[name] = int(given[name])
        except ValueError:
            raise UserError(f"--{name} (or {VARIABLES[name]}) is {given[name]!r}, not a whole number") from None
    count, index, address = numbers["num_processes"], numbers["process_id"], str(given["coordinator"])
    if not 0 <= index < count:
        raise UserError(f"--process_id={index}: with --num_processes={count} it is 0 to {count - 1}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator={address}: write HOST:PORT, the host of process 0 and a free port there")
    return None if count == 1 else (address, count, index)


def _detected(connect_seconds: int) -> tuple[str, int, int] | None:
    """The same as JAX finds it. Asked here, since JAX's public `initialize` takes no cluster at all for an error.

    A job of one process is left alone: started by SLURM, JAX would let it have one GPU only.
    """
    from jax._src.clusters import ClusterEnv

    for cluster in ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or not cluster.is_env_present():
            continue
        try:
            if cluster.get_process_count() == 1:
                return None
            port = os.environ.get("JAX_COORDINATOR_PORT")
            address = cluster.get_coordinator_address(timeout_secs=connect_seconds, override_coordinator_port=port)
            return address, cluster.get_process_count(), cluster.get_process_id()
        except (RuntimeError, ValueError, OSError) as error:
            raise RunFailed(
                f"one of several processes ({cluster.name}), but where the others are is unclear: {error}"
            ) from error
    return None


def leave(code: int, seconds: float = 5.0) -> None:
    """Ends a process that has failed, with `code`; returns where it is alone.

    An orderly exit waits for every other process, and they wait for this one in the middle of a step: so the others get
    `seconds` to fail too, and are then left to find this one gone.
    """
    if not jax.distributed.is_initialized():
        return
    thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    thread.start()
    thread.join(seconds)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def stop_agreed(step: int) -> bool:
    """Whether all processes stop after this step because one of them was told to (SIGTERM).

    Ask once after every step, in every process. JAX hears the signal, and chooses a step that none has passed yet.
    """
    return multihost_utils.reached_preemption_sync_point(step)


def same_everywhere(value: bool) -> bool:
    """Whether `value` is true in every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.process_allgather(value).all())


def even_share(batch_size: int, index: int, count: int) -> range:
    """The rows of a global batch that process `index` of `count` feeds where each feeds its own, in order."""
    return range(index * batch_size // count, (index + 1) * batch_size // count)


def own_rows(sharding: NamedSharding, batch_size: int) -> Sequence[int]:
    """Rows of a global batch that this process has to feed: those that its devices hold, in order.

    Several processes feed the same rows where a model is split over them, and the rows of one may lie apart where a
    mesh follows the wiring of its devices.

    Args:
      sharding: of the batch; its first dimension counts.
      batch_size: rows of the global batch; the mesh divides it.
    """
    if jax.process_count() == 1:
        return range(batch_size)
    return rows_held(sharding.addressable_devices, sharding, batch_size)


def rows_held(devices: Collection[jax.Device], sharding: NamedSharding, batch_size: int) -> list[int]:
    """Rows of a global batch that some devices hold, in order."""
    rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1])).devices_indices_map((batch_size,))
    parts = [index[0] for device, index in rows.items() if device in devices and index]
    return sorted({row for part in parts for row in range(*part.indices(batch_size))})
