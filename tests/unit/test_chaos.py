"""`scripts/chaos` runs to its end with few jobs: real processes, a fault, the checker over the recorded history, the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobqueue.database.embedded import EmbeddedServer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from chaos_lab.main import main

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 240


def chaos(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    command = [sys.executable, str(ROOT / "scripts" / "chaos"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)


@pytest.mark.slow
def test_no_job_is_lost_when_every_backend_is_killed_and_the_history_is_kept(
    tmp_path: Path, server: EmbeddedServer
) -> None:
    small = ("--jobs", 300, "--rate", 150, "--workers", 1, "--warm", 0, "--calm", 0, "--rounds", 1)
    output, kept = tmp_path / "figures.json", tmp_path / "kept"
    kept.mkdir()
    ended = chaos("backends", *small, "--dsn", server.dsn, "--output", output, "--keep", kept)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (figures,) = json.loads(output.read_text())
    assert figures["fault"] == "backends"
    assert figures["injections"] == 2
    assert figures["ended"] == figures["jobs"] > 250
    assert figures["attempts"] > figures["jobs"]
    assert figures["violations"] == 0

    (folder,) = kept.iterdir()
    forget_the_end_of_a_job(folder)
    again = CliRunner().invoke(main, ["--check", str(folder)])
    assert again.exit_code == 1
    assert "is completed, but went to processing last" in again.output


def forget_the_end_of_a_job(folder: Path) -> None:
    lines = (folder / "moves.jsonl").read_text().splitlines()
    moves: list[dict[str, Any]] = [json.loads(line) for line in lines]
    end = next(n for n, move in enumerate(moves) if move["became"] == "completed")
    (folder / "moves.jsonl").write_text("\n".join(lines[:end] + lines[end + 1 :]) + "\n")


def test_a_fault_that_needs_a_server_of_its_own_is_not_tried_on_another(server: EmbeddedServer) -> None:
    ended = CliRunner().invoke(main, ["disk", "--dsn", server.dsn])
    assert "not tried: only a server of our own is filled" in ended.output
    assert ended.exit_code == 2
