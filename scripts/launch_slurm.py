#!/usr/bin/env python3
r"""Runs a t5x_like command on a SLURM cluster, one task on every GPU, or on every node without GPUs.

Needs: `sbatch`; t5x_like installed where all nodes see it (--setup activates it); a MODEL_DIR that all nodes see.
Submits a batch script from the current folder. Before the time limit, and when others want the nodes, the run is asked
to save; then the job is queued again and `t5x_like train` goes on where it stopped. So it is after a crash.

  launch_slurm.py --nodes 4 --gpus_per_node 8 --time 24:00:00 --setup 'source /shared/venv/bin/activate' \
      -- train --gin_file=xl.gin --gin.MODEL_DIR=/shared/runs/xl

Syntax: https://slurm.schedmd.com/sbatch.html, srun.html, scancel.html and scontrol.html
A job whose nodes others want: https://slurm.schedmd.com/preempt.html
"""

import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence

from launching import FINAL, LONGEST_PAUSE, Launcher, positive, run

LIMIT = re.compile(r"(\d+-)?\d+(:\d+){0,2}")
"""A time limit: minutes, minutes:seconds, hours:minutes:seconds, or days-hours and finer."""

TASK_SECONDS = 120
"""For the other tasks to end by themselves, be it well, once one has ended."""

SCRIPT = r"""
asked=
trap 'asked=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1  # to the tasks, not to this script
{setup}
{srun} \
    {command} &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done  # a signal ends `wait`, not the tasks
wait "$step"
code=$?

restarts=${{SLURM_RESTART_COUNT:-0}}
if scontrol show job "$SLURM_JOB_ID" | grep -q ' PreemptTime=[0-9]'; then asked=yes; fi
if [ -n "$asked" ] && [ "$code" -eq 0 ]; then code=143; fi  # saved, and not done
case "$code" in {final}) exit "$code" ;; esac
if [ "$restarts" -ge {max_restarts} ]; then
  echo "launch: exit code $code, and no restart is left; the same command goes on from the last checkpoint"
  exit "$code"
fi
if [ -z "$asked" ]; then
  pause=$(( restarts < 6 ? {pause} << restarts : {longest} ))
  sleep $(( pause < {longest} ? pause : {longest} ))
fi
echo "launch: exit code $code; restart $(( restarts + 1 )) of {max_restarts}"
scontrol requeue "$SLURM_JOB_ID"
"""


def script(options: Namespace, command: Sequence[str]) -> str:
    """The batch script."""
    gpus = options.gpus_per_node
    tasks = gpus or options.tasks_per_node or 1
    settings = {
        "job-name": options.name,
        "nodes": options.nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": gpus,
        "cpus-per-task": options.cpus_per_task,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "signal": f"B:USR1@{options.grace}",
        "open-mode": "append",
        "output": options.output,
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in settings.items() if value is not None]
    lines += ["#SBATCH --requeue", *(f"#SBATCH {extra}" for extra in options.sbatch)]
    srun = ["srun", "--label", f"--wait={TASK_SECONDS}"]
    if options.cpus_per_task:
        srun.append(f"--cpus-per-task={options.cpus_per_task}")  # srun does not take it over from sbatch since 22.05
    body = SCRIPT.format(
        setup=options.setup or "",
        srun=shlex.join(srun),
        command=shlex.join(command),
        final="|".join(map(str, FINAL)),
        max_restarts=options.max_restarts,
        pause=options.pause,
        longest=LONGEST_PAUSE,
    )
    return "\n".join(["#!/bin/bash", *lines]) + "\n" + body


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the arguments say.

    Returns:
      The exit code of sbatch; 2 for the user's mistake.
    """
    launcher = Launcher(__doc__)
    add = launcher.parser.add_argument
    add("--nodes", type=positive, required=True, metavar="N")
    add("--gpus_per_node", type=positive, metavar="N", help="leave it out for CPU nodes")
    add("--tasks_per_node", type=positive, metavar="N", help="processes on a CPU node (default: 1)")
    add("--cpus_per_task", type=positive, metavar="N", help="default: the cluster's own")
    add("--time", required=True, metavar="LIMIT", help="of one start, such as 24:00:00 or 2-00:00:00")
    add("--partition", metavar="NAME", help="default: the cluster's own")
    add("--account", metavar="NAME", help="to be charged")
    add("--name", default="t5x_like", metavar="NAME", help="of the job (default: t5x_like)")
    add("--output", default="slurm-%j.out", metavar="FILE", help="what is printed (default: slurm-%%j.out)")
    add("--setup", metavar="COMMAND", help="on the first node before every start; its environment goes to all tasks")
    add("--grace", type=positive, default=300, metavar="SECONDS", help="to save before the time limit (default: 300)")
    add("--pause", type=positive, default=10, metavar="SECONDS", help="before a restart after a crash (default: 10)")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="any other: --sbatch=--mem=0; repeatable")
    options, command = launcher.parse(argv)
    if options.tasks_per_node and options.gpus_per_node:
        launcher.parser.error("--tasks_per_node is for CPU nodes: JAX gives each SLURM task one GPU")
    if not LIMIT.fullmatch(options.time):
        launcher.parser.error(f"--time={options.time}: write hours:minutes:seconds or days-hours:minutes:seconds")
    for extra in options.sbatch:
        if not extra.startswith("-") or "\n" in extra:
            launcher.parser.error(f"--sbatch={extra}: give one option of sbatch, such as --sbatch=--qos=high")
    if options.grace > 65535:
        launcher.parser.error(f"--grace={options.grace}: SLURM takes at most 65535 seconds")

    text = script(options, command)
    if options.dry_run:
        print(f"sbatch <<'END_OF_SCRIPT'\n{text}END_OF_SCRIPT")
        return 0
    launcher.need("sbatch", "run this on a login node of the cluster")
    return run(["sbatch"], stdin=text)


if __name__ == "__main__":
    sys.exit(main())
