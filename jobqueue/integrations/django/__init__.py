"""Django: `app.send_sync(…, connection=django.db.connection)`, a backend for its tasks, and a worker for manage.py.

Add `"jobqueue.integrations.django"` to INSTALLED_APPS for the command; the connection and the backend work without.
"""
