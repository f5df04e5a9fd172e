"""Faults, and a checker over the recorded history of every job. Begins in main.py; docs/decisions/0014-chaos.md."""
