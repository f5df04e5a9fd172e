"""Django 6 has tasks of its own and needs Python 3.12; the same tests run there as with django-tasks here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest

from jobqueue.database.embedded import EmbeddedServer

ROOT = Path(__file__).parents[2]
NEWER = ("3.12", "3.13", "3.14")
# Whatever is not written in Python alone; all else is shared with this environment, which saves half a minute.
COMPILED = ("pydantic_core", "psycopg_binary")
RUN = """
import sys, django, pytest
from jobqueue.integrations.django import interface
print(django.VERSION[0], interface.task.__module__)
sys.exit(pytest.main(sys.argv[1:]))
"""


def newer_python() -> str | None:
    """A Python that Django 6 runs on: on the path, or under pyenv."""
    on_path = [shutil.which(f"python{name}") for name in NEWER]
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    under_pyenv = [str(path) for name in NEWER for path in sorted(versions.glob(f"{name}.*/bin/python"))]
    works = (
        path for path in [*under_pyenv, *on_path]
        if path and subprocess.run([path, "-c", "import venv"], capture_output=True, check=False).returncode == 0
    )  # fmt: skip
    return next(works, None)


def make_environment(python: str, place: Path) -> str:
    """An environment with Django 6 and, behind it, what is installed here; returns its Python."""
    subprocess.run([python, "-m", "venv", "--without-pip", place], check=True)
    made = str(place / "bin" / "python")
    wanted = ["django>=6,<7", *(f"{name}=={version(name)}" for name in COMPILED)]
    pip = [sys.executable, "-m", "pip", "--python", made, "install", "--no-deps", "--quiet", "--no-compile"]
    done = subprocess.run([*pip, *wanted], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (packages,) = place.glob("lib/python3.*/site-packages")
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib"))
    return made


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="tests/integrations/test_django.py runs on Django 6 already")
@pytest.mark.usefixtures("template")
def test_the_tests_of_djangos_tasks_pass_on_django_6(tmp_path: Path, server: EmbeddedServer) -> None:
    python = newer_python()
    if python is None:
        pytest.skip(f"needs one of Python {', '.join(NEWER)}, on the path or under pyenv")
    made = make_environment(python, tmp_path / "environment")
    home = str(server.status().data_dir)
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "JOBQUEUE_TEST_SERVER": home,
    }  # fmt: skip
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    # Assertions are explained by the run of the same tests here.
    arguments = ["-q", "--assert=plain", "-p", "pytest_asyncio.plugin", "-p", "no:cacheprovider"]
    command = [made, "-c", RUN, *arguments, "tests/integrations/test_django.py"]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ran.stdout.split()[:2] == ["6", "django.tasks.base"], ran.stderr
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert " passed" in ran.stdout
