"""What a job will do and take, before a weight is read."""
