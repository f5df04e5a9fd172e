"""The command line of the compatibility checks. Each prints what it saw, and ends with 1 if something does not hold."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from compatibility import releases as past


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Check jobqueue where it has to work: other servers, a pooler, upgrades, systemd, another user."""


def report(faults: list[str]) -> None:
    """End the program: well if there is no fault."""
    for fault in faults:
        click.echo(f"FAULT: {fault}", err=True)
    sys.exit(1 if faults else 0)


@main.command()
@click.option("--only", type=int, multiple=True, help="Versions to begin from.  [default: all that git knows]")
@click.option("--pg-bin", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Programs of PostgreSQL.")
def upgrade(only: tuple[int, ...], pg_bin: Path | None) -> None:
    """From each schema of the past to today's, under load."""
    from compatibility.upgrade import upgrade as run
    from jobqueue.testing.servers import temporary_server

    faults = []
    with temporary_server(pg_bin) as server:
        for release in past.releases():
            if not only or release.version in only:
                outcome = run(server.dsn, release)
                click.echo(outcome.line())
                faults += outcome.faults()
    report(faults)


@main.command()
def systemd() -> None:
    """The units of deploy/systemd under a real systemd, in namespaces; needs root, e.g. in a container."""
    from compatibility.units import run

    report(run())


@main.command()
@click.argument("majors", type=int, nargs=-1)
@click.option("--part", "parts", multiple=True, help="Folders of tests.  [default: sql, worker, api]")
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True, help="Processes of pytest.")
def servers(majors: tuple[int, ...], parts: tuple[str, ...], processes: int) -> None:
    """The tests on other versions of PostgreSQL (default: 15, 16 and 17)."""
    from compatibility import servers as versions

    report(
        [fault for major in majors or (15, 16, 17) for fault in versions.run(major, parts or versions.PARTS, processes)]
    )


@main.command()
@click.argument("programs", type=click.Path(exists=True, dir_okay=False, path_type=Path), nargs=-1)
def pooler(programs: tuple[Path, ...]) -> None:
    """A real PgBouncer in transaction mode in front of the server (default: the one that is installed)."""
    from compatibility.pooler import run

    report(run(programs))


@main.command()
@click.argument("tests", nargs=-1)
@click.option("--source", type=click.Path(exists=True, path_type=Path), default=past.ROOT, help="What to clone.")
def user(tests: tuple[str, ...], source: Path) -> None:
    """`scripts/run --exit` and tests in a fresh clone of an ordinary user; needs root."""
    from compatibility.user import run

    report(run(tests, source))
