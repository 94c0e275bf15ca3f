#!/usr/bin/env python3
r"""Writes tasks tokenized to a seqio cache with Apache Beam: on this machine, or on as many as its runner has.

Needs the extra `cache` (see docs/launch.md: an environment of its own). What is behind `--` goes to Beam as it is:

  cache_tasks.py --tasks wordnet_supersense --output_cache_dir /data/cache
  cache_tasks.py --tasks my_task --allow_import my_tasks --output_cache_dir gs://me/cache \
      -- --runner=DataflowRunner --project=me --region=us-east5 --temp_location=gs://me/tmp --setup_file=./setup.py

Train on it with --gin.loader.DatasetConfig.use_cached=True --gin.loader.DatasetConfig.cache_dirs='["/data/cache"]'.

Runners and their options: https://beam.apache.org/documentation/runners/capability-matrix/
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

REGISTRY = "t5x_like.data.tasks.registry"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the arguments say.

    Returns:
      The exit code: 0 done, 2 the user's mistake.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    own, beam = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options] [-- options of Beam]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--tasks", nargs="+", required=True, metavar="NAME", help="seqio tasks")
    add("--output_cache_dir", required=True, metavar="FOLDER", help="each task has a folder in it; one is never mended")
    add("--allow_import", action="append", default=[], metavar="MODULE", help="one that registers tasks; repeatable")
    add("--num_shards", type=int, default=64, metavar="N", help="files of each split, or more (default: 64)")
    add("--seed", type=int, metavar="N", help="of the draws before the cache, if a task has any (default: seqio's own)")
    options = parser.parse_args(own)
    try:
        importlib.import_module("apache_beam")
    except ImportError as error:
        parser.error(f"{error}: the extra `cache` is missing; docs/launch.md says how to install it")
    import seqio
    from seqio.scripts import cache_tasks_main

    modules = [REGISTRY, *options.allow_import]
    for module in modules:
        importlib.import_module(module)
    for name in options.tasks:
        if name not in seqio.TaskRegistry.names():
            parser.error(f"--tasks: no task {name!r} is registered; --allow_import=MODULE names a module that does")
        if not seqio.TaskRegistry.get(name).supports_caching:
            parser.error(f"--tasks: {name!r} has no seqio.CacheDatasetPlaceholder among its preprocessors")

    flags = cache_tasks_main.FLAGS
    flags([sys.argv[0], f"--output_cache_dir={options.output_cache_dir}", f"--min_shards={options.num_shards}"])
    flags.tasks, flags.module_import, flags.base_seed = options.tasks, modules, options.seed
    flags.pipeline_options = beam or ["--runner=DirectRunner"]
    cache_tasks_main.main([])
    return 0


if __name__ == "__main__":
    sys.exit(main())
