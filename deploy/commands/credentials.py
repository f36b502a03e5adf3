"""The folder of secrets: `make secrets`, `make key`, `make revoke`, `make keys`, `make certificate`.

Only this user can enter the folder. Files in it that containers mount are world-readable, since the containers' users
do not exist on this machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.commands import certificates, gateway
from deploy.commands.common import ROOT, Refused, audit, deployment, has_docker, now, only_one, replace, setting, stamp

NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,62}")
# Names that metrics use for requests without a valid key, and words that YAML does not read as text.
RESERVED = ("none", "unread", "null", "true", "false", "yes", "no", "on", "off", "y", "n")
PROBE = "probe"
RELOADS = "extension_config_discovery.http_filter.api_keys.config_reload"
HEAD = """\
# Who may ask. A `key` is the SHA-256 digest of what the caller sends: printf %s "$KEY" | sha256sum
# `make key NAME=...` and `make revoke NAME=...` change this file; what is renamed over it is read again at once.
resources:
  - "@type": type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig
    name: api_keys
    typed_config:
      "@type": type.googleapis.com/envoy.extensions.filters.http.api_key_auth.v3.ApiKeyAuth
      key_sources: [{header: x-api-key}]
      forwarding: {header: x-convscope-caller, hide_credentials: true}
      credentials:
