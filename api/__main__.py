"""`python -m jobqueue.api` prints the OpenAPI document as docs/openapi.json has it."""

import sys

from jobqueue.api.app import OPERATIONS
from jobqueue.api.openapi import build_document, to_text

sys.stdout.write(to_text(build_document(OPERATIONS)))
