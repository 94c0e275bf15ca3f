#!/usr/bin/env python3
r"""Runs a t5x_like command on Cloud TPU VMs, on every host of every slice, and again after a preemption.

Needs: `gcloud`, logged in, with the Cloud TPU API on; an ssh key in the agent (`ssh-add ~/.ssh/google_compute_engine`);
a MODEL_DIR that all hosts mount. Asks for the TPUs as a queued resource, waits for them, runs --setup and then the
command. When it fails, it is run again, on new TPUs where the old ones were taken away; `t5x_like train` goes on where
it stopped. A connection that breaks, or Ctrl-C, does not end what runs on the TPUs.

  launch_tpu_vm.py --name xl --zone us-east5-a --accelerator_type v5p-128 --runtime_version v2-alpha-tpuv5 --spot \
      --setup 'pip install "t5x_like[tpu]"' -- train --gin_file=xl.gin --gin.MODEL_DIR=/mnt/runs/xl

Syntax: https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources (create, describe, ssh, delete).
States: https://cloud.google.com/tpu/docs/queued-resources
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from launching import Launcher, Restarts, positive, run, say, shell, until_final

LOST = ("SUSPENDING", "SUSPENDED", "FAILED", "DELETING")
"""States from which a queued resource never becomes active again."""

POLL_SECONDS = 30


class QueuedResource(NamedTuple):
    """The commands for one queued resource.

    Attributes:
      options: of the command line.
    """

    options: argparse.Namespace

    def gcloud(self, verb: str, *arguments: str) -> list[str]:
        """A command on it."""
        where = [f"--zone={self.options.zone}"]
        if self.options.project:
            where.append(f"--project={self.options.project}")
        return ["gcloud", "compute", "tpus", "queued-resources", verb, self.options.name, *where, *arguments]

    def create(self) -> list[str]:
        """Asks for it."""
        options, slices = self.options, self.options.num_slices
        nodes = [f"--node-count={slices}", f"--node-prefix={options.name}"]
        return self.gcloud(
            "create",
            f"--accelerator-type={options.accelerator_type}",
            f"--runtime-version={options.runtime_version}",
            *(nodes if slices > 1 else [f"--node-id={options.name}"]),
            *[f"--{tier}" for tier in ("spot", "reserved") if getattr(options, tier)],
        )

    def describe(self) -> list[str]:
        """Prints its state."""
        return self.gcloud("describe", "--format=value(state.state)")

    def delete(self) -> list[str]:
        """With its machines, and without a question."""
        return self.gcloud("delete", "--force", "--quiet")

    def ssh(self, command: str) -> list[str]:
        """On all hosts of all slices at once; its exit code is that of a host that failed, or 0."""
        return self.gcloud("ssh", "--node=all", "--worker=all", "--batch-size=all", f"--command={command}")

    def state(self) -> str:
        """`ABSENT` where there is none of that name, `UNKNOWN` where gcloud cannot tell, which it then says why."""
        words = self.describe()
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode and "NOT_FOUND" in done.stderr:
            return "ABSENT"
        if done.returncode:
            say(f"{shell(words)}\n{done.stderr.strip()}")
            return "UNKNOWN"
        return done.stdout.strip()


def stop(program: str) -> str:
    """Ends what a broken connection left running on a host: asks it to save, waits two minutes, then insists."""
    name = shlex.quote(PurePosixPath(program).name)
    waits = f"timeout 120 sh -c 'while pgrep -x {name} >/dev/null; do sleep 1; done'"
    return f"pkill -TERM -x {name}; {waits} || pkill -KILL -x {name}; true"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the arguments say.

    Returns:
      The exit code of the command; 2 for the user's mistake.
    """
    launcher = Launcher(__doc__)
    add = launcher.parser.add_argument
    add("--name", required=True, help="of the queued resource and its nodes; one that is there is used as it is")
    add("--zone", required=True, help="such as us-east5-a")
    add("--project", help="default: gcloud's own")
    add("--accelerator_type", required=True, metavar="TYPE", help="of a slice, such as v5p-128 or v5litepod-64")
    add("--runtime_version", required=True, metavar="VERSION", help="such as v2-alpha-tpuv5, v2-alpha-tpuv6e")
    add("--num_slices", type=positive, default=1, metavar="N", help="slices, joined over the network (default: 1)")
    tier = launcher.parser.add_mutually_exclusive_group()
    tier.add_argument("--spot", action="store_true", help="cheap TPUs that may be taken away at any time")
    tier.add_argument("--reserved", action="store_true", help="from your reservation")
    add("--setup", metavar="COMMAND", help="on every host before every start, such as an installation and a mount")
    add("--folder", metavar="PATH", help="on the hosts, to run in (default: the home folder)")
    add("--pause", type=positive, default=30, metavar="SECONDS", help="before the first restart (default: 30)")
    add("--delete", action="store_true", help="give the TPUs back once the command has ended for good")
    options, command = launcher.parse(argv)

    resource, restarts = QueuedResource(options), Restarts(options.max_restarts, options.pause)
    line = shlex.join(command)
    job = resource.ssh(f"cd {shlex.quote(options.folder)} && {line}" if options.folder else line)
    if options.dry_run:
        _show(resource, job, restarts)
        return 0
    launcher.need("gcloud", "install it from https://cloud.google.com/sdk/docs/install")
    if resource.state() == "UNKNOWN":
        launcher.parser.error("gcloud cannot ask for --name in --zone and --project; what it says is above")
    code = until_final(lambda: _attempt(resource, job), restarts)
    if options.delete:
        run(resource.delete())
    return code


def _show(resource: QueuedResource, job: list[str], restarts: Restarts) -> None:
    options = resource.options
    print(f"# where there is no queued resource {options.name}\n{shell(resource.create())}\n")
    print(f"# every {POLL_SECONDS} s, until it says ACTIVE\n{shell(resource.describe())}\n")
    print("# on hosts that were there before: end what is left of an earlier start")
    print(f"{shell(resource.ssh(stop(options.program)))}\n")
    print("# on every host")
    if options.setup:
        print(shell(resource.ssh(options.setup)))
    print(f"{shell(job)}\n")
    print(f"# if that fails, all of this again ({restarts});")
    print(f"# first, where the state is one of {', '.join(LOST)}\n{shell(resource.delete())}")
    if options.delete:
        print(f"\n# in the end\n{shell(resource.delete())}")


def _attempt(resource: QueuedResource, job: list[str]) -> int:
    """One start: on the machines that are there, or on new ones."""
    state = resource.state()
    if state == "UNKNOWN":
        return 1
    if state in LOST:
        say(f"{resource.options.name} is {state}")
        if code := run(resource.delete()):
            return code
        state = "ABSENT"
    fresh = state != "ACTIVE"
    if state == "ABSENT" and (code := run(resource.create())):
        return code
    while state != "ACTIVE":
        time.sleep(POLL_SECONDS)
        last, state = state, resource.state()
        if state != last:
            say(f"{resource.options.name} is {state}")
        if state in (*LOST, "ABSENT"):
            return 1
    before = [] if fresh else [stop(resource.options.program)]
    before += [resource.options.setup] if resource.options.setup else []
    for command in before:
        if code := run(resource.ssh(command)):
            return code
    code = run(job)
    # A host that is taken away lets the command save and end well: that is no end of the run.
    return 1 if code == 0 and resource.state() != "ACTIVE" else code


if __name__ == "__main__":
    sys.exit(main())
