"""The configuration of TorchServe and its workers, and the number of workers and threads by machine."""

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from server import devices, ports
from server.arguments import parse
from server.configuration import (
    Listeners,
    count_workers,
    default_workers,
    private_directory,
    worker_environment,
    write_configuration,
)
from server.failures import Failure, UsageFailure
from server.models import find_archives
from tests.server.harness import write_archive

LISTENERS = Listeners("127.0.0.1", 8080, 7070, 8082, 8083, 7071, 9000)


@pytest.fixture
def directory(work):
    with private_directory(work, None) as made:
        yield made


def written(directory, store, *options):
    settings = parse(["--model-store", str(store), *options])
    text = write_configuration(directory, settings, LISTENERS, find_archives(store).archives, 0, 1).read_text()
    return dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))


def test_the_configuration_closes_every_door_but_the_public_ones(directory, tmp_path):
    write_archive(tmp_path / "store", "cifar")
    values = written(directory, tmp_path / "store")
    assert values["management_address"] == f"unix://{directory.management_socket}"
    assert values["grpc_management_address"] == "127.0.0.1"
    assert (
        values["enable_model_api"]
        == values["ts_open_inference_protocol"]
        == values["install_py_dep_per_model"]
        == "false"
    )
    assert values["disable_token_authorization"] == values["disable_system_metrics"] == "true"
    assert values["metrics_mode"] == "prometheus"
    assert values["load_models"] == "cifar.mar"
    assert (values["max_request_size"], values["max_response_size"]) == ("67108864", "268435456")
    assert "http" not in values["allowed_urls"]


def test_a_path_beyond_ascii_is_written_as_java_reads_it(directory, tmp_path):
    store = tmp_path / "größe🐍"
    write_archive(store, "cifar")
    assert r"gr\u00f6\u00dfe\ud83d\udc0d" in written(directory, store)["allowed_urls"]


def test_the_private_directory_is_for_this_user_alone_and_is_gone_afterwards(work):
    with private_directory(work, None) as directory:
        assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
        directory.models_log.write_text("words")
        kept = directory.keep_logs()
    assert not directory.path.exists()
    assert kept is not None
    assert (kept / "models.log").read_text() == "words"


def test_a_log_folder_of_ones_own_stays_where_it_is(work):
    with private_directory(work / "work", work / "logs") as directory:
        directory.models_log.write_text("words")
        assert directory.keep_logs() == work / "logs"
    assert (work / "logs" / "models.log").exists()


@pytest.mark.parametrize("where", ["file/logs", "file"])
def test_a_log_folder_that_cannot_be_made_leaves_nothing_behind(where, work):
    (work / "file").touch()
    with (
        pytest.raises(Failure, match=r"cannot write to .*/file"),
        private_directory(work / "work", work / where),
    ):
        pass
    assert not list((work / "work").iterdir())


def test_a_log_folder_that_cannot_be_written_to_is_told(work):
    with (
        pytest.raises(Failure, match=r"cannot write to /proc/\d+/java\.log"),
        private_directory(work, Path("/proc/self")),
    ):
        pass
    assert not list(work.iterdir())


def test_a_work_folder_too_deep_for_a_socket_is_refused(tmp_path):
    deep = tmp_path / ("d" * 100)
    with (
        pytest.raises(Failure, match=r"too long for a socket: choose a shorter one with --work-dir"),
        private_directory(deep, None),
    ):
        pass
    assert not list(deep.iterdir())


def test_a_work_folder_from_which_nothing_may_run_is_refused(work, monkeypatch):
    mounted = os.statvfs(work)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=mounted.f_flag | os.ST_NOEXEC))
    with (
        pytest.raises(Failure, match=r"\(mounted noexec\).*or choose another with --work-dir"),
        private_directory(work, None),
    ):
        pass
    assert not list(work.iterdir())


def test_the_workers_environment_is_ours_and_free_of_what_would_redirect_them(directory):
    settings = parse(["--max-reply-mb", "2", "--device", "cpu"])
    inherited = {"PYTHONPATH": "/evil", "TS_CONFIG_FILE": "/evil", "HOME": "/home/me", "CUDA_VISIBLE_DEVICES": "0"}
    environment = worker_environment(directory, settings, workers=2, cores=8, environment=inherited)
    assert not {"PYTHONPATH", "TS_CONFIG_FILE"} & set(environment)
    assert environment["HOME"] == "/home/me"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["CONVSCOPE_MAX_RESPONSE_BYTES"] == str(2 * 1024 * 1024)
    assert environment["CONVSCOPE_DRAIN_FILE"] == str(directory.drain_file)
    assert environment["CONVSCOPE_ENGINE"] == "auto"
    assert environment["CONVSCOPE_PRECISION"] == "float32"


def test_the_workers_are_told_the_engine_and_the_precision_asked_for(directory):
    settings = parse(["--engine", "torch", "--precision", "bfloat16"])
    environment = worker_environment(directory, settings, workers=1, cores=1, environment={})
    told = [environment[f"CONVSCOPE_{what}"] for what in ("ENGINE", "PRECISION")]
    assert told == ["torch", "bfloat16"]


