"""`skipped_tests.py REPORT`: name every skipped test of a JUnit report, and its totals; exit code 1 if there is any."""

from __future__ import annotations

import sys
from xml.etree import ElementTree


def main(report: str) -> int:
    """Print what was skipped, and the totals last, so that they end the log."""
    try:
        suite = ElementTree.parse(report).getroot().find("testsuite")
    except ElementTree.ParseError:
        suite = None
    if suite is None:
        print("pytest wrote no report: it ended before its tests did", file=sys.stderr)
        return 1
    skipped = [(case, note) for case in suite.iter("testcase") if (note := case.find("skipped")) is not None]
    for case, note in skipped:
        print(f"SKIPPED  {case.get('classname')}.{case.get('name')}: {note.get('message')}")
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    passed = int(suite.get("tests", 0)) - failed - len(skipped)
    print(f"pytest: {passed} passed, {failed} failed, {len(skipped)} skipped in {float(suite.get('time', 0)):.0f} s")
    return 1 if skipped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
