"""What one submits to a Ray cluster: quantises by a recipe with the cluster's workers, prints the summary.

    ray job submit -- python jobs/quantize.py RECIPE [KEY.PATH=VALUE ...] [--nodes N]

It is `gs-dist quantize` that joins the cluster it was submitted to instead of starting one; exit codes are
the same (0 done, 2 a setting to change, 1 a failure). Recipe, model, data and output must lie where every
node of the cluster sees them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from gs_dist.terminal.cli import app


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("recipe", metavar="RECIPE", help="the recipe, a YAML file")
    parser.add_argument("overrides", metavar="KEY.PATH=VALUE", nargs="*", help="settings to lay over the recipe")
    parser.add_argument("--address", default="auto", help="Ray cluster to join (%(default)s: the one this runs on)")
    parser.add_argument("--nodes", type=int, help="nodes to wait for before the job is planned")
    options = parser.parse_intermixed_args(arguments)
    awaited = [] if options.nodes is None else ["--nodes", str(options.nodes)]
    app(
        ["quantize", "--address", options.address, *awaited, "--", options.recipe, *options.overrides],
        prog_name="quantize.py",
    )


if __name__ == "__main__":
    main()
