"""Where a job's processes are found, what is said when they are not, and which rows each one feeds."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src.clusters import cloud_tpu_cluster
from jax.sharding import NamedSharding, PartitionSpec

import t5x_like
from t5x_like import distributed
from t5x_like.errors import RunFailed, UserError

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[007-010],other",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[str, int, int], Mapping[str, object]]]:
    """What JAX is asked for, which here does nothing; no cluster is around."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *found, **options: calls.append((found, options)))
    for name in [*distributed.VARIABLES.values(), *SLURM, "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"]:
        monkeypatch.delenv(name, raising=False)
    return calls


def found(joined: list) -> list[tuple[str, int, int]]:
    return [each for each, _ in joined]


def test_nothing_around_is_one_process(joined: list) -> None:
    distributed.initialize()
    assert joined == []


def test_one_process_starts_no_device() -> None:
    script = (
        "from jax._src import xla_bridge\n"
        "from t5x_like import distributed\n"
        "distributed.initialize()\n"
        "distributed.initialize('host:1', 1, 0)\n"
        "assert not xla_bridge.backends_are_initialized()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(t5x_like.__file__).parent.parent)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 0, result.stderr


def test_options(joined: list) -> None:
    distributed.initialize("host:99", 4, 3, connect_seconds=30, heartbeat_seconds=12)
    assert found(joined) == [("host:99", 4, 3)]
    assert joined[0][1]["heartbeat_timeout_seconds"] == 12
    assert joined[0][1]["coordinator_bind_address"] is None


@pytest.mark.parametrize(("process", "bound"), [(0, "127.0.0.1:99"), (1, None)])
def test_a_coordinator_on_this_machine_is_not_open_to_others(joined: list, process: int, bound: str | None) -> None:
    distributed.initialize("127.0.0.1:99", 2, process)
    assert joined[0][1]["coordinator_bind_address"] == bound


def test_variables_and_options_over_them(joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "ray-head:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "8")
    monkeypatch.setenv("JAX_PROCESS_ID", "7")
    distributed.initialize()
    distributed.initialize(process_id=5)
    assert found(joined) == [("ray-head:1234", 8, 7), ("ray-head:1234", 8, 5)]


def test_slurm_as_jax_reads_it(joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """The port is JAX's rule: 61440 + job id modulo 4096."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    distributed.initialize("other:1", 2, 0)
    assert found(joined) == [("node007:62055", 4, 2), ("other:1", 2, 0)]


def test_one_slurm_task_keeps_all_of_its_devices(joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert joined == []


def test_a_cluster_that_describes_itself_badly_is_named(joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SLURM | {"SLURM_NTASKS": "four"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        RunFailed, match=r"one of several processes \(slurm\), but where the others are is unclear: .*four"
    ):
        distributed.initialize()
    assert joined == []


def test_gke_as_jax_reads_it(joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slices of two hosts, as GKE and xpk describe them; this is host 1 of slice 1."""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster.socket, "gethostbyname", lambda host: "10.0.0.1")
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "a-1-0,a-1-1",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "a-0-0",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": "1",
    }.items():
        monkeypatch.setenv(name, value)
    distributed.initialize()
    assert found(joined) == [("a-0-0:8482", 4, 3)]


def test_a_tpu_pod_as_jax_reads_it(joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the metadata server of a Cloud TPU VM says, here on its third host of four."""
    metadata = {
        "agent-worker-number": "2",
        "worker-network-endpoints": "x:0:10.0.0.5,x:1:10.0.0.6,x:2:10.0.0.7,x:3:10.0.0.8",
        "tpu-env": "ACCELERATOR_TYPE: 'v4-32'",
    }
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    distributed.initialize()
    assert found(joined) == [("10.0.0.5:8482", 4, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"coordinator": "host:1", "num_processes": 2},
            "--coordinator=host:1, --num_processes=2 is given, and --process_id (or JAX_PROCESS_ID) is missing",
        ),
        (
            {"process_id": 0},
            "--coordinator (or JAX_COORDINATOR_ADDRESS) and --num_processes (or JAX_NUM_PROCESSES) is missing",
        ),
        (
            {"coordinator": "host:1", "num_processes": 2, "process_id": 2},
            "--process_id=2: with --num_processes=2 it is",
        ),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "--coordinator=host: write HOST:PORT"),
    ],
)
def test_half_an_answer_is_refused(joined: list, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        distributed.initialize(**options)
    assert joined == []


def test_a_variable_that_is_no_number_is_named(joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_NUM_PROCESSES", "four")
    with pytest.raises(UserError, match=r"--num_processes \(or JAX_NUM_PROCESSES\) is 'four', not a whole number"):
        distributed.initialize("host:1", process_id=0)


def test_what_jax_cannot_do_is_said_in_one_message(joined: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def occupied(*found: object, **options: object) -> None:
        raise RuntimeError("the port is taken")

    monkeypatch.setattr(jax.distributed, "initialize", occupied)
    with pytest.raises(RunFailed, match=r"process 0 of 2, coordinator host:1: the port is taken"):
        distributed.initialize("host:1", 2, 0)


@pytest.mark.parametrize(
    ("process", "question"), [(0, "not all of the others came within 2 s"), (1, "no connection within 2 s")]
)
def test_nobody_there_is_a_message_and_not_a_stack(process: int, question: str) -> None:
    """A process, alone, that ends as the command line ends one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    script = (
        "from t5x_like import cli, distributed\n"
        f"cli._run = lambda argv: distributed.initialize({address!r}, 2, {process}, connect_seconds=2)\n"
        "print('code', cli.main([]))"  # never printed: the process has ended
    )
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(Path(t5x_like.__file__).parent.parent)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith(f"failed: process {process} of 2, coordinator {address}: {question}")
    assert "Traceback" not in result.stderr
    assert "@ " not in result.stderr  # a stack of C++
    assert time.monotonic() - start < 30


def test_one_process_feeds_all_rows() -> None:
    mesh = jax.make_mesh((8,), ("data",))
    assert list(distributed.own_rows(NamedSharding(mesh, PartitionSpec("data")), 16)) == list(range(16))


@pytest.mark.parametrize(
    ("spec", "local", "rows"),
    [
        (PartitionSpec("data"), [2, 3], [2, 3]),  # both of one part of the data
        (PartitionSpec("data"), [3, 4], [2, 3, 4, 5]),
        (PartitionSpec(("data", "model")), [2, 3], [2, 3]),
        (PartitionSpec("data"), [1, 6], [0, 1, 6, 7]),  # they lie apart
        (PartitionSpec(None), [0], [0, 1, 2, 3, 4, 5, 6, 7]),  # split over the model alone
        (PartitionSpec("data", "model"), [4], [4, 5]),  # the length is split as well
    ],
)
def test_a_process_feeds_the_rows_that_its_devices_hold(spec: PartitionSpec, local: list[int], rows: list[int]) -> None:
    """A mesh of data 4 x model 2, and eight rows: device `d` holds the rows of part `d // 2` of the data."""
    devices = jax.devices()
    mesh = jax.sharding.Mesh(np.array(devices).reshape(4, 2), ("data", "model"))
    held = distributed.rows_held([devices[index] for index in local], NamedSharding(mesh, spec), 8)
    assert held == rows
