"""`python -m gs_dist` is `gs-dist`."""

from gs_dist.cli import main

main()
