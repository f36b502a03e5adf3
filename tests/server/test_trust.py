"""Archives that were damaged, changed or signed by somebody else are detected before they are used."""

from __future__ import annotations

import base64
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from archiver.packing import ArchiveError
from archiver.store import sign
from server.failures import Failure, UsageFailure
from server.models import copy_checked, describe_trust, find_archives, read_archive
from server.trust import DIGESTS, NAMESPACE, read_keys
from tests.reloading import reload
from tests.server.harness import ROOT, launched, list_digests, write_archive, write_members

MANIFEST = ("MAR-INF/MANIFEST.json", '{"model": {"modelName": "own", "handler": "entry.py"}}')
ENTRY = ("entry.py", "one = 1\n")
LISTED = (DIGESTS, list_digests(dict([MANIFEST, ENTRY])))

needs_openssh = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen (OpenSSH's client)")


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


# ---------------------------------------------------------------- the list of digests


def test_an_archive_with_a_list_and_one_of_before_are_read_and_told_apart(tmp_path: Path) -> None:
    store = tmp_path / "store"
    write_members(store / "today.mar", [MANIFEST, ENTRY, LISTED])
    write_members(store / "before.mar", [(MANIFEST[0], MANIFEST[1].replace("own", "old")), ENTRY])
    archives = find_archives(store).archives
    assert {archive.path.stem: archive.has_digests for archive in archives} == {"today": True, "before": False}
    [said] = describe_trust(archives, None)
    assert said.startswith("no list of digests is in before.mar, made by an older archiver")
    assert describe_trust([archive for archive in archives if archive.has_digests], None) == []


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([MANIFEST, ("entry.py", "one = 2\n"), LISTED], "its member 'entry.py' has another SHA-256 digest than its"),
        ([MANIFEST, ENTRY, ("numpy.py", ""), LISTED], "its member 'numpy.py' is not in its MAR-INF/SHA256SUMS"),
        ([MANIFEST, LISTED], "its MAR-INF/SHA256SUMS lists 'entry.py', which is missing"),
        ([MANIFEST, ENTRY, ENTRY, LISTED], "it holds 'entry.py' twice"),
        ([MANIFEST, ENTRY, LISTED, LISTED], "it holds 'MAR-INF/SHA256SUMS' twice"),
        (
            [MANIFEST, ENTRY, (DIGESTS, LISTED[1] + "no digest\n")],
            "is not as sha256sum writes it, with every name once",
        ),
        ([MANIFEST, ENTRY, (DIGESTS, 2 * LISTED[1])], "is not as sha256sum writes it, with every name once"),
        ([MANIFEST, ENTRY, ("../up.py", "")], "its member '../up.py' is no plain file with a name inside the archive"),
        ([MANIFEST, ENTRY, ("/etc/up.py", "")], "its member '/etc/up.py' is no plain file"),
        ([MANIFEST, ENTRY, ("a/./up.py", "")], "its member 'a/./up.py' is no plain file"),
        ([MANIFEST, ENTRY, ("..\\up.py", "")], r"its member '..\\up.py' is no plain file"),
        ([MANIFEST, ENTRY, (link("more.py"), "/etc/passwd")], "its member 'more.py' is no plain file"),
    ],
)
def test_an_archive_that_is_not_what_its_list_says_is_refused_by_name(
    members: list[tuple[str | zipfile.ZipInfo, str]], words: str, tmp_path: Path
) -> None:
    path = write_members(tmp_path / "own.mar", members)
    with pytest.raises(Failure) as failure:
        read_archive(path)
    assert str(failure.value).startswith("archive own.mar: ")
    assert words in str(failure.value)


def test_an_archive_that_unpacks_to_far_more_than_its_size_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.mar"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(*MANIFEST)
        archive.writestr("zeros", "0" * 1_000_000)
    content = path.read_bytes()
    at = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 1)  # The directory's entry of `zeros`.
    path.write_bytes(content[: at + 24] + (2**31).to_bytes(4, "little") + content[at + 28 :])  # Its declared size.
    with pytest.raises(
        Failure, match=r"bomb\.mar: it would unpack to 2,147,483,\d+ bytes, more than 100 times its size"
    ):
        read_archive(path)


def test_a_launcher_starts_nothing_of_an_archive_that_was_changed(tmp_path: Path, work: Path) -> None:
    """Whoever imports the handler is too late: it would have run."""
    handler = f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
    write_members(tmp_path / "store/own.mar", [MANIFEST, ("entry.py", handler), LISTED])
    with launched(tmp_path / "store", work) as server:
        assert server.end() == 1
        assert "archive own.mar: its member 'entry.py' has another SHA-256 digest" in server.err
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- the signature


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return make_key(tmp_path / "key")


