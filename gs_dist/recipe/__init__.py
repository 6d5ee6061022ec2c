"""What a job is told: text, keys, checks, policies."""
