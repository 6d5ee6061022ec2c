"""Number formats: what codes there are, what a range makes of their scale, how many bits they take, their names."""
