#!/usr/bin/env python3
r"""Runs a t5x_like command on a GKE cluster, on every host of every slice, through xpk.

Needs: `xpk` (pip install xpk) with `gcloud`, `kubectl` and `docker`; a cluster that `xpk cluster create` made; an image
with t5x_like in it; a MODEL_DIR on a storage that the workload mounts (--storage). xpk submits a JobSet: Kubernetes,
not this script, starts all hosts again when one is lost or fails, at most --max_restarts times, and `t5x_like train`
goes on where it stopped.

  launch_xpk.py --workload xl --cluster pods --tpu_type v5p-128 --docker_image europe-docker.pkg.dev/me/t5x_like:1 \
      --storage runs -- train --gin_file=xl.gin --gin.MODEL_DIR=/mnt/runs/xl

Syntax: `xpk workload create --help` of xpk 1.16, and https://github.com/AI-Hypercomputer/xpk (docs/usage/workloads.md)
"""

import shlex
import sys
import tempfile
from collections.abc import Sequence

from launching import Launcher, positive, run, shell

IN_THE_POD = (
    "trap 'asked=1; kill -TERM $job' TERM; {command} & job=$!; while kill -0 $job 2>/dev/null; do wait $job; done; "
    'wait $job; code=$?; [ "$asked$code" = 10 ] && code=143; exit $code'
)
"""A pod that is to go asks the command to save, which then ends well; 143 tells Kubernetes that it is not done."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the arguments say.

    Returns:
      The exit code of xpk; 2 for the user's mistake.
    """
    launcher = Launcher(__doc__)
    add = launcher.parser.add_argument
    add("--workload", required=True, metavar="NAME", help="of the job; small letters, digits and hyphens")
    add("--cluster", required=True, metavar="NAME", help="that xpk made")
    add("--zone", help="default: gcloud's own")
    add("--project", help="default: gcloud's own")
    device = launcher.parser.add_mutually_exclusive_group(required=True)
    device.add_argument("--tpu_type", metavar="TYPE", help="of a slice, such as v5p-128 or v5litepod-64")
    device.add_argument("--device_type", metavar="TYPE", help="GPU or CPU nodes, such as h100-80gb-8")
    add("--num_slices", type=positive, metavar="N", help="TPU slices (xpk's default: 1)")
    add("--num_nodes", type=positive, metavar="N", help="GPU or CPU nodes (xpk's default: 1)")
    image = launcher.parser.add_mutually_exclusive_group(required=True)
    image.add_argument("--docker_image", metavar="IMAGE", help="used as it is")
    image.add_argument("--base_docker_image", metavar="IMAGE", help="xpk adds the current folder to it")
    add("--storage", action="append", default=[], metavar="NAME", help="repeatable: of `xpk storage`, to be mounted")
    add("--priority", help="very-low, low, medium (xpk's default), high or very-high")
    launcher.add_env()
    add("--grace", type=positive, default=120, metavar="SECONDS", help="to save when a host is taken (default: 120)")
    add("--wait", action="store_true", help="until the workload has ended; exit code 0 if it ended well")
    options, command = launcher.parse(argv)
    if options.num_slices and options.device_type:
        launcher.parser.error("--num_slices is for --tpu_type; --device_type takes --num_nodes")
    if options.num_nodes and options.tpu_type:
        launcher.parser.error("--num_nodes is for --device_type; --tpu_type takes --num_slices")

    passed_on = {
        "command": IN_THE_POD.format(command=shlex.join(command)),
        **{name: getattr(options, name) for name in ("tpu_type", "device_type", "num_slices", "num_nodes")},
        **{name: getattr(options, name) for name in ("docker_image", "base_docker_image", "priority")},
        "max_restarts": options.max_restarts,
        "termination_grace_period_seconds": options.grace,
    }
    where = [f"--{name}={value}" for name in ("cluster", "zone", "project") if (value := getattr(options, name))]
    create = ["xpk", "workload", "create", f"--workload={options.workload}", *where]
    create += [f"--{name.replace('_', '-')}={value}" for name, value in passed_on.items() if value is not None]
    create += [f"--storage={name}" for name in options.storage]
    create.append("--restart-on-exit-codes=1")  # beside xpk's own 127-255: a host that is lost makes the others fail
    wait = ["xpk", "workload", "list", *where, f"--wait-for-job-completion={options.workload}"]

    with tempfile.NamedTemporaryFile("w", prefix="xpk_env_") as names:
        if options.env:
            names.write("".join(f"{name}\n" for name in options.env))
            names.flush()
            create.append(f"--env-file={'NAMES' if options.dry_run else names.name}")
        if options.dry_run:
            if options.env:
                print(f"# NAMES is a file with these lines: {' '.join(options.env)}")
            print(shell(create) + (f"\n{shell(wait)}" if options.wait else ""))
            return 0
        launcher.need("xpk", "pip install xpk")
        code = run(create)
    return run(wait) if options.wait and code == 0 else code


if __name__ == "__main__":
    sys.exit(main())
