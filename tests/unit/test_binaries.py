"""Which programs, account and directory the embedded server takes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobqueue.database import binaries as programs
from jobqueue.database.binaries import Account, Binaries
from jobqueue.database.embedded import default_data_dir


def test_existing_data_choose_the_programs_of_their_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_candidates", lambda: iter([Path("/a/18/bin"), Path("/a/15/bin")]))
    monkeypatch.setattr(
        programs, "inspect_binaries", lambda path, _: Binaries(path, path.parent.name, int(path.parent.name))
    )
    monkeypatch.delenv("JOBQUEUE_PG_BIN", raising=False)
    somebody = Account(os.geteuid(), os.getegid(), switch=False)
    assert programs.find_binaries(None, somebody).major == 18
    assert programs.find_binaries(None, somebody, major=15).major == 15
    assert programs.find_binaries(None, somebody, major=16).major == 18


def test_a_user_id_without_a_name_is_told_what_to_do() -> None:
    with pytest.raises(programs.AccountMissing, match="add a line such as `jobqueue:x:54321:"):
        programs.require_account_entry(Account(54321, 54321, switch=False))


def test_the_default_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBQUEUE_DATA_DIR", "/somewhere")
    assert default_data_dir() == Path("/somewhere")
    monkeypatch.delenv("JOBQUEUE_DATA_DIR")
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_data_dir() == Path("/xdg/jobqueue")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_data_dir() == Path("/var/lib/jobqueue")
