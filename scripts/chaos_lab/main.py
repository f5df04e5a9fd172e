"""The command line of chaos."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from chaos_lab import report
from chaos_lab.checker import Violation, check
from chaos_lab.faults import FAULTS, Fault, find_faketime
from chaos_lab.history import History
from chaos_lab.place import NotHere, open_place
from chaos_lab.recovery import judge, paces
from chaos_lab.report import Outcome
from chaos_lab.scene import Scene, Sizes, Stuck


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("faults", nargs=-1, type=click.Choice(list(FAULTS)), metavar="[FAULT]...")
@click.option(
    "--jobs",
    type=click.IntRange(10),
    default=105_000,
    show_default=True,
    help="Per fault; 3 % are refused.",
)
@click.option("--seed", type=int, default=1, show_default=True, help="The same jobs for the same seed.")
@click.option("--workers", type=click.IntRange(1), default=3, show_default=True, help="Worker processes.")
@click.option("--concurrency", type=click.IntRange(1), default=40, show_default=True, help="Of each worker.")
@click.option("--rate", type=click.FloatRange(1), default=600.0, show_default=True, help="Jobs sent per second.")
@click.option("--lease", type=click.FloatRange(10), default=10.0, show_default=True, help="Seconds.")
@click.option(
    "--warm", type=click.FloatRange(0), default=15.0, show_default=True, help="Seconds before the first fault."
)
@click.option("--calm", type=click.FloatRange(0), default=15.0, show_default=True, help="Seconds after each.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="How often a fault is repeated.")
@click.option("--dsn", metavar="DSN", help="A server of yours, for faults that leave it alone.  [default: our own]")
@click.option("--faketime", type=click.Path(path_type=Path), help="libfaketimeMT.so.1, for the fault clock.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures as JSON.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep every history in this folder.")
@click.option(
    "--check", "again", type=click.Path(exists=True, path_type=Path), help="Only check a history that was kept."
)
def main(
    faults: Sequence[str],
    jobs: int,
    seed: int,
    workers: int,
    concurrency: int,
    rate: float,
    lease: float,
    warm: float,
    calm: float,
    rounds: int,
    dsn: str | None,
    faketime: Path | None,
    output: Path | None,
    keep: Path | None,
    again: Path | None,
) -> None:
    """Break what jobqueue stands on while it works, and check what happened to every job.

    FAULT: kill, stop, restart, backends, connections, blackhole, clock, snapshot, disk, wal; none: all, one after the
    other. Exit code 1 if a single thing is not as it must be (the history and the logs of that run are kept), 2 if a
    fault could not be tried here.
    """
    if again is not None:
        outcomes = [judged(again.name, "a kept history", History.read(again))]
    else:
        sizes = Sizes(jobs, seed, workers, concurrency, rate, lease, warm, calm, rounds)
        outcomes = []
        for name in faults or list(FAULTS):
            click.echo(f"{name}: {FAULTS[name].says}", err=True)
            outcomes.append(torment(name, FAULTS[name], sizes, dsn, faketime, keep))
    report.show(outcomes)
    if output is not None:
        report.write(outcomes, output)
    if any(outcome.violations for outcome in outcomes):
        sys.exit(1)
    sys.exit(2 if any(outcome.skipped for outcome in outcomes) else 0)


def torment(
    name: str, fault: Fault, sizes: Sizes, dsn: str | None, faketime: Path | None, keep: Path | None
) -> Outcome:
    """Run one fault and judge what came of it."""
    folder = Path(tempfile.mkdtemp(prefix=f"jobqueue-chaos-{name}-", dir=keep))
    try:
        library = find_faketime(faketime) if fault.clocked else None
        with open_place(dsn, fault.small) as place:
            scene = Scene(place, sizes, folder, proxied=fault.proxied, faketime=library)
            stuck = ""
            with scene.running():
                try:
                    scene.warm_up()
                    fault.act(scene)
                    scene.finish()
                except Stuck as error:
                    stuck = str(error)
            outcome = judged(name, fault.says, scene.history(), stuck, folder)
            _keep_log(place.server, folder)
    except NotHere as reason:
        shutil.rmtree(folder)
        return Outcome(name, fault.says, None, (), (), skipped=str(reason))
    if outcome.violations or keep is not None:
        assert outcome.history is not None
        outcome.history.write(folder)
    else:
        shutil.rmtree(folder)
    return outcome


def judged(name: str, says: str, history: History, stuck: str = "", folder: Path | None = None) -> Outcome:
    """Check a history."""
    found = paces(history)
    violations = [*check(history), *judge(history, found)]
    if stuck:
        violations.insert(0, Violation("stuck", "", stuck))
    return Outcome(name, says, history, found, violations, folder if violations else None)


def _keep_log(server: object, folder: Path) -> None:
    from jobqueue.database.embedded import EmbeddedServer

    if isinstance(server, EmbeddedServer):
        shutil.copy(server.status().data_dir / "server.log", folder / "server.log")
