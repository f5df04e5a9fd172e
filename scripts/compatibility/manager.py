"""A real systemd as process 1 of namespaces of its own: it manages the units given to it, and changes nothing of this machine.

The root, /dev, /sys and the kernel's settings are read-only there; /run, /tmp, /opt and /var are empty and in memory, /etc
is a copy. None of the distribution's units exists for it: they would do to the machine what they do at boot (empty /tmp, for
one). Needs root, and a machine without a systemd of its own, such as a container; ends with this process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jobqueue.database.parentage import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
SYSTEMD = Path("/lib/systemd/systemd")
UNITS = "/run/units"
TARGETS = ("basic", "sysinit", "shutdown", "sockets", "network-online", "multi-user")
NAMESPACES = ("--mount", "--pid", "--ipc", "--uts", "--cgroup")

# What is mounted over / before that becomes read-only; $1: where the files of `Manager.start` lie.
INIT = """\
set -e
files=$1
mount --make-rprivate /
# Among its own namespaces mounts have to spread: so do credentials reach their services.
mount --make-rshared /
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/systemd/system /run/lock /run/etc /run/work /run/output
cp -r "$files/units" {units}
mount -t overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/work overlay /etc
mkdir -p /etc/jobqueue/credentials
cp -r "$files/etc/." /etc/jobqueue/
chmod 600 /etc/jobqueue/credentials/*
mount -t tmpfs -o mode=755 tmpfs /opt
mkdir -p /opt/jobqueue/bin /opt/jobqueue/source /opt/jobqueue/site /opt/python
cp "$files/jobqueue" /opt/jobqueue/bin/jobqueue
mount --bind {root} /opt/jobqueue/source
mount --bind {site} /opt/jobqueue/site
mount --bind {python} /opt/python
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t tmpfs -o mode=755 tmpfs /var
mkdir -p -m 1777 /var/tmp
mkdir -p -m 700 /var/lib/private
mkdir -p /var/cache /var/log
for place in /proc/sys /dev; do mount --bind "$place" "$place"; done
mount -t tmpfs tmpfs /dev/shm
for place in / /dev /proc/sys /sys /opt/jobqueue/source /opt/jobqueue/site /opt/python; do
    mount -o remount,bind,ro "$place"
    if touch "$place/jobqueue-probe" 2>/run/probe; then echo "$place can be written to"; exit 1; fi
done
export container=jobqueue SYSTEMD_UNIT_PATH={units}
exec {systemd} --system --unit=basic.target --log-target=console --log-level=info --show-status=no
"""
PROGRAM = """\
#!/opt/python/bin/python3
import sys
from jobqueue.cli import main
sys.exit(main())
"""


@dataclass(frozen=True, slots=True)
class Manager:
    """A running manager."""

    process: int
    """Its process, as this machine numbers it."""

    def run(self, *command: str, seconds: float = 120.0) -> subprocess.CompletedProcess[str]:
        """Run a command beside it. Away from our terminal: what asks there for passwords would stop us."""
        enter = ["nsenter", "-t", str(self.process), "-m", "-p", "-i", "-u", "-C"]
        return subprocess.run(
            [*enter, "env", f"SYSTEMD_UNIT_PATH={UNITS}", *command],
            capture_output=True, text=True, timeout=seconds, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def systemctl(self, *arguments: str, seconds: float = 120.0) -> str:
        """Run systemctl and return what it says. Raises RuntimeError if that is an error."""
        done = self.run("systemctl", "--no-pager", "--no-ask-password", *arguments, seconds=seconds)
        if done.returncode:
            raise RuntimeError(f"systemctl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Properties of a unit."""
        lines = self.systemctl("show", unit, "-p", ",".join(properties)).splitlines()
        return dict(line.partition("=")[::2] for line in lines)

    def wait(self, unit: str, wanted: Mapping[str, str], seconds: float = 60.0) -> dict[str, str]:
        """Wait until a unit's properties are these. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while (found := self.show(unit, *wanted)) != dict(wanted):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{unit} is {found}, not {dict(wanted)}; {self.output(unit)}")
            time.sleep(0.05)
        return found

    def output(self, unit: str) -> str:
        """What a unit has written."""
        return self.run("cat", f"/run/output/{unit}").stdout

    def status_of(self, unit: str) -> dict[str, str]:
        """The lines of /proc/…/status of a unit's main process."""
        main = self.show(unit, "MainPID")["MainPID"]
        lines = self.run("cat", f"/proc/{main}/status").stdout.splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@contextlib.contextmanager
def manager(units: Mapping[str, str], etc: Mapping[str, str]) -> Iterator[Manager]:
    """Run systemd with these units (path below the folder of units: text) and files of /etc/jobqueue."""
    if os.geteuid() != 0 or not SYSTEMD.exists():
        raise RuntimeError("needs root and systemd")
    if Path("/run/systemd/system").exists():
        raise RuntimeError("this machine has a systemd already, and two of them would share its control groups")
    groups = _groups()
    folder = Path(tempfile.mkdtemp(prefix="jobqueue-systemd-", dir="/var/tmp"))
    try:
        targets = {f"{name}.target": "[Unit]\nDefaultDependencies=no\n" for name in TARGETS}
        _write(folder / "units", {**targets, **units})
        _write(folder / "etc", etc)
        _write(folder, {"jobqueue": PROGRAM, "init": _init()})
        (folder / "jobqueue").chmod(0o755)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "bash", str(folder / "init"), str(folder)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=die_with_parent(with_signal=signal.SIGKILL),
            )  # fmt: skip
        try:
            yield _ready(process, folder / "log")
        finally:
            process.kill()
            process.wait()
            _remove_groups(groups)
    finally:
        shutil.rmtree(folder)


def _init() -> str:
    site = sysconfig.get_paths()["purelib"]
    return INIT.format(units=UNITS, root=ROOT, site=site, python=sys.base_prefix, systemd=SYSTEMD)


def _write(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def _ready(process: subprocess.Popen[bytes], log: Path) -> Manager:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
            # Until it has become systemd, the child is the shell that mounts.
            if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                running = Manager(int(child))
                if running.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded"):
                    return running
        time.sleep(0.1)
    raise RuntimeError(f"systemd does not start: {log.read_text()}")


def _groups() -> set[Path]:
    return {path for path in Path("/sys/fs/cgroup").glob("**/") if ".scope" in str(path) or ".slice" in str(path)}


def _remove_groups(before: set[Path]) -> None:
    """The control groups that it leaves behind are empty, and in the way of nobody; still they go."""
    deadline = time.monotonic() + 10
    while (left := _groups() - before) and time.monotonic() < deadline:
        for path in sorted(left, key=lambda path: -len(path.parts)):
            with contextlib.suppress(OSError):
                path.rmdir()
        time.sleep(0.1)
