"""A process of its own that draws: `python -m gs_dist.report.vega`, specifications in, SVG out, both as JSON.

Vega's engine takes 85 MB and may end the process that it runs in; a job's process is too dear for that.
"""

from __future__ import annotations

import json
import sys

import vl_convert

if __name__ == "__main__":
    asked = json.load(sys.stdin)
    json.dump({name: vl_convert.vegalite_to_svg(specification) for name, specification in asked.items()}, sys.stdout)
