"""The distributed job. Ray only in `worker_group` and `cluster`."""
