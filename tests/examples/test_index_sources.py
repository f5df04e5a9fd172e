"""What the index reads: git, languages, symbols."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from examples.index_repository import grammars
from examples.index_repository.files import count_lines, language_of
from examples.index_repository.git import GitError, checkout, is_url, without_credentials
from examples.index_repository.grammars import has_grammar, symbols_of
from examples.index_repository.symbols import NotParseable, python_symbols
from jobqueue import InvalidInput, PermanentError
from tests.examples.repository import commit, git, make_repository, write


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    make_repository(folder, modules=1)
    return folder


async def commit_of(location: Path | str, ref: str = "HEAD", pinned: str | None = None) -> str:
    async with checkout(str(location), ref, pinned=pinned, workspace="test-index") as source:
        return source.commit


def found(language: str, text: str) -> list[tuple[str, str]]:
    symbols, _ = symbols_of(language, text.encode())
    return [(symbol.kind, symbol.qualified_name) for symbol in symbols]


async def test_a_ref_may_be_a_branch_a_tag_a_commit_or_relative(repository: Path) -> None:
    first = git(repository, "rev-parse", "HEAD")
    git(repository, "tag", "--annotate", "--message", "one", "v1")
    write(repository, "more.py", b"")
    second = commit(repository)
    assert [await commit_of(repository, ref) for ref in ("HEAD", "main", "v1", first, "HEAD~1")] == [
        second,
        second,
        first,
        first,
        first,
    ]


@pytest.mark.parametrize("form", ["{}", "file://{}"])
async def test_an_unknown_ref_is_invalid_input(repository: Path, form: str) -> None:
    with pytest.raises(InvalidInput, match="nonsense"):
        await commit_of(form.format(repository), "nonsense")


async def test_an_empty_repository_is_invalid_input(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    with pytest.raises(InvalidInput, match="is the repository empty"):
        await commit_of(tmp_path)


async def test_a_folder_inside_a_repository_names_the_repository(repository: Path) -> None:
    with pytest.raises(InvalidInput, match=f"lies inside the git repository {repository};"):
        await commit_of(repository / "package")


async def test_a_bare_repository_is_one_too(repository: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--quiet", "--bare", str(repository), "bare.git")
    assert await commit_of(tmp_path / "bare.git") == git(repository, "rev-parse", "HEAD")


@pytest.mark.parametrize("form", ["{}", "file://{}"])
async def test_the_commit_of_an_earlier_attempt_is_taken_although_the_branch_went_on(
    repository: Path, form: str
) -> None:
    first = git(repository, "rev-parse", "HEAD")
    write(repository, "more.py", b"")
    commit(repository)
    assert await commit_of(form.format(repository), "main", pinned=first) == first


@pytest.mark.parametrize("form", ["{}", "file://{}"])
async def test_a_pinned_commit_that_is_gone_ends_the_job_and_says_what_to_do(repository: Path, form: str) -> None:
    with pytest.raises(PermanentError, match="is gone; restart the job"):
        await commit_of(form.format(repository), pinned="0" * 39 + "1")


async def test_a_repository_that_cannot_be_reached_may_be_tried_again_and_its_password_is_not_shown() -> None:
    with pytest.raises(GitError) as raised:
        await commit_of("http://someone:secret@127.0.0.1:9/nothing.git")
    assert "secret" not in str(raised.value)
    assert "127.0.0.1:9/nothing.git" in str(raised.value)


async def test_a_content_that_is_not_there_is_an_error(repository: Path) -> None:
    async with checkout(str(repository), "HEAD", pinned=None, workspace="test-index") as source:
        with source.blobs() as blobs:
            with pytest.raises(GitError, match="does not have the content"):
                blobs.read("0" * 40)


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("https://example.org/a.git", True),
        ("git@example.org:a/b.git", True),
        ("/home/me/repository", False),
        (".", False),
        ("C:folder", False),
    ],
)
def test_urls_are_told_from_paths(location: str, expected: bool) -> None:
    assert is_url(location) is expected


def test_credentials_of_a_url_are_left_out() -> None:
    assert without_credentials("https://me:word@example.org/a@b.git") == "https://example.org/a@b.git"


@pytest.mark.parametrize(
    ("path", "content", "expected"),
    [
        ("a/b.py", b"", "python"),
        ("B.TSX", b"", "tsx"),
        ("tool", b"#!/usr/bin/python3.11 -u\n", "python"),
        ("tool", b"#!/bin/sh", "shell"),
        ("Makefile", b"all:\n", None),
    ],
)
def test_the_language_follows_from_the_name_or_the_first_line(path: str, content: bytes, expected: str | None) -> None:
    assert language_of(path, content) == expected


@pytest.mark.parametrize(("content", "lines"), [(b"", 0), (b"a", 1), (b"a\n", 1), (b"a\nb", 2), (b"\n\n", 2)])
def test_lines_are_counted_with_or_without_a_last_line_end(content: bytes, lines: int) -> None:
    assert count_lines(content) == lines


@pytest.mark.parametrize(
    "source",
    [b"x = \0", b"# coding: nonsense\n", b"(" * 1000, b"x = '\xff'", b"-" * 100_000 + b"1", b"\xef\xbb\xbfdef ("],
)
def test_python_that_cannot_be_parsed_says_so(source: bytes) -> None:
    with pytest.raises(NotParseable):
        python_symbols(source)


def test_python_symbols_in_branches_are_found_and_variables_of_functions_are_not() -> None:
    source = b"""