"""
_PART = r"""["']?(?:client["']?:\s*["']?(?P<name>[^"',}]+?)|key["']?:\s*["']?(?P<digest>[0-9a-f]{64}))["']?\s*"""
_TWO = _PART + "," + r"\s*" + _PART.replace("name>", "name2>").replace("digest>", "digest2>")
ENTRY = re.compile(r"\s*-\s*\{\s*" + _TWO + r"\}\s*(?:#\s*(?:added\s+)?(?P<added>.*))?")


@dataclass(frozen=True)
class Key:
    """A line of `keys.yaml`.

    Attributes:
        name: Name of the caller, which logs and metrics show.
        digest: The SHA-256 of the key, in hexadecimal.
        added: When the key was added; empty if the file does not say.
    """

    name: str
    digest: str
    added: str = ""

    def write(self) -> str:
        """Return the line."""
        return f"        - {{client: {self.name}, key: {self.digest}}}" + (
            f"  # added {self.added}" if self.added else ""
        )


@dataclass(frozen=True)
class Keys:
    """What `keys.yaml` holds: the head, as it is, and the keys."""

    head: str
    keys: tuple[Key, ...]

    @classmethod
    def parse(cls, text: str) -> Keys:
        """Read the file.

        Raises:
            Refused: A line after `credentials:` is not one key, or a name or a key is there twice.
        """
        found = re.search(r"^ *credentials:[ \t]*(?:\[\])?[ \t]*\n?", text, re.M)
        if not found:
            raise Refused("keys.yaml has no `credentials:`, under which the keys stand, each on a line")
        keys = []
        first = text[: found.end()].count("\n") + 1
        for number, line in enumerate(text[found.end() :].splitlines(), first):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            entry = ENTRY.fullmatch(line)
            name = (entry["name"] or entry["name2"] or "").strip() if entry else ""
            digest = (entry["digest"] or entry["digest2"] or "") if entry else ""
            if not (entry and name and digest):
                raise Refused(
                    f"keys.yaml, line {number}, is not `- {{client: NAME, key: DIGEST}}`: {line.strip()[:40]}"
                )
            keys.append(Key(name, digest, (entry["added"] or "").strip()))
        for what, values in (("name", [one.name for one in keys]), ("key", [one.digest for one in keys])):
            if len(set(values)) < len(values):
                raise Refused(f"keys.yaml has a {what} twice")
        return cls(text[: found.start()] + "      credentials:\n", tuple(keys))

    def write(self) -> str:
        """Return the file."""
        head = self.head if self.keys else self.head.replace("credentials:\n", "credentials: []\n")
        return head + "".join(one.write() + "\n" for one in self.keys)

    def find(self, name: str) -> Key | None:
        """Return the key of a caller."""
        return next((one for one in self.keys if one.name == name), None)


class Vault:
    """The folders in which keys and certificate lie.

    Args:
        folder: The folder of secrets; None for `secrets/`, with what the settings name instead of its parts.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = (folder or ROOT / "secrets").absolute()
        parts = {"certificate": "CONVSCOPE_CERTIFICATE", "api-keys": "CONVSCOPE_API_KEYS"}
        parts |= {"grafana-password": "CONVSCOPE_GRAFANA_PASSWORD", "probe-key": "CONVSCOPE_PROBE_KEY"}
        named = {part: setting(name) if folder is None else "" for part, name in parts.items()}
        places = {part: ROOT / name if name else self.folder / part for part, name in named.items()}
        self.certificate, self.api_keys, self.grafana, self.probe = places.values()
        self.hostname = setting("CONVSCOPE_HOSTNAME", "localhost")

    @property
    def keys_file(self) -> Path:
        """Return the path of `keys.yaml`."""
        return self.api_keys / "keys.yaml"

    def read_keys(self) -> Keys:
        """Read `keys.yaml`.

        Raises:
            Refused: There is none, or keys are turned off.
        """
        if self.api_keys == ROOT / "deploy/envoy/open":
            raise Refused("keys are turned off: CONVSCOPE_API_KEYS is ./deploy/envoy/open")
        if not self.keys_file.exists():
            raise Refused(f"there is no {self.keys_file}: `make secrets` makes it")
        return Keys.parse(self.keys_file.read_text())

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Make the folder if there is none, and let one command at a time change it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        with only_one(self.folder / ".lock", "another change of the secrets"):
            for left in self.folder.glob(".trial-*"):  # Left by a command that was killed.
                shutil.rmtree(left)
            yield

    def put_keys(self, keys: Keys, *, tried: bool = True) -> None:
        """Put a new `keys.yaml` in place, after a temporary Envoy has accepted it.

        Raises:
            Refused: Envoy rejects it.
        """
        text = keys.write()
        if tried and not has_docker() and _without_comments(keys.head) != _without_comments(HEAD):
            raise Refused(
                f"{self.keys_file} was changed by hand, and no Docker engine answers here to ask Envoy about it"
            )
        if tried:
            part = "extension_config_discovery.http_filter.api_keys"
            self._try(part, "/run/secrets/api_keys", {"keys.yaml": text})
        self.api_keys.mkdir(parents=True, exist_ok=True)
        replace(self.keys_file, text, 0o644)

    def put_certificate(self, chain: str, key: str, *, tried: bool = True) -> None:
        """Put a certificate in place, after a temporary Envoy has accepted it.

        Raises:
            Refused: Envoy rejects it.
        """
        if tried:
            self._try("sds.certificate", "/run/secrets/certificate", {"tls.crt": chain, "tls.key": key})
        certificates.install(self.certificate, chain, key)
        if all(one.stat().st_mode & 0o001 for one in [self.certificate, *self.certificate.resolve().parents]):
            print(f"Everybody on this machine can read the private key: close a folder above {self.certificate}.")

    def _try(self, part: str, target: str, files: dict[str, str]) -> None:
        if not has_docker():
            print("No Docker engine answers here: this was not checked with Envoy.")
            return
        with tempfile.TemporaryDirectory(dir=self.folder, prefix=".trial-") as name:
            Path(name).chmod(0o755)
            for file, content in files.items():
                replace(Path(name) / file, content, 0o644)
            # Both folders are named: with a folder of secrets of its own, Compose's settings need not lead there.
            mounts = {"/run/secrets/api_keys": self.api_keys, "/run/secrets/certificate": self.certificate}
            gateway.try_files({**mounts, target: Path(name)}, part)


def make(vault: Vault) -> None:
    """Make what is missing in the folder of secrets, and say what there is: `make secrets`."""
    with vault.changing():
        if not (vault.certificate / "tls.crt").exists():
            chain, key = certificates.make_test_certificate(vault.hostname)
            vault.put_certificate(chain, key, tried=False)
            _audit_certificate(vault, "test certificate made", chain)
        _show_certificate(vault)
        fresh = not vault.keys_file.exists()
        if fresh:
            first, digest = _make_key()
            vault.put_keys(Keys(HEAD, (Key("first", digest, stamp(now())),)), tried=False)
            replace(vault.folder / "api-key", first + "\n", 0o600)
            audit(vault.folder, "key added", name="first")
            print(f"{vault.folder / 'api-key'}: the key of the caller `first`")
        keys = vault.read_keys() if vault.api_keys != ROOT / "deploy/envoy/open" else None
        known = vault.probe.exists() and _digest(vault.probe.read_text().strip())
        if keys and not any((one.name, one.digest) == (PROBE, known) for one in keys.keys):
            probe, digest = _make_key()
            others = tuple(one for one in keys.keys if one.name != PROBE)
            vault.put_keys(Keys(keys.head, (*others, Key(PROBE, digest, stamp(now())))), tried=not fresh)
            _write_for_containers(vault.probe, probe + "\n")
            audit(vault.folder, "key added", name=PROBE)
            print(f"{vault.probe}: the key by which the probe asks")
        if not vault.grafana.exists():
            replace(vault.grafana, secrets.token_hex(16) + "\n", 0o644)
            print(f"{vault.grafana}: the password of Grafana's user admin")


def add_key(vault: Vault, name: str, output: Path | None = None) -> None:
    """Add a caller's key and show it once, or write it to a file that only this user can read: `make key`.

    Raises:
        Refused: The name is invalid or in use, or the gateway rejects the key.
    """
    if not NAME.fullmatch(name) or name.lower() in RESERVED:
        raise Refused(
            f"{name!r} is no valid name: a letter, then letters, digits, `.`, `_` and `-`, up to 63, "
            f"and not {', '.join(RESERVED)}"
        )
    with vault.changing():
        keys = vault.read_keys()
        if keys.find(name):
            raise Refused(
                f"there is a key of {name} already; `make revoke NAME={name}` first, or give the new one another name"
            )
        if output is not None and output.exists():
            raise Refused(f"{output} is there already")
        key, digest = _make_key()
        if output is not None:  # Before the key holds, or it could be in force and known to nobody.
            replace(output, key + "\n", 0o600)
        try:
            vault.put_keys(Keys(keys.head, (*keys.keys, Key(name, digest, stamp(now())))))
        except BaseException:
            if output is not None:
                output.unlink(missing_ok=True)
            raise
        if name == PROBE:
            _write_for_containers(vault.probe, key + "\n")
        audit(vault.folder, "key added", name=name)
        if output is None:
            print(f"The key of {name}, which is shown this once and stored nowhere:\n{key}")
        else:
            print(f"{output}: the key of {name}")
        if not gateway.running():
            print("The gateway does not run; it reads the key when it starts.")
        elif gateway.wait_until(lambda: gateway.answers_to(key) not in (None, 401, 429)):
            print(f"The gateway accepts the key of {name}.")
        else:
            raise Refused(
                f"the key is in {vault.keys_file}, but the gateway rejects it. The gateway logged:\n"
                f"{gateway.complaints()}"
            )


def revoke_key(vault: Vault, name: str) -> None:
    """Take a caller's key away: `make revoke`.

    Raises:
        Refused: There is no such key, or the gateway has not reloaded the keys.
    """
    with vault.changing():
        keys = vault.read_keys()
        if not keys.find(name):
            raise Refused(
                f"there is no key of {name!r}; there are {', '.join(one.name for one in keys.keys) or 'none'}"
            )
        # Of the revoked key only the digest is known, so the gateway cannot be asked about it. But it counts how
        # often it has read the keys.
        asked = gateway.running()
        before = gateway.statistic(RELOADS) if asked else None
        if asked and before is None:
            raise Refused("the gateway's admin interface does not answer; try again in a moment")
        vault.put_keys(Keys(keys.head, tuple(one for one in keys.keys if one.name != name)))
        audit(vault.folder, "key revoked", name=name)
        if name == PROBE:
            print("The probe is refused from now on: `make secrets` makes it a new key.")
        if not asked:
            print("The gateway does not run; it reads the keys when it starts.")
        elif gateway.wait_until(lambda: gateway.statistic(RELOADS) not in (None, before)):
            print(f"The gateway has reloaded the keys without the key of {name}: it gets 401.")
        else:
            raise Refused(
                f"{vault.keys_file} has the key no longer, but the gateway may. It says:\n{gateway.complaints()}"
            )


def list_keys(vault: Vault) -> None:
    """Print the callers' names, and when their keys were added: `make keys`."""
    keys = vault.read_keys().keys
    width = max([len(one.name) for one in keys], default=0)
    for one in keys:
        print(f"{one.name:{width}}  {'added ' + one.added if one.added else 'added at an unknown time'}")
    if not keys:
        print("nobody has a key")


def change_certificate(vault: Vault, chain_file: Path | None, key_file: Path | None, *, test: bool = False) -> None:
    """Put another certificate in place and see that the gateway serves it: `make certificate`.

    Args:
        vault: Where to.
        chain_file: The certificate, and after it the intermediates.
        key_file: Its private key.
        test: Make a test certificate instead.

    Raises:
        Refused: It cannot be served, or the gateway does not serve it.
    """
    if test and not (chain_file or key_file):
        chain_text, key_text = certificates.make_test_certificate(vault.hostname)
    elif chain_file and key_file and not test:
        chain_text, key_text = _read_input("CERT", chain_file), _read_input("KEY", key_file)
    else:
        _show_certificate(vault)
        raise Refused("make certificate CERT=fullchain.pem KEY=privkey.pem; or TEST=yes for a self-signed one")
    [leaf, *_], problems = certificates.check(chain_text, key_text, vault.hostname)
    if problems:
        raise Refused("nothing was changed:\n" + "\n".join(f"  {one}" for one in problems))
    with vault.changing():
        vault.put_certificate(chain_text, key_text)
        _audit_certificate(vault, "test certificate made" if test else "certificate replaced", chain_text)
    _show_certificate(vault)
    if not gateway.running():
        print("The gateway does not run; it reads the certificate when it starts.")
    elif not gateway.secured():
        print("The gateway serves no certificate: CONVSCOPE_DOOR is plain.")
    elif gateway.wait_until(lambda: gateway.served_fingerprint() == leaf.fingerprint):
        print("The gateway serves it.")
    else:
        served = gateway.served_fingerprint()
        what = (
            f"the gateway still serves another, SHA-256 {served[:16]}"
            if served
            else "the gateway does not answer over TLS"
        )
        raise Refused(f"the certificate is in {vault.certificate}, but {what}. It says:\n{gateway.complaints()}")


def show_changes(vault: Vault) -> None:
    """Note in the audit log which files of the configuration are new since it was last checked."""
    folders = [Path(mount["source"]) for mount in deployment()["services"]["gateway"]["volumes"]] + [ROOT / "deploy"]
    files = [one for folder in folders for one in folder.rglob("*") if one.suffix in (".yaml", ".yml", ".lua")]
    found = {str(one): hashlib.sha256(one.read_bytes()).hexdigest() for one in [ROOT / "docker-compose.yml", *files]}
    record = vault.folder / "configuration.sha256"
    old = {line[66:]: line[:64] for line in record.read_text().splitlines()} if record.exists() else {}
    changed = sorted(name for name in {*found, *old} if found.get(name) != old.get(name))
    if changed:
        short = [str(Path(name).relative_to(ROOT)) if Path(name).is_relative_to(ROOT) else name for name in changed]
        audit(
            vault.folder,
            "configuration changed" if old else "configuration noted",
            files=" ".join(short) if old else "",
        )
        replace(record, "".join(f"{digest}  {name}\n" for name, digest in sorted(found.items())), 0o600)


def _without_comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.lstrip().startswith("#")]


def _make_key() -> tuple[str, str]:
    """Return a key and its digest: 192 bits, and short enough for one block of SHA-256."""
    key = secrets.token_hex(24)
    return key, _digest(key)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _write_for_containers(path: Path, content: str) -> None:
    """Write a file that a container mounts by itself: in place, since a mount keeps to the file and not to its name."""
    path.touch(0o644)
    path.chmod(0o644)
    path.write_text(content)


def _read_input(what: str, path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(
            f"{what}: {path} cannot be read: {getattr(error, 'strerror', None) or 'it is no PEM file'}"
        ) from error


def _show_certificate(vault: Vault) -> None:
    path = vault.certificate / "tls.crt"
    if path.exists():
        print(f"{path}: {certificates.read_chain(path.read_text())[0].describe()}")


def _audit_certificate(vault: Vault, what: str, chain: str) -> None:
    leaf = certificates.read_chain(chain)[0]
    audit(vault.folder, what, names=leaf.names, fingerprint=leaf.fingerprint, ends=stamp(leaf.ends))
