"""One file a method: what it is called, reads, needs, refuses and costs. Its arithmetic is in `gs_dist.solvers`."""
