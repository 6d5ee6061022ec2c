"""What a model is made of, and what is observed of it."""
