"""The databases of tests; what makes them is part of the product."""

from jobqueue.testing.databases import Databases, create_database, drop_database

__all__ = ["Databases", "create_database", "drop_database"]