def test_the_workers_are_told_whether_they_may_be_patched(directory):
    for options, told in (([], "1"), (["--no-patches"], "0")):
        environment = worker_environment(directory, parse(options), workers=1, cores=1, environment={})
        assert environment["CONVSCOPE_PATCHES"] == told


def test_the_workers_are_told_whether_to_scale_what_they_decode(directory):
    for options, told in (([], "0"), (["--scaled-decoding"], "1")):
        environment = worker_environment(directory, parse(options), workers=1, cores=1, environment={})
        assert environment["CONVSCOPE_SCALED_DECODING"] == told


def test_workers_keep_what_a_request_frees_unless_the_user_has_settings_of_malloc(directory):
    environment = {"MALLOC_TRIM_THRESHOLD_": "1"}
    result = worker_environment(directory, parse([]), workers=1, cores=1, environment=environment)
    assert result["MALLOC_TRIM_THRESHOLD_"] == "1"
    assert result["MALLOC_MMAP_THRESHOLD_"] == str(256 * 2**20)


def test_thread_counts_of_the_users_own_are_kept_and_there_is_always_one(directory):
    environment = worker_environment(directory, parse([]), workers=4, cores=2, environment={"OMP_NUM_THREADS": "3"})
    assert (environment["OMP_NUM_THREADS"], environment["CONVSCOPE_THREADS"]) == ("3", "1")
    assert "CUDA_VISIBLE_DEVICES" not in environment


@pytest.mark.parametrize(("workers", "cores", "threads"), [(1, 1, 1), (1, 2, 2), (2, 2, 2), (6, 2, 1), (4, 8, 4)])
def test_a_pass_gets_twice_its_share_of_the_cores(directory, workers, cores, threads):
    environment = worker_environment(directory, parse([]), workers=workers, cores=cores, environment={})
    assert environment["CONVSCOPE_THREADS"] == environment["OMP_NUM_THREADS"] == str(threads)


@pytest.mark.parametrize(
    ("models", "gpus", "cores", "workers"),
    [(1, 0, 1, 1), (1, 0, 2, 2), (1, 0, 64, 4), (2, 0, 4, 2), (6, 0, 2, 1), (1, 8, 2, 8), (0, 0, 2, 2)],
)
def test_a_model_gets_a_worker_per_gpu_or_its_share_of_one_per_core(models, gpus, cores, workers):
    assert default_workers(models, gpus, cores) == workers


def test_the_command_line_decides_on_workers_before_the_archive_and_the_archive_before_the_default(tmp_path):
    write_archive(tmp_path, "three", config="minWorkers: 3\n")
    write_archive(tmp_path, "unsaid")
    three, unsaid = find_archives(tmp_path).archives
    assert count_workers(three, parse(["--workers", "2"]), 4) == 2
    assert count_workers(three, parse([]), 4) == 3
    assert count_workers(unsaid, parse([]), 4) == 4


def test_a_containers_quota_bounds_the_cores(tmp_path):
    quota = tmp_path / "cpu.max"
    quota.write_text("50000 100000\n")
    assert devices.count_cores(quota) == 1
    quota.write_text("max 100000\n")
    assert devices.count_cores(quota) == devices.count_cores(tmp_path / "nothing") >= 1


def fake_nvidia_smi(folder: Path, says: str, monkeypatch) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_cuda_without_a_gpu_is_refused_rather_than_served_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Failure, match=r"--device cuda, but there is no GPU .*or use --device cpu"):
        devices.count_gpus("cuda", {})
    fake_nvidia_smi(tmp_path, "exit 9", monkeypatch)
    with pytest.raises(Failure, match="nvidia-smi finds none"):
        devices.count_gpus("cuda", {})
    assert devices.count_gpus("auto", {}) == 0


def test_the_gpus_are_asked_for_once(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, f"echo asked >> {tmp_path}/asked; echo 0", monkeypatch)
    with pytest.raises(Failure, match="CUDA_VISIBLE_DEVICES hides them all"):
        devices.count_gpus("cuda", {"CUDA_VISIBLE_DEVICES": ""})
    assert (tmp_path / "asked").read_text() == "asked\n"


def test_gpus_are_counted_as_far_as_they_are_visible(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, "printf '0\\n1\\n2\\n'", monkeypatch)
    assert devices.count_gpus("auto", {}) == 3
    assert devices.count_gpus("cuda", {"CUDA_VISIBLE_DEVICES": "1,2"}) == 2
    assert devices.count_gpus("cpu", {}) == 0
    with pytest.raises(Failure, match="CUDA_VISIBLE_DEVICES hides them all"):
        devices.count_gpus("cuda", {"CUDA_VISIBLE_DEVICES": ""})
    with pytest.raises(Failure, match="TorchServe reads plain numbers only"):
        devices.count_gpus("auto", {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"})


def test_a_host_that_is_no_address_is_refused():
    assert ports.resolve_host("127.0.0.1") == "127.0.0.1"
    with pytest.raises(UsageFailure, match=r"--host not an address is no IPv4 address"):
        ports.resolve_host("not an address")
    with pytest.raises(UsageFailure, match=r"192\.0\.2\.1 is not an address of this machine"):
        ports.claim_port("192.0.2.1", 0, "--rest-port")
