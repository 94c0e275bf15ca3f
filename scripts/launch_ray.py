#!/usr/bin/env python3
r"""Runs a t5x_like command on a Ray cluster, one process on every host.

Needs: Ray here and on the cluster (pip install ray), in the same version; t5x_like on every host (--program); a
MODEL_DIR that all hosts see. Each process finds the others through JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
JAX_PROCESS_ID. When one is lost or fails the others are stopped, all start again, and `t5x_like train` goes on where it
stopped. On a cluster: `ray job submit --working-dir . -- python scripts/launch_ray.py ...`.

  launch_ray.py --hosts 4 --gpus_per_host 8 --program /shared/venv/bin/t5x_like \
      -- train --gin_file=xl.gin --gin.MODEL_DIR=/shared/runs/xl

Syntax: https://docs.ray.io/en/latest/ray-core/scheduling/placement-group.html and ray-core/actors.html
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from launching import Launcher, Restarts, positive, say, until_final

if TYPE_CHECKING:
    import ray.actor

SAVE_SECONDS = 120
"""For processes that are asked to stop to save, before they are killed."""

HANG_SECONDS = 10
"""The same, once one of them has failed: the others then wait for it, and cannot save."""


class Host:
    """Runs one process; a Ray actor on each host. `stop` may come while `run` waits."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def free_address(self) -> str:
        """This host, and a port on it where nobody listens yet."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{ray.util.get_node_ip_address()}:{probe.getsockname()[1]}"

    def run(self, command: Sequence[str], variables: Mapping[str, str]) -> int:
        """Its exit code; 128 + the signal where one ended it."""
        self._process = subprocess.Popen(command, env=os.environ | variables)
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def stop(self, seconds: int) -> None:
        """Asks it to save and end, and kills it if it does not within `seconds`."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()


def variables(address: str, number: int, index: int) -> dict[str, str]:
    """What tells a process where the others are."""
    return {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(number),
        "JAX_PROCESS_ID": str(index),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the arguments say.

    Returns:
      The exit code of the command, the first that is not 0; 2 for the user's mistake.
    """
    launcher = Launcher(__doc__)
    add = launcher.parser.add_argument
    add("--hosts", type=positive, required=True, metavar="N", help="processes, each on a host of its own")
    add("--cpus_per_host", type=positive, default=1, metavar="N", help="to reserve (default: 1)")
    add("--gpus_per_host", type=positive, metavar="N", help="to reserve")
    add("--resource", action="append", default=[], metavar="NAME=N", help="any other, such as TPU=4; repeatable")
    add("--share_hosts", action="store_true", help="processes may share a host, as in a trial on one machine")
    add("--address", metavar="ADDRESS", help="of the cluster (default: RAY_ADDRESS, else one on this machine alone)")
    launcher.add_env()
    add("--pause", type=positive, default=10, metavar="SECONDS", help="before the first restart (default: 10)")
    options, command = launcher.parse(argv)
    bundle = _bundle(launcher.parser, options)
    strategy = "PACK" if options.share_hosts else "STRICT_SPREAD"
    restarts = Restarts(options.max_restarts, options.pause)
    if options.dry_run:
        print(f"# Ray reserves, {strategy}: {options.hosts} x {bundle}")
        for index in range(options.hosts):
            settings = variables("HOST_0:FREE_PORT", options.hosts, index)
            words = [f"{name}={value}" for name, value in settings.items()]
            others = f", with {' '.join(options.env)} of this shell" if options.env else ""
            print(f"# process {index}{others}\nenv {shlex.join([*words, *command])}")
        print(f"# if one fails, all of them again ({restarts})")
        return 0
    try:
        import ray
    except ImportError:
        launcher.parser.error(f"{sys.executable} cannot import ray: pip install it in the cluster's version")
    passed = {name: os.environ[name] for name in options.env}
    ray.init(options.address, log_to_driver=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: the processes are stopped
    try:
        return until_final(lambda: _attempt(options.hosts, bundle, strategy, command, passed), restarts)
    finally:
        ray.shutdown()


def _bundle(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, float]:
    """What a host must have."""
    bundle = {"CPU": float(options.cpus_per_host)}
    if options.gpus_per_host:
        bundle["GPU"] = float(options.gpus_per_host)
    for resource in options.resource:
        name, _, number = resource.partition("=")
        try:
            bundle[name] = float(number)
        except ValueError:
            parser.error(f"--resource={resource}: write NAME=NUMBER, such as TPU=4")
    return bundle


def _attempt(
    number: int, bundle: dict[str, float], strategy: str, command: Sequence[str], passed: Mapping[str, str]
) -> int:
    """Starts all processes, waits, and stops the rest when one fails."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    group = ray.util.placement_group([bundle] * number, strategy=strategy)
    say(f"waiting for {number} x {bundle}, {strategy}")
    ray.get(group.ready())
    resources = {name: amount for name, amount in bundle.items() if name not in ("CPU", "GPU")}
    place = ray.remote(num_cpus=bundle["CPU"], num_gpus=bundle.get("GPU", 0), resources=resources, max_concurrency=2)(
        Host
    )
    hosts = [
        place.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group, index)).remote()
        for index in range(number)
    ]
    patience = SAVE_SECONDS
    try:
        address = ray.get(hosts[0].free_address.remote())
        running = {
            host.run.remote(command, {**passed, **variables(address, number, index)}): index
            for index, host in enumerate(hosts)
        }
        while running:
            [done], _ = ray.wait(list(running))
            index = running.pop(done)
            if code := ray.get(done):
                say(f"process {index} ended with exit code {code}; stopping the others")
                patience = HANG_SECONDS
                return code
        return 0
    except ray.exceptions.RayError as error:
        say(f"a host is lost ({type(error).__name__}); stopping the others")
        patience = HANG_SECONDS
        return 1
    finally:
        _stop(hosts, patience)
        ray.util.remove_placement_group(group)


def _stop(hosts: Sequence["ray.actor.ActorHandle"], seconds: int) -> None:
    import ray

    stopping = [host.stop.remote(seconds) for host in hosts]
    for each in stopping:
        with contextlib.suppress(ray.exceptions.RayError):  # a host that is lost has stopped
            ray.get(each, timeout=seconds + 10)
    for host in hosts:
        ray.kill(host)


if __name__ == "__main__":
    sys.exit(main())
