"""Write docs/pg-boss.md anew: python -m tests.conformance."""

from tests.conformance.table import DOCUMENT, render

DOCUMENT.write_text(render())
