"""The distributed job: stage workers, their group, reduction, coordination. Ray in worker_group and coordinator only."""
