"""What a job gives: quantised layers, their rows, the summary."""
