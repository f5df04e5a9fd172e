"""The wheel, as a user gets it: one top-level package with the API and the SQL in it, working outside the checkout."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.command import REPOSITORY, environment

APPLICATION = """
from jobqueue import App

app = App()


@app.job("double")
def double(payload: dict) -> int:
    return 2 * payload["number"]
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution as a release is."""
    target = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(REPOSITORY)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel; its dependencies are those of the running one."""
    home = tmp_path_factory.mktemp("clean")
    # Our pip installs there: one of its own takes 4 s to unpack.
    venv.create(home)
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python")]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    (site_packages,) = home.glob("lib/python*/site-packages")
    ours = [path for path in sys.path if path.endswith("site-packages")]
    # A .pth file comes after the environment's own packages, so the wheel wins over an editable installation.
    (site_packages / "dependencies.pth").write_text("\n".join(ours))
    return home / "bin"


def test_only_jobqueue_is_at_the_top_with_api_and_sql_inside(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"jobqueue"}
    expected = {f"jobqueue/sql/{path.relative_to(REPOSITORY / 'sql')}" for path in (REPOSITORY / "sql").rglob("*.sql")}
    expected |= {
        f"jobqueue/{path.relative_to(REPOSITORY)}"
        for folder in ("templates", "static")
        for path in (REPOSITORY / "api" / "ui" / folder).rglob("*")
        if path.is_file()
    }
    assert {"jobqueue/api/ui/templates/frame.html", "jobqueue/api/ui/static/vendor/htmx.min.js"} <= expected
    assert expected <= set(names)
    assert {"jobqueue/api/app.py", "jobqueue/py.typed"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.startswith("tests/")]


def test_it_migrates_and_runs_a_job_outside_the_checkout(programs: Path, empty_dsn: str, tmp_path: Path) -> None:
    (tmp_path / "double_app.py").write_text(APPLICATION)

    def jobqueue(*arguments: str) -> str:
        done = subprocess.run(
            [programs / "jobqueue", *arguments],
            cwd=tmp_path, env=environment(empty_dsn), capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import jobqueue, jobqueue.api; print(jobqueue.__file__); print(jobqueue.api.__file__)"
    found = subprocess.run([programs / "python", "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert all(line.startswith(str(programs.parent)) for line in found.stdout.splitlines()), found.stdout
    assert jobqueue("--version").startswith("jobqueue, version ")
    assert "applied 0001" in jobqueue("migrate", "up")
    job_id = jobqueue("send", "double", '{"number": 21}').strip()
    jobqueue("worker", "double_app", "--until-idle")
    assert jobqueue("jobs", "wait", job_id, "--timeout", "5").splitlines()[-1].split() == [
        job_id, "completed", "42", "-", "-",
    ]  # fmt: skip
