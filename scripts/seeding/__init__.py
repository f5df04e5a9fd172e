"""Believable jobs in a database: `scripts/seed`, and the history of `scripts/bench history`."""
