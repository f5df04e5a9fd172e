"""The job `import_dataset` as a user meets it: real files, real workers that are killed, and what the user sees."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from examples.import_dataset.active import active_jobs
from examples.import_dataset.app import app, receive
from examples.import_dataset.kinds import common_kind, kind_of
from examples.import_dataset.sample import make_csv, make_excel
from examples.import_dataset.sheet import read_batches, recognize
from examples.import_dataset.store import TABLES
from jobqueue import InvalidInput
from tests.api.conftest import serving
from tests.examples.support import (
    BOUND,
    KILLS,
    Connection,
    Gate,
    completed,
    ended,
    get,
    kill_at_random_units,
    worker,
)
from tests.support.command import REPOSITORY, environment
from tests.support.databases import Databases
from tests.support.server import rows, value
from tests.support.waiting import wait_until

ROWS = 3000
BATCH = 50
COLUMNS = [
    {"name": "reading", "kind": "integer"},
    {"name": "station", "kind": "text"},
    {"name": "day", "kind": "date"},
    {"name": "height_m", "kind": "number"},
    {"name": "storm", "kind": "boolean"},
    {"name": "remark", "kind": "text"},
]


@pytest.fixture(scope="module")
def dsn(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One database and one folder for all tests here: they differ by their jobs."""
    with pytest.MonkeyPatch.context() as patch, databases.lend() as conninfo:
        patch.setenv("DATASET_FOLDER", str(tmp_path_factory.mktemp("datasets")))
        asyncio.run(create_tables(conninfo))
        yield conninfo


@pytest.fixture(scope="module")
def gate(dsn: str) -> Iterator[Gate]:
    """Stands before every write of a batch and before the dataset."""
    with psycopg.connect(dsn, autocommit=True) as connection, psycopg.connect(dsn, autocommit=True) as keeper:
        yield Gate(connection, keeper, ["imports.batch", "imports.row", "imports.dataset"])


async def create_tables(dsn: str) -> None:
    async with TABLES.open(dsn):
        pass


@dataclass(frozen=True, slots=True)
class Run:
    """A run that nobody disturbed, what it showed, and its file."""

    job: UUID
    units: int
    percentages: list[int]
    content: bytes


