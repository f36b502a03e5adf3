"""Memory and disk, read from folders made like the kernel's own."""

from __future__ import annotations

from pathlib import Path

from server.host import Disk, Memory, describe_host, read_disk, read_memory

STAT_2 = "anon 700\nfile 300\ninactive_file 200\n"
STAT_1 = "cache 300\ntotal_inactive_file 200\n"


def group(folder: Path, **files: str) -> Path:
    """Make a control group; `_` in a name stands for `.`, `__` for `_`."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", "-").replace("_", ".", 1).replace("-", "_")).write_text(text)
    return folder


def own(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "own"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_version_2_without_the_cache_that_can_be_dropped(tmp_path: Path) -> None:
    events = "low 0\noom 1\noom_kill 3\n"
    group(tmp_path / "cg/a/b", memory_current="1000\n", memory_max="5000\n", memory_stat=STAT_2, memory_events=events)
    assert read_memory(tmp_path / "cg", own(tmp_path, "0::/a/b")) == Memory(800, 5000, 3)


def test_version_2_without_a_limit_as_a_container_sees_it(tmp_path: Path) -> None:
    group(
        tmp_path / "cg", memory_current="1000\n", memory_max="max\n", memory_stat=STAT_2, memory_events="oom_kill 0\n"
    )
    assert read_memory(tmp_path / "cg", own(tmp_path, "0::/docker/of-the-host")) == Memory(800, None, 0)


def test_version_1_of_the_group_or_of_what_a_container_has_mounted(tmp_path: Path) -> None:
    files = {
        "memory_usage__in__bytes": "1000\n",
        "memory_limit__in__bytes": "9223372036854771712\n",
        "memory_stat": STAT_1,
        "memory_oom__control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
    }
    group(tmp_path / "cg/memory", **files)
    group(tmp_path / "cg/memory/x", **{**files, "memory_limit__in__bytes": "4096\n"})
    assert read_memory(tmp_path / "cg", own(tmp_path, "4:memory:/x", "0::/")) == Memory(800, 4096, 2)
    assert read_memory(tmp_path / "cg", own(tmp_path, "4:memory:/gone", "0::/")) == Memory(800, None, 2)


def test_where_the_kernel_says_nothing_nothing_is_known(tmp_path: Path) -> None:
    assert read_memory(tmp_path / "none", own(tmp_path, "0::/")) == Memory()
    assert read_memory(tmp_path, tmp_path / "none") == Memory()
    assert read_disk(tmp_path / "none") is None


def test_the_words_for_a_line_of_the_log(tmp_path: Path) -> None:
    disk = read_disk(tmp_path)
    assert isinstance(disk, Disk)
    said = describe_host(tmp_path, Memory(300 << 20, 1 << 30, 0))
    assert said.startswith("memory used 300 MiB of 1024 MiB, free in ")
    assert f"of {disk.size >> 20} MiB" in said
    assert describe_host(tmp_path, Memory(300 << 20)).startswith("memory used 300 MiB of no limit, ")
    assert describe_host(tmp_path, Memory()).startswith("free in ")
