"""Static files: those of others are unchanged, each has its hash in its path."""

from __future__ import annotations

import hashlib
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from jobqueue.api.ui.assets import STATIC, assets, path_of
from jobqueue.api.ui.rendering import TEMPLATES

VENDOR = STATIC / "vendor"


def vendored() -> Mapping[str, Any]:
    """VENDOR.toml."""
    return tomllib.loads((VENDOR / "VENDOR.toml").read_text())


def test_files_of_others_are_those_that_were_published() -> None:
    listed = {}
    for package in vendored().values():
        assert package.keys() == {"package", "version", "integrity", "licence", "files"}
        for name, found in package["files"].items():
            listed[name] = found["sha256"]
    present = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in VENDOR.iterdir()}
    del present["VENDOR.toml"]
    assert present == listed


def test_a_path_changes_with_the_file() -> None:
    for name in assets():
        digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()
        assert path_of(name) == f"/static/{digest[:16]}/{name}", name
    assert {"ui.css", "views.css", "app.js", "favicon.svg", "vendor/htmx.min.js"} <= assets().keys()
    assert not [name for name in assets() if name.endswith((".toml", ".LICENSE"))], "these are not for browsers"


def test_templates_have_no_script_and_no_style_of_their_own() -> None:
    """Else the strict policy would stop them: that of the pages allows neither."""
    for path in TEMPLATES.glob("*.html"):
        text = path.read_text()
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son[a-z]+=|javascript:|\|\s*safe\b", text), (
            path.name
        )
