"""The operator's commands on a machine without Docker: keys, certificates, what is refused, and what is left behind."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from deploy.commands.__main__ import main
from deploy.commands.common import read_settings
from deploy.commands.gateway import judge

ROOT = Path(__file__).parents[2]

Run = Callable[..., subprocess.CompletedProcess[str]]


def build_run(folder: Path) -> Run:
    """Return a function that runs a command on `secrets` in a folder, with openssl and without Docker on its path."""
    programs = folder / "programs"
    programs.mkdir()
    (programs / "openssl").symlink_to(shutil.which("openssl") or "")

    def run(*arguments: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(programs), "USER": "ada", "LOGNAME": "ada"} | settings
        words = [str(word) for word in ("--secrets", folder / "secrets", *arguments)]
        said = io.StringIO()
        with patch.dict(os.environ, environment, clear=True), redirect_stdout(said), redirect_stderr(said):
            return subprocess.CompletedProcess(words, main(words), said.getvalue())

    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of secrets once."""
    folder = tmp_path_factory.mktemp("made")
    assert build_run(folder)("secrets").returncode == 0
    return folder / "secrets"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Run:
    """Return a function that runs a command on a copy of the folder of secrets."""
    shutil.copytree(made, tmp_path / "secrets", symlinks=True)
    return build_run(tmp_path)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def read_keys(folder: Path) -> dict[str, str]:
    [resource] = yaml.safe_load((folder / "api-keys/keys.yaml").read_text())["resources"]
    return {one["client"]: one["key"] for one in resource["typed_config"]["credentials"]}


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


