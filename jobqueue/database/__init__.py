"""What talks to PostgreSQL: connections, migrations, the embedded server."""