def make_key(path: Path, kind: str = "ed25519") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "builder", "-f", path], check=True)
    return path


def public(key: Path) -> Path:
    return key.with_name(f"{key.name}.pub")


def openssh_signs(path: Path, key: Path, namespace: str = "convscope", *options: str) -> None:
    path.with_name(f"{path.name}.sig").unlink(missing_ok=True)
    command = ["ssh-keygen", "-Y", "sign", "-n", namespace, "-f", key, *options, path]
    subprocess.run(command, check=True, capture_output=True)


@needs_openssh
@pytest.mark.parametrize("options", [(), ("-O", "hashalg=sha256")], ids=["sha512", "sha256"])
def test_what_openssh_signs_is_taken(options: tuple[str, ...], key: Path, tmp_path: Path) -> None:
    path = write_archive(tmp_path, "own")
    openssh_signs(path, key, "convscope", *options)
    assert read_archive(path, read_keys(public(key))).name == "own"


@needs_openssh
def test_what_the_archiver_signs_openssh_verifies_and_the_server_takes(key: Path, tmp_path: Path) -> None:
    path = write_archive(tmp_path, "own")
    beside = sign(path, key)
    assert beside.name == "own.mar.sig"
    signers = tmp_path / "allowed_signers"
    signers.write_text(f"# who may sign\n\nbuilder@example.com {public(key).read_text()}")
    command = ["ssh-keygen", "-Y", "verify", "-f", signers, "-I", "builder@example.com", "-n", NAMESPACE, "-s", beside]
    for content, status in ((path.read_bytes(), 0), (path.read_bytes() + b"0", 255)):
        done = subprocess.run(command, input=content, capture_output=True, check=False)
        assert done.returncode == status, done.stderr
    assert read_archive(path, read_keys(signers)).has_digests


@needs_openssh
def test_either_of_two_keys_may_have_signed(key: Path, tmp_path: Path) -> None:
    keys = [key, make_key(tmp_path / "next")]
    signers = tmp_path / "signers"
    signers.write_text("".join(public(one).read_text() for one in keys))
    path = write_archive(tmp_path, "own")
    for one in keys:
        sign(path, one)
        read_archive(path, read_keys(signers))
    signers.write_text(public(key).read_text())  # The other one is taken away.
    with pytest.raises(Failure, match=r"signed by the key SHA256:\S{43}, which is not among those of --require-sig"):
        read_archive(path, read_keys(signers))
    shown = subprocess.run(["ssh-keygen", "-l", "-f", public(keys[1])], capture_output=True, text=True, check=True)
    with pytest.raises(Failure, match=shown.stdout.split()[1].replace("+", r"\+")):
        read_archive(path, read_keys(signers))


@needs_openssh
def test_a_signature_is_refused_unless_it_is_of_these_bytes_and_for_this_purpose(key: Path, tmp_path: Path) -> None:
    path, keys = write_archive(tmp_path, "own"), read_keys(public(key))
    beside = tmp_path / "own.mar.sig"
    with pytest.raises(Failure, match=r"own\.mar: it is not signed: --require-signature asks .* own\.mar\.sig"):
        read_archive(path, keys)
    openssh_signs(path, key, "git")
    with pytest.raises(Failure, match=r"its namespace is 'git'.*ssh-keygen -Y sign -n convscope -f KEY own\.mar"):
        read_archive(path, keys)
    openssh_signs(path, make_key(tmp_path / "rsa", "rsa"))
    with pytest.raises(Failure, match=r"its key is of another kind"):
        read_archive(path, keys)
    with pytest.raises(ArchiveError, match="is no Ed25519 key"):
        sign(path, tmp_path / "rsa")
    openssh_signs(path, key)
    good = beside.read_bytes()
    for wrong in (
        b"",
        b"-----BEGIN SSH SIGNATURE-----",
        good[:100],
        good.replace(b"SSH", b"PGP"),
        good * 2,
        b"\xff" * 99,
    ):
        beside.write_bytes(wrong)
        with pytest.raises(Failure, match=r"own\.mar\.sig is no signature of an archive"):
            read_archive(path, keys)
    content = path.read_bytes()
    path.write_bytes(content + b"\0")  # Still a zip file: a comment that is longer than it says.
    beside.write_bytes(good)
    with pytest.raises(Failure, match=r"own\.mar: it is not what was signed"):
        read_archive(path, keys)
    path.write_bytes(content)
    assert read_archive(path, keys)


@needs_openssh
def test_a_signature_with_any_byte_wrong_is_refused(key: Path, tmp_path: Path) -> None:
    path, keys = write_archive(tmp_path, "own"), read_keys(public(key))
    beside = sign(path, key)
    lines = beside.read_bytes().splitlines()
    blob = base64.b64decode(b"".join(lines[1:-1]))
    for place in range(len(blob)):
        wrong = base64.b64encode(blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :])
        beside.write_bytes(lines[0] + b"\n" + wrong + b"\n" + lines[-1] + b"\n")
        with pytest.raises(Failure):
            read_archive(path, keys)