class Authority:
    """A root, an intermediate, and what they sign, all as files in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "ca.ext").write_text("basicConstraints=critical,CA:TRUE\nkeyUsage=keyCertSign")
        self.root = self.sign("root", None, extensions="ca.ext")
        self.middle = self.sign("middle", "root", extensions="ca.ext")
        self.leaf = self.sign("leaf")
        self.sign("stranger")
        key, locked = folder / "leaf.key", folder / "locked.key"
        openssl("pkey", "-in", key, "-aes256", "-passout", "pass:x", "-out", locked)

    def sign(
        self,
        name: str,
        by: str | None = "middle",
        names: str = "DNS:scope.example",
        extensions: str = "",
        days: tuple[str, ...] = ("-days", "30"),
    ) -> str:
        """Make a key and a certificate; return the certificate."""
        key, request, certificate = (self.folder / f"{name}.{kind}" for kind in ("key", "csr", "crt"))
        openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key)
        openssl("req", "-new", "-key", key, "-subj", f"/CN={name}", "-out", request)
        if not extensions:
            extensions = "leaf.ext"
            (self.folder / extensions).write_text(f"subjectAltName={names}" if names else "basicConstraints=CA:FALSE")
        signer = ["-CA", self.folder / f"{by}.crt", "-CAkey", self.folder / f"{by}.key", "-CAcreateserial"]
        signer = signer if by else ["-signkey", key]
        files = ["-in", request, "-extfile", self.folder / extensions, "-out", certificate]
        openssl("x509", "-req", *days, *signer, *files)
        return certificate.read_text()

    def write(self, *parts: str) -> Path:
        """Write certificates into one file."""
        path = self.folder / "chain.pem"
        path.write_text("".join(parts))
        return path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority") / "files")


def test_secrets_are_made_once_and_then_described(tmp_path: Path) -> None:
    run = build_run(tmp_path)
    secrets = tmp_path / "secrets"
    made = run("secrets")
    assert made.returncode == 0, made.stdout
    before = {path: path.read_bytes() for path in secrets.rglob("*") if path.is_file() and path.name != "audit.log"}
    again = run("secrets")
    assert again.returncode == 0
    assert {path: path.read_bytes() for path in before} == before
    assert re.search(r"DNS:localhost.*self-signed, ends \d{4}-\d\d-\d\dT[\d:]+Z \(\d+ days left\)", again.stdout)
    assert set(read_keys(secrets)) == {"first", "probe"}
    for name, file in (("first", "api-key"), ("probe", "probe-key")):
        key = (secrets / file).read_text().strip()
        assert hashlib.sha256(key.encode()).hexdigest() == read_keys(secrets)[name]
        assert key not in made.stdout + (secrets / "audit.log").read_text()


def test_only_this_user_can_enter_and_the_containers_can_read_what_they_mount(run: Run, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    assert run("key", "alice").returncode == 0
    assert run("certificate", "--test").returncode == 0
    assert mode(secrets) == 0o700
    for file in ("certificate/tls.crt", "certificate/tls.key", "api-keys/keys.yaml", "probe-key", "grafana-password"):
        assert mode(secrets / file) == 0o644, file
    for folder in ("certificate", "certificate/current", "api-keys"):
        assert mode(secrets / folder) == 0o755, folder
    assert {mode(secrets / file) for file in ("api-key", "audit.log")} == {0o600}


def test_a_folder_from_before_gets_the_probe_s_key_and_keeps_the_rest(run: Run, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    keys = secrets / "api-keys/keys.yaml"
    old = "".join(line for line in keys.read_text().splitlines(keepends=True) if "probe" not in line)
    keys.write_text(re.sub(r"  # added .*", "", old))
    (secrets / "probe-key").write_text("of somewhere else\n")
    digest = read_keys(secrets)["first"]
    assert run("secrets").returncode == 0
    assert read_keys(secrets)["first"] == digest
    key = (secrets / "probe-key").read_text().strip()
    assert read_keys(secrets)["probe"] == hashlib.sha256(key.encode()).hexdigest()


def test_a_key_is_added_shown_once_listed_and_revoked(run: Run, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    added = run("key", "alice")
    assert added.returncode == 0, added.stdout
    [key] = re.findall(r"^[0-9a-f]{48}$", added.stdout, re.M)
    assert read_keys(secrets)["alice"] == hashlib.sha256(key.encode()).hexdigest()
    listed = run("keys").stdout
    assert re.search(r"^alice +added \d{4}-\d\d-\d\dT[\d:]+Z$", listed, re.M)
    assert not re.search(r"[0-9a-f]{32}", listed)
    assert key not in (secrets / "audit.log").read_text()
    assert run("revoke", "alice").returncode == 0
    assert set(read_keys(secrets)) == {"first", "probe"}
    assert run("key", "alice").returncode == 0


def test_the_last_key_can_be_revoked_and_another_added(run: Run, tmp_path: Path) -> None:
    assert run("revoke", "first").returncode == run("revoke", "probe").returncode == 0
    assert read_keys(tmp_path / "secrets") == {}
    assert run("keys").stdout == "nobody has a key\n"
    assert run("key", "alice").returncode == 0
    assert set(read_keys(tmp_path / "secrets")) == {"alice"}


def test_a_key_goes_into_a_file_that_others_cannot_read(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "alice.key"
    said = run("key", "alice", "--output", file).stdout
    assert file.read_text().strip() not in said
    assert mode(file) == 0o600
    assert run("key", "bob", "--output", file).returncode == 1
    assert run("key", "bob", "--output", tmp_path / "missing/bob.key").returncode == 1
    assert "bob" not in read_keys(tmp_path / "secrets")


@pytest.mark.parametrize(
    "name", ["", "a b", "a,b", "ä", "-a", "{a}", "a\nb", "a: b", "none", "a" * 64, "123", "yes", "Null"]
)
def test_a_name_that_will_not_do_is_refused(run: Run, tmp_path: Path, name: str) -> None:
    before = (tmp_path / "secrets/api-keys/keys.yaml").read_text()
    refused = run("key", "--", name)
    assert refused.returncode == 1
    assert "is no valid name" in refused.stdout
    assert (tmp_path / "secrets/api-keys/keys.yaml").read_text() == before


def test_a_name_that_is_taken_and_one_that_is_not_there_are_refused(run: Run) -> None:
    assert "there is a key of first already" in run("key", "first").stdout
    assert "there is no key of 'alice'; there are first, probe" in run("revoke", "alice").stdout


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("credentials:", "credentails:", "no `credentials:`"),
        ("{client: first", "{cleint: first", "line 11, is not"),
        ("{client: first", "{client: probe", "a name twice"),
        ("key_sources", "key_soruces", "changed by hand"),
    ],
)
def test_what_was_written_by_hand_and_is_wrong_is_not_built_upon(
    run: Run, tmp_path: Path, old: str, new: str, why: str
) -> None:
    keys = tmp_path / "secrets/api-keys/keys.yaml"
    keys.write_text(keys.read_text().replace(old, new))
    before = keys.read_text()
    refused = run("key", "alice")
    assert refused.returncode == 1
    assert why in refused.stdout
    assert keys.read_text() == before


def test_who_did_what_and_when_is_written_down(run: Run, tmp_path: Path) -> None:
    said = run("key", "alice", SUDO_USER="grace").stdout
    assert run("revoke", "alice").returncode == 0
    assert run("certificate", "--test").returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "secrets/audit.log").read_text().splitlines()]
    assert [(line["what"], line.get("name")) for line in lines] == [
        ("test certificate made", None),
        ("key added", "first"),
        ("key added", "probe"),
        ("key added", "alice"),
        ("key revoked", "alice"),
        ("test certificate made", None),
    ]
    assert {line["user"] for line in lines} == {"ada", "grace"}
    [shown] = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert shown == lines[3]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"]) for line in lines)
    assert re.fullmatch(r"[0-9a-f]{64}", lines[-1]["fingerprint"])
    assert lines[-1]["ends"] > lines[-1]["time"]


def test_a_certificate_of_an_authority_is_put_in_place(run: Run, tmp_path: Path, authority: Authority) -> None:
    chain = authority.write(authority.leaf, authority.middle, authority.root)
    key = authority.folder / "leaf.key"
    key.chmod(0o600)
    done = run("certificate", "--cert", chain, "--key", key, CONVSCOPE_HOSTNAME="scope.example")
    assert done.returncode == 0, done.stdout
    place = tmp_path / "secrets/certificate"
    assert (place / "tls.crt").read_text() == chain.read_text()
    assert (place / "tls.key").read_text() == key.read_text()
    assert mode(place / "tls.key") == 0o644
    assert len(list(place.glob("pair-*"))) == 1


def test_files_put_there_by_hand_are_replaced_too(run: Run, tmp_path: Path) -> None:
    place = tmp_path / "secrets/certificate"
    for name in ("tls.crt", "tls.key"):
        content = (place / name).read_text()
        (place / name).unlink()
        (place / name).write_text(content)
        (place / name).chmod(0o600)
    old = (place / "tls.crt").read_text()
    assert run("certificate", "--test").returncode == 0
    assert (place / "tls.crt").read_text() != old
    assert mode(place / "tls.key") == 0o644
    assert sorted(path.name for path in place.iterdir() if not path.name.startswith("pair-")) == [
        "current",
        "tls.crt",
        "tls.key",
    ]


def test_links_to_files_elsewhere_are_replaced_too(run: Run, tmp_path: Path) -> None:
    place = tmp_path / "secrets/certificate"
    for name, elsewhere in (("tls.crt", "fullchain.pem"), ("tls.key", "privkey.pem")):
        (place / elsewhere).write_text((place / name).read_text())
        (place / name).unlink()
        (place / name).symlink_to(elsewhere)
    old = [(place / name).read_text() for name in ("tls.crt", "tls.key")]
    assert run("certificate", "--test").returncode == 0
    assert not set(old) & {(place / name).read_text() for name in ("tls.crt", "tls.key")}
    assert [(place / name).read_text() for name in ("fullchain.pem", "privkey.pem")] == old


@pytest.mark.parametrize("number", ["0", "-1", "two", "1000"])
def test_a_number_of_replicas_that_cannot_be_is_refused(run: Run, number: str) -> None:
    refused = run("update", CONVSCOPE_REPLICAS=number)
    assert refused.returncode == 1
    assert "CONVSCOPE_REPLICAS must be a number from 1 to 999" in refused.stdout


def test_the_commands_are_run_as_a_module_which_returns_their_status(tmp_path: Path) -> None:
    command = ["python3", "-m", "deploy.commands", "--secrets", tmp_path / "secrets", "revoke", "alice"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr
    assert not refused.stdout


def test_make_takes_names_from_its_command_line_alone_and_runs_nothing_in_them(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    shown = tmp_path / "bin/python3"
    shown.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    shown.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    evil = f"a$(shell touch {tmp_path}/made)`touch {tmp_path}/made`$b"

    def make(*words: str, **environment: str) -> str:
        command = ["make", "--no-print-directory", *words]
        own = os.environ | {"PATH": path, "MAKEFLAGS": ""} | environment  # Not what `make test` was called with.
        return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=True).stdout

    assert make("key", f"NAME={evil}") == f"<-m><deploy.commands><key><--><{evil}>"
    assert make("key", NAME="alice", OUT="file") == "<-m><deploy.commands><key><--><>"
    assert make("certificate", "CERT=a b", KEY="an API key") == "<-m><deploy.commands><certificate><--cert><a b>"
    assert not (tmp_path / "made").exists()


def certificate_cases() -> list[object]:
    good = ("leaf", "middle", "root")
    other = "KEY does not belong to the certificate"
    return [
        pytest.param(good, "leaf.key", "other.example", "does not cover other.example", id="another name"),
        pytest.param(good, "leaf.key", "10.0.0.1", "does not cover 10.0.0.1", id="an address"),
        pytest.param(
            good, "root.key", "scope.example", "KEY belongs to certificate 3 of CERT", id="the key of the root"
        ),
        pytest.param(good, "stranger.key", "scope.example", other, id="another key"),
        pytest.param(good, "leaf.crt", "scope.example", "KEY is no private key", id="no key"),
        pytest.param(good, "locked.key", "scope.example", "encrypted with a passphrase", id="a locked key"),
        pytest.param(good, "nowhere.key", "scope.example", "cannot be read: No such file", id="no file"),
        pytest.param(
            ("leaf", "root", "middle"), "leaf.key", "scope.example", "not signed by the one after", id="order"
        ),
        pytest.param(("middle", "leaf"), "leaf.key", "scope.example", "KEY belongs to certificate 2", id="leaf last"),
        pytest.param(("ended",), "ended.key", "scope.example", "(CN=ended) ended 2", id="ended"),
        pytest.param(("nameless",), "nameless.key", "nameless", "no subjectAltName", id="a common name alone"),
        pytest.param((), "leaf.key", "scope.example", "holds no certificate", id="empty"),
        pytest.param(("garbled",), "leaf.key", "scope.example", "certificate 1 of CERT cannot be read", id="garbled"),
    ]


@pytest.mark.parametrize(("parts", "key", "hostname", "why"), certificate_cases())
def test_a_certificate_that_would_not_serve_is_refused(
    run: Run, tmp_path: Path, authority: Authority, parts: tuple[str, ...], key: str, hostname: str, why: str
) -> None:
    place = tmp_path / "secrets/certificate"
    before = ((place / "current").readlink(), (place / "tls.crt").read_text(), (place / "tls.key").read_text())
    files = {"middle": authority.middle, "root": authority.root, "leaf": authority.leaf}
    files["garbled"] = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
    if "ended" in parts:
        files["ended"] = authority.sign("ended", days=("-days", "-1"))
    if "nameless" in parts:
        files["nameless"] = authority.sign("nameless", names="")
    chain = authority.write(*(files[part] for part in parts))
    refused = run("certificate", "--cert", chain, "--key", authority.folder / key, CONVSCOPE_HOSTNAME=hostname)
    assert refused.returncode == 1
    assert why in refused.stdout
    after = ((place / "current").readlink(), (place / "tls.crt").read_text(), (place / "tls.key").read_text())
    assert after == before


def test_a_test_certificate_is_made_only_where_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    before = (tmp_path / "secrets/certificate/tls.crt").read_text()
    refused = run("certificate")
    assert refused.returncode == 1
    assert "days left" in refused.stdout  # It says what there is.
    assert (tmp_path / "secrets/certificate/tls.crt").read_text() == before
    made = run("certificate", "--test", CONVSCOPE_HOSTNAME="10.1.2.3")
    assert made.returncode == 0
    assert "IP Address:10.1.2.3" in made.stdout


def test_settings_are_read_as_compose_reads_them(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text(
        "# A comment\nCONVSCOPE_REPLICAS=3\n CONVSCOPE_PORT = 8443\n"
        "CONVSCOPE_STORE='/a # b'  # c\nexport CONVSCOPE_DOOR=\"tls\"\n"
        "CONVSCOPE_MODELS=a,b # c\nCONVSCOPE_CPUS=\n#CONVSCOPE_HOSTNAME=x\n"
    )
    assert read_settings(file) == {
        "CONVSCOPE_REPLICAS": "3",
        "CONVSCOPE_PORT": "8443",
        "CONVSCOPE_STORE": "/a # b",
        "CONVSCOPE_DOOR": "tls",
        "CONVSCOPE_MODELS": "a,b",
        "CONVSCOPE_CPUS": "",
    }
    assert read_settings(tmp_path / "nothing") == {}


TAKEN = """=== statistics
cluster_manager.cds.update_attempt: 1
cluster_manager.cds.update_failure: 0
cluster_manager.cds.update_rejected: 0
cluster_manager.cds.update_success: 1
cluster.rest.update_attempt: 2
cluster.rest.update_failure: 2
listener_manager.total_listeners_warming: 0
public::0.0.0.0:8443
"""


def test_a_trial_of_the_gateway_is_judged_by_each_file() -> None:
    assert judge(TAKEN) == []
    assert judge("[critical][main] no such field\n")[0] == "Envoy did not start"
    refused = "[2026][7][warning][config] [x.cc:81] no such field: 'cleint'\n" + TAKEN.replace(
        "rejected: 0", "rejected: 1"
    )
    assert judge(refused) == ["clusters.yaml is rejected", "no such field: 'cleint'"]
    assert judge(TAKEN.replace("cds.update_success: 1", "cds.update_success: 0")) == ["clusters.yaml is rejected"]
    assert judge(TAKEN.replace("public::", "other::")) == ["the listener for callers does not start"]
    # A certificate is taken in though the keys are wrong, and the other way round.
    both = refused + "sds.certificate.update_attempt: 1\nsds.certificate.update_success: 1\n"
    assert judge(both) != []
    assert judge(both, "sds.certificate") == []
    assert judge(both, "cluster_manager.cds") == judge(refused)
    assert judge(both, "not.even.asked") == judge(refused)
    as_json = '{"level":"warning","message":"no such field: \'cleint\'"}\n'
    assert judge(as_json + TAKEN.replace("rejected: 0", "rejected: 1"))[-1] == "no such field: 'cleint'"


def test_the_commands_need_no_package_and_run_on_python_3_9() -> None:
    for path in (ROOT / "deploy/commands").glob("*.py"):
        tree = ast.parse(path.read_text(), feature_version=(3, 9))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in sys.stdlib_module_names or name.startswith("deploy.commands"), (path, name)
