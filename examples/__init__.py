"""Applications that run on jobqueue; each is also a test."""
