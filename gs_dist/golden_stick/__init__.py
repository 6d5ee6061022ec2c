"""Golden Stick's module paths and habits: a script moves here by writing `gs_dist.golden_stick` for `mindspore_gs`.

What differs from `gs_dist.ptq`: `apply` and `convert` change the network that they are given, as Golden Stick's do, so
that a script may discard what they return and save the network. `docs/golden_stick.md` tells what is not here.
"""
