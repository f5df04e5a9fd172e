"""jobqueue inside other applications: their transactions, their frameworks.

```
adapters.py     which connections `connection=` accepts, and what is done on them
sqlalchemy.py   Session, Connection, AsyncSession, AsyncConnection        asyncpg.py   asyncpg's own connection
django/         django.db.connection, a backend for django.tasks, `manage.py jobqueue_worker`
lifespan.py     Starlette and FastAPI: the app, the mounted HTTP API and a worker in one process
```
Nothing of another library is imported before one of its objects is given. docs/guide/integrations.md has the recipes.
"""
