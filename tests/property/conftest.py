"""The fixture of the engine, for random clients."""

from tests.sql.conftest import engine

__all__ = ["engine"]
