"""`python -m gs_dist` is `gs-dist`."""

from gs_dist.terminal.cli import main

main()
