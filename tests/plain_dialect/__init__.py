"""A small dialect of tests, as a package outside of gs_dist would bring one."""
