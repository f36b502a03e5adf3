"""Merging the files of real worker processes: killed, restarted in the same slot, damaged."""

import io
import os
import subprocess
import sys

from server.worker_metrics import WorkerFiles, find_open_files
from tests.server.harness import ROOT
from tests.server.writers import writing

BUSY, COUNT, LOAD = "convscope_in_flight", "convscope_requests_total", "convscope_load_seconds"
BUCKET = "convscope_handler_seconds_bucket"


def read(folder) -> dict[str, float]:
    """Collect; samples by name, buckets with their bound."""
    found = {}
    for metric in WorkerFiles(folder).collect():
        for sample in metric.samples:
            assert {key: sample.labels[key] for key in ("model", "version")} == {"model": "m", "version": "1"}
            name = sample.name + (f" {sample.labels['le']}" if "le" in sample.labels else "")
            assert name not in found, "a series twice"
            found[name] = sample.value
    return found


def test_the_metrics_of_several_workers_are_added_up(tmp_path):
    with writing(tmp_path, "9000") as one, writing(tmp_path, "9001", load_s=3) as two:
        one.tell("count 2")
        two.tell("count 3")
        one.tell("busy 1")
        two.tell("busy 1")
        one.tell("observe 0.05")
        two.tell("observe 0.5")
        found = read(tmp_path)
    assert (found[COUNT], found[BUSY], found[LOAD]) == (5, 2, 3)
    assert [found[f"{BUCKET} {bound}"] for bound in ("0.1", "1.0", "+Inf")] == [1, 2, 2]
    assert found["convscope_handler_seconds_count"] == 2


def test_what_a_killed_worker_was_at_is_not_shown_and_what_it_counted_is(tmp_path):
    with writing(tmp_path, "9000") as one, writing(tmp_path, "9001") as two:
        one.tell("count 2")
        one.tell("busy 5")
        two.tell("busy 1")
        assert read(tmp_path)[BUSY] == 6
        one.kill()
        found = read(tmp_path)
        assert (found[BUSY], found[COUNT]) == (1, 2)
        two.kill()
        found = read(tmp_path)
        assert BUSY not in found
        assert LOAD not in found
        assert found[COUNT] == 2


def test_a_successor_in_the_same_slot_goes_on_counting_and_starts_idle(tmp_path):
    counts = []
    for life in range(3):
        with writing(tmp_path, "9000", load_s=life) as worker:
            found = read(tmp_path)
            assert (found[BUSY], found[LOAD]) == (0, life)
            worker.tell("count 1")
            worker.tell("observe 0.5")
            worker.tell("busy 1")
            counts.append(read(tmp_path)[COUNT])
            assert read(tmp_path)["convscope_handler_seconds_count"] == life + 1
    assert counts == [1, 2, 3]
    assert len(list(tmp_path.iterdir())) == 4, "a file for each kind of metric, none for each life"


def test_a_file_that_is_being_made_or_damaged_is_left_out_and_told_once(tmp_path, capsys):
    with writing(tmp_path, "9000") as worker:
        worker.tell("count 2")
        (tmp_path / "counter_9001.db").touch()
        (tmp_path / "histogram_9002.db").write_bytes(b"\xff\xff\xff\x7f" + b"nonsense" * 10)
        (tmp_path / "counter_9003.db").write_bytes((20).to_bytes(8, "little") + (9).to_bytes(4, "little") + b"x" * 40)
        files = WorkerFiles(tmp_path)
        for _ in range(2):
            (count,) = [metric for metric in files.collect() if metric.name == "convscope_requests"]
            assert count.samples[0].value == 2
    assert capsys.readouterr().err.count("cannot be read") == 1


def test_a_damaged_file_of_which_nobody_can_be_told_leaves_the_others_readable(tmp_path, monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    with writing(tmp_path, "9000") as worker:
        worker.tell("count 2")
        (tmp_path / "counter_9001.db").touch()
        assert read(tmp_path)[COUNT] == 2


def test_an_empty_or_missing_folder_has_no_metrics(tmp_path):
    assert read(tmp_path) == read(tmp_path / "nowhere") == {}


def test_merging_writes_nothing(tmp_path):
    with writing(tmp_path, "9000") as worker:
        worker.tell("count 1")
        before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
        code = (
            "import pathlib, sys, server.exporter as exporter\n"
            "print(list(exporter.WorkerFiles(pathlib.Path(sys.argv[1])).collect()))"
        )
        command = [sys.executable, "-c", code, str(tmp_path)]
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert "convscope_requests" in done.stdout
        assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_the_files_that_another_process_has_open_are_found(tmp_path):
    with writing(tmp_path, "9000"):
        assert {path.name for path in find_open_files(tmp_path)} >= {"gauge_livesum_9000.db", "gauge_max_9000.db"}
    assert find_open_files(tmp_path) == set()