@pytest.fixture(scope="module")
def undisturbed(dsn: str, gate: Gate, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("readings")
    content = make_csv(folder / "readings.csv", ROWS).read_bytes()
    with psycopg.connect(dsn, autocommit=True) as connection:
        record_percentages(connection)
        before, job = gate.units, upload(dsn, "readings.csv", content, "ada")
        completed("import_dataset", connection, job, dsn, folder / "log")
        seen = rows(connection, "select pct from percentages where job_id = %s order by n", (job,))
        return Run(job, gate.units - before, list(dict.fromkeys(pct for (pct,) in seen)), content)


def record_percentages(connection: Connection) -> None:
    """Write down every percentage that is ever committed, not only those that a poller happens to see."""
    connection.execute("""
        create table percentages (n serial, job_id uuid, pct int);
        create function note_percentage() returns trigger language plpgsql security definer as $$
        begin
            insert into public.percentages (job_id, pct) select id, progress_pct from jobqueue.job where id = new.id;
            return null;
        end $$;
        create constraint trigger note_percentage after update on jobqueue.job
            deferrable initially deferred for each row execute function note_percentage();
    """)


def upload(dsn: str, name: str, content: bytes, user: str, **options: Any) -> UUID:
    async def run() -> UUID:
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
            return await receive(connection, name, content, user, batch_rows=BATCH, **options)

    return asyncio.run(run())


def output(connection: Connection, job: UUID) -> list[list[tuple[Any, ...]]]:
    """All that a reader of the dataset sees."""
    return [
        rows(connection, "select name, path, columns, row_count from imports.dataset where job_id = %s", (job,)),
        rows(connection, "select batch, position, cells from imports.dataset_row where dataset = %s order by 1, 2", (job,)),
    ]  # fmt: skip


def test_an_upload_becomes_a_dataset_and_shows_10_20_40_70_90_100(connection: Connection, undisturbed: Run) -> None:
    assert undisturbed.percentages == [0, 10, 20, 40, 70, 90, 100]
    record = get(connection, undisturbed.job)
    assert record.display_name == "Import: readings.csv"
    assert (record.completed_stages, record.total_stages, record.created_by) == (6, 6, "ada")
    assert record.result == {
        "dataset": str(undisturbed.job),
        "duplicate": False,
        "rows": ROWS,
        "rejected": [],
    }
    columns = (record.stats or {})["columns"]
    assert [{"name": column["name"], "kind": column["kind"]} for column in columns] == COLUMNS
    assert [column["filled"] for column in columns[:5]] == [ROWS] * 5
    assert 0 < columns[5]["filled"] < ROWS
    path = value(connection, "select path from imports.dataset where job_id = %s", (undisturbed.job,))
    assert Path(path).is_relative_to(os.environ["DATASET_FOLDER"])
    assert Path(path).read_bytes() == undisturbed.content


def test_a_job_whose_workers_were_killed_five_times_gives_the_same_and_repeats_little(
    dsn: str, connection: Connection, gate: Gate, undisturbed: Run, tmp_path: Path
) -> None:
    # Another tenant, for whom the file is new.
    job = upload(dsn, "readings.csv", undisturbed.content, "ada", tenant="harbour")
    for kills in kill_at_random_units(
        "import_dataset", gate, connection, job, dsn, tmp_path / "log", units=undisturbed.units
    ):
        assert repeated(connection, job) <= kills * BOUND
    record = completed("import_dataset", connection, job, dsn, tmp_path / "log")

    assert output(connection, job) == output(connection, undisturbed.job)
    assert repeated(connection, job) <= KILLS * BOUND
    assert (record.attempt, record.stats) == (KILLS + 1, get(connection, undisturbed.job).stats)
    seen = [pct for (pct,) in rows(connection, "select pct from percentages where job_id = %s order by n", (job,))]
    assert seen == sorted(seen)
    assert seen[-1] == 100


def repeated(connection: Connection, job: UUID) -> int:
    """How many batches were written again."""
    writes = "select coalesce(sum(writes - 1), 0)::int from imports.batch where job_id = %s"
    return int(value(connection, writes, (job,)))


def test_excel_and_csv_give_the_same_and_the_same_file_is_not_imported_twice(
    dsn: str, connection: Connection, tmp_path: Path
) -> None:
    excel = make_excel(tmp_path / "readings.xlsx", rows=120).read_bytes()
    jobs = [
        upload(dsn, "readings.xlsx", excel, "ada"),
        upload(dsn, "small.csv", make_csv(tmp_path / "small.csv", rows=120).read_bytes(), "ada"),
    ]
    with worker("import_dataset", dsn, tmp_path / "log"):
        first, second = (ended(connection, job) for job in jobs)
        again = ended(connection, upload(dsn, "copy of readings.xlsx", excel, "grace"))
    assert (first.status, second.status) == ("completed", "completed")
    assert first.stats == second.stats
    assert output(connection, jobs[0])[1] == output(connection, jobs[1])[1]

    assert again.result == {"dataset": str(jobs[0]), "duplicate": True, "rows": 0, "rejected": []}
    stages = rows(
        connection, "select name, status from jobqueue.stages where job_id = %s order by position", (again.id,)
    )
    assert [status for _, status in stages] == ["completed"] * 2 + ["skipped"] * 4


def test_two_jobs_at_a_time_make_one_dataset_of_one_file(
    dsn: str, connection: Connection, gate: Gate, tmp_path: Path
) -> None:
    content = b"a,b\n1,2\n"
    jobs = [upload(dsn, "twice.csv", content, user) for user in ("ada", "grace")]
    with gate.closed_at(gate.units + 1) as somebody_waits, worker("import_dataset", dsn, tmp_path / "log"):
        # Both have found that the file is new, and are about to write its rows.
        wait_until(lambda: waiting(connection) == 2, what="both jobs are parsing", timeout=60)
        assert somebody_waits()
        gate.open()
        results = [ended(connection, job).result or {} for job in jobs]
    assert sorted(result["duplicate"] for result in results) == [False, True]
    assert results[0]["dataset"] == results[1]["dataset"]
    assert value(connection, "select count(*) from imports.row where job_id = any (%s)", (jobs,)) == 1


def waiting(connection: Connection) -> int:
    return int(value(connection, "select count(*) from pg_locks where locktype = 'advisory' and not granted"))


def test_a_file_that_cannot_be_used_says_why(dsn: str, connection: Connection, tmp_path: Path) -> None:
    job = upload(dsn, "notes.txt", b"hello", "ada")
    with worker("import_dataset", dsn, tmp_path / "log"):
        record = ended(connection, job)
    assert (record.status, record.error_class, record.attempt) == ("failed", "invalid", 1)
    assert record.error_message == "notes.txt is not a file that can be imported; give one that ends in .csv or .xlsx"


async def test_s9_a_user_sees_their_jobs_that_run_or_have_just_ended(dsn: str, connection: Connection) -> None:
    def send(user: str) -> str:
        sent = app.send_sync(
            "import_dataset", {"upload": UUID(int=1), "name": "a.csv"}, connection=connection, created_by=user
        )
        return str(sent.id)

    waiting, cancelled, old, theirs = send("lin"), send("lin"), send("lin"), send("max")
    connection.execute("select jobqueue.cancel(%s, 'not needed')", (cancelled,))
    connection.execute("select jobqueue.cancel(%s, 'not needed')", (old,))
    connection.execute("update jobqueue.job set created_at = now() - interval '50 minutes' where id = %s", (waiting,))
    connection.execute(
        "update jobqueue.job set created_at = now() - interval '40 minutes', completed_at = now() - interval '6 minutes' "
        "where id = %s", (old,)
    )  # fmt: skip
    async with await psycopg.AsyncConnection.connect(dsn) as other:
        seen = [str(job["id"]) for job in await active_jobs(other, "lin")]
        assert seen == [cancelled, waiting]
        assert [str(job["id"]) for job in await active_jobs(other, "max")] == [theirs]
        async with serving(dsn) as client:
            answer = await client.get("/jobs/active", params={"created_by": "lin"})
        assert [job["id"] for job in answer.json()["data"]] == seen
        connection.execute(
            "update jobqueue.job set created_at = now() - interval '61 minutes' where id = %s", (waiting,)
        )
        assert [str(job["id"]) for job in await active_jobs(other, "lin")] == [cancelled]
    connection.execute("select jobqueue.cancel(%s, 'the test is over')", (waiting,))
    connection.execute("select jobqueue.cancel(%s, 'the test is over')", (theirs,))


def test_the_command_imports_its_file_and_says_what_is_in_it(dsn: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.import_dataset"]
    settings = environment(dsn, TMPDIR=str(tmp_path))
    done = subprocess.run(command, cwd=REPOSITORY, env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("20000 rows, 0 rejected: reading (integer), station (text), day (date)")
    assert done.stderr.splitlines()[-1].startswith("100 %")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", b"", "is empty"),
        ("a.csv", b"\n1,2\n", "has no header"),
        ("a.csv", b"a,a\n1,2\n", 'each column needs a name of its own; "a" is not one'),
        ("a.csv", b"a,,c\n1,2,3\n", "each column needs a name of its own"),
        ("a.xlsx", b"a,b\n", "is not an Excel file that can be read"),
    ],
)
def test_a_file_without_a_usable_header_is_invalid(name: str, content: bytes, problem: str) -> None:
    with pytest.raises(InvalidInput, match=problem):
        recognize(name, content)


@pytest.mark.parametrize(
    "content",
    ["näme;value\nß;1,5\n".encode(), "näme;value\nß;1,5\n".encode("cp1252"), "näme\tvalue\nß\t1,5\n".encode("utf-16")],
)
def test_delimiter_and_encoding_are_found(content: bytes) -> None:
    layout = recognize("a.csv", content)
    assert layout.columns == ["näme", "value"]
    (batch,) = read_batches("a.csv", content, layout, 10)
    assert batch.rows == [["ß", "1,5"]]


def test_rows_that_do_not_fit_are_left_out_and_named() -> None:
    content = b"a,b\n1,2\n3\n\n4,5,6\n7,8,\n"
    batches = list(read_batches("a.csv", content, recognize("a.csv", content), 2))
    assert [batch.rows for batch in batches] == [[["1", "2"], ["3", None]], [], [["7", "8"]]]
    assert [text for batch in batches for text in batch.rejected] == ["row 4 has 3 cells for 2 columns"]


def test_the_kind_of_a_column_is_the_narrowest_that_fits() -> None:
    kinds = {
        "12": "integer",
        "007": "text",
        "-0.5e3": "number",
        "2024-02-30": "text",
        "2024-02-29": "date",
        "Yes": "boolean",
    }
    assert {text: kind_of(text) for text in kinds} == kinds
    assert common_kind(["integer", "number"]) == "number"
    assert common_kind(["integer", "date"]) == "text"
    assert common_kind([]) == "text"
