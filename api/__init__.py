"""The HTTP API of jobqueue (a Starlette application)."""
