"""`python -m jobqueue.procrastinate`: print the queries of the installed procrastinate with their parameters.

Ends with the message of `check_queries`, and with 78, if they are not those that the connector knows.
"""

from procrastinate import sql

from jobqueue.errors import ConfigurationError
from jobqueue.procrastinate.queries import check_queries, parameters_of

for name, text in sorted(sql.queries.items()):
    print(name, *sorted(parameters_of(text)))
try:
    check_queries()
except ConfigurationError as error:
    print(error.message)
    raise SystemExit(error.exit_code) from None