if A:
    def one(): ...
else:
    try:
        class Two: ...
    except E:
        THREE, FOUR = 3, 4
match x:
    case 1:
        FIVE: int = 5
def six():
    SEVEN = '\\d'
x = 8
"""
    kinds = [(symbol.kind, symbol.qualified_name) for symbol in python_symbols(source)]
    assert kinds == [
        ("function", "one"),
        ("class", "Two"),
        ("constant", "THREE"),
        ("constant", "FOUR"),
        ("constant", "FIVE"),
        ("function", "six"),
    ]


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        (
            "javascript",
            "const A = 1, f = () => 1; let b = 2; class K { m() {} } function* g() {}",
            ["constant A", "function f", "class K", "method K.m", "function g"],
        ),
        (
            "typescript",
            "type T = 1; enum E {A} interface I {} abstract class C { abstract m(): void } namespace N { type U = 1 }",
            ["type T", "type E", "type I", "class C", "method C.m", "type N.U"],
        ),
        ("tsx", "export const Page = () => <div/>", ["function Page"]),
        (
            "go",
            "package p\ntype S struct{}\nfunc (s S) M() {}\nfunc F() {}\nconst c = 1\n",
            ["type S", "method M", "function F", "constant c"],
        ),
        (
            "rust",
            "struct S; impl S { fn m(&self) {} } trait T { fn d(); } fn f() {} mod n { fn g() {} } const C: u8 = 1;",
            ["class S", "method S.m", "type T", "method T.d", "function f", "function n.g", "constant C"],
        ),
        (
            "java",
            "class A { static final int X = 1; A() {} void m() {} enum E {Q} }",
            ["class A", "constant A.X", "method A.A", "method A.m", "type A.E"],
        ),
        (
            "c",
            "#define N 1\nstruct s { int a; };\nstatic char *f(int a) { return 0; }\nstruct s v;\n",
            ["constant N", "type s", "function f"],
        ),
        ("shell", "f() { :; }\nfunction g { :; }\nreadonly X=1\ny=2\n", ["function f", "function g", "constant X"]),
    ],
)
def test_other_languages_have_symbols_too(language: str, text: str, expected: list[str]) -> None:
    assert [f"{kind} {name}" for kind, name in found(language, text)] == expected


def test_without_its_package_a_language_has_no_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_grammar("go")
    grammars._grammar.cache_clear()
    monkeypatch.setitem(sys.modules, "tree_sitter_go", None)
    try:
        assert not has_grammar("go")
        assert has_grammar("rust")
    finally:
        grammars._grammar.cache_clear()
    assert not has_grammar("cobol")
