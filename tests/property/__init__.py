"""Random clients against a real server: whatever they do, in whatever order, the invariants hold."""