def test_a_file_of_keys_that_holds_anything_else_is_a_wrong_command_line(tmp_path: Path) -> None:
    write_archive(tmp_path, "own")
    made = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    signers = tmp_path / "signers"
    with pytest.raises(UsageFailure, match=r"--require-signature: .*signers cannot be read \(No such file"):
        find_archives(tmp_path, signers=signers)
    for text, words in (
        ("", "holds no public key"),
        ("# none yet\n", "holds no public key"),
        (f"{made}\nssh-rsa AAAA me\n", "line 2 of .* is no public key"),
        (f'me namespaces="git" {made}', "line 1 of .*options before the key are not supported"),
        (f'expiry-time="20200101" {made}', "line 1 of .*options before the key are not supported"),
        (f"cert-authority {made}", "line 1 of .*options before the key are not supported"),
        (f"no-pty,restrict {made}", "line 1 of .*options before the key are not supported"),
        ("ssh-ed25519 AAAA me", "line 1 of .* is no public key"),
        (made[:-9], "line 1 of .* is no public key"),
    ):
        signers.write_text(text)
        with pytest.raises(UsageFailure, match=words):
            find_archives(tmp_path, signers=signers)
    signers.write_text(f"no-reply@example.com,b+a=c@example.com {made} what was said")
    assert len(read_keys(signers)) == 1


# ---------------------------------------------------------------- what is served


@needs_openssh
def test_what_was_checked_is_what_is_used_whatever_happens_to_the_store(key: Path, tmp_path: Path) -> None:
    path = write_archive(tmp_path / "store", "own")
    sign(path, key)
    found = find_archives(path.parent, signers=public(key)).archives
    assert copy_checked(found, tmp_path / "unused", None) == found
    [taken] = copy_checked(found, tmp_path / "copies", public(key))
    assert taken.path == tmp_path / "copies/own.mar"
    assert (taken.name, taken.has_digests) == ("own", True)
    assert taken.path.read_bytes() == path.read_bytes()
    write_archive(path.parent, "own", "evil = True\n")  # After it was found and before it is taken in.
    with pytest.raises(Failure, match=r"own\.mar: it is not what was signed"):
        copy_checked(found, tmp_path / "copies", public(key))
    path.unlink()
    with pytest.raises(Failure, match=r"own\.mar: it cannot be copied to .*: No such file"):
        copy_checked(found, tmp_path / "copies", public(key))


@needs_openssh
def test_torchserve_serves_and_takes_in_signed_archives_alone_and_from_its_own_copies(
    key: Path, tmp_path: Path, work: Path
) -> None:
    store = tmp_path / "store"
    sign(write_archive(store, "good"), key)
    write_archive(store, "unsigned")
    changed = write_archive(store, "changed")
    sign(changed, key)
    write_archive(store, "changed", "import nothing_of_that_name\n")
    with launched(store, work, "--require-signature", str(public(key))) as server:
        server.await_ready()
        assert server.rest("good") == b"good 1.0"
        assert server.ask("GET", "/predictions/unsigned")[0] == 404
        assert f"server: archives are served only if a key of {public(key)} signed them\n" in server.err
        assert "Archive rejected: archive unsigned.mar: it is not signed" in server.err
        assert "Archive rejected: archive changed.mar: it is not what was signed" in server.err
        [copies] = work.glob("*/copies")
        assert sorted(path.name for path in copies.iterdir()) == ["good.mar", "good.mar.sig"]
        assert stat.S_IMODE(copies.parent.stat().st_mode) == 0o700

        write_archive(store, "good", version="1.1")  # Beside it lies the signature of 1.0.
        answer = reload(work, "good")
        assert (answer.returncode, server.rest("good")) == (1, b"good 1.0")
        assert "archive good.mar: it is not what was signed" in answer.stderr
        sign(store / "good.mar", key)
        answer = reload(work, "good")
        assert (answer.returncode, answer.stderr, server.rest("good")) == (0, "", b"good 1.1")
    assert not list(work.iterdir())


def test_the_second_host_asks_for_signatures_too(tmp_path: Path) -> None:
    signers = tmp_path / "signers"
    made = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    signers.write_bytes(made)
    write_archive(tmp_path / "store", "own")
    command = [
        sys.executable,
        "-m",
        "server.kserve",
        "--model-store",
        tmp_path / "store",
        "--require-signature",
        signers,
    ]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == (
        "server: archive own.mar: it is not signed: --require-signature asks for its signature in own.mar.sig\n"
    )
