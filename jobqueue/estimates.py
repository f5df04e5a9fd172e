"""What jobs are expected to take as long as nothing has been learned of them: from the environment.

`JOBQUEUE_ESTIMATE__PROCESS_DOCUMENT__OCR_MS=3000` says that the stage `ocr` of the job_type `process_document` takes
3 seconds; `…__OCR_MS_PER_UNIT=150` what a unit of it takes, for handlers that say how many they have
(`job.estimate(units=…)`); `JOBQUEUE_ESTIMATE__PROCESS_DOCUMENT_MS` what the whole job takes. Names are in capitals, and
what is neither letter nor digit becomes `_`.

A worker hands them to the database when it starts; from the first runs on, what was measured counts.
"""

from __future__ import annotations

from collections.abc import Mapping

from jobqueue.errors import ConfigurationError

PREFIX = "JOBQUEUE_ESTIMATE__"
SUFFIXES = ("_MS", "_MS_PER_UNIT")
MOST_MS = 1e13

STORE = "select jobqueue.set_estimates(%s)"


def estimate_defaults(environ: Mapping[str, str]) -> dict[str, float]:
    """Return milliseconds by name, as `jobqueue.set_estimates` takes them: `{"PROCESS_DOCUMENT__OCR_MS": 3000.0}`.

    Raises ConfigurationError for a name that does not end in _MS or _MS_PER_UNIT, and for what is no number from 0.
    """
    return {
        name[len(PREFIX) :]: _milliseconds(name, value)
        for name, value in sorted(environ.items())
        if name.startswith(PREFIX) and value.strip()
    }


def _milliseconds(name: str, value: str) -> float:
    if not name.endswith(SUFFIXES):
        raise ConfigurationError(
            f"{name} does not say in what it counts", hint=f"Call it {name}_MS (milliseconds) or {name}_MS_PER_UNIT."
        )
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= MOST_MS:
        raise ConfigurationError(f"{name} = {value!r} is not a number of milliseconds", hint="Give a number from 0.")
    return number
