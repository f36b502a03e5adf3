"""The command line behind the make targets: `python3 -m deploy.commands --help`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from deploy.commands import configuration, credentials, replicas
from deploy.commands.common import Refused
from deploy.commands.credentials import Vault


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all commands."""
    parser = argparse.ArgumentParser(prog="python3 -m deploy.commands", description=__doc__)
    parser.add_argument(
        "--secrets",
        type=Path,
        default=os.environ.get("CONVSCOPE_SECRETS"),
        metavar="DIR",
        help="folder of secrets; default: secrets/, with what .env names instead of its parts",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("secrets", help="make what is missing in the folder of secrets")
    key = commands.add_parser("key", help="add a caller's key")
    key.add_argument("name")
    key.add_argument("--output", type=Path, metavar="FILE", help="write the key there instead of showing it")
    commands.add_parser("revoke", help="take a caller's key away").add_argument("name")
    commands.add_parser("keys", help="list the callers who have a key")
    certificate = commands.add_parser("certificate", help="put another certificate in place")
    certificate.add_argument(
        "--cert", type=Path, metavar="FILE", help="the certificate, and after it the intermediates"
    )
    certificate.add_argument("--key", type=Path, metavar="FILE", help="its private key")
    certificate.add_argument("--test", action="store_true", help="make a self-signed one")
    commands.add_parser("check-config", help="check the configuration with the programs that read it")
    commands.add_parser("replicas", help="list the replicas")
    restart = commands.add_parser("restart", help="restart one replica")
    restart.add_argument("name")
    restart.add_argument("--force", action="store_true", help="even if no other is ready")
    commands.add_parser("update", help="replace all replicas, one after another")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # An update takes minutes: each line when it is written.
    asked = build_parser().parse_args(arguments)
    vault = Vault(asked.secrets)
    try:
        actions: dict[str, Callable[[], None]] = {
            "secrets": lambda: credentials.make(vault),
            "key": lambda: credentials.add_key(vault, asked.name, asked.output),
            "revoke": lambda: credentials.revoke_key(vault, asked.name),
            "keys": lambda: credentials.list_keys(vault),
            "certificate": lambda: credentials.change_certificate(vault, asked.cert, asked.key, test=asked.test),
            "check-config": lambda: configuration.check(vault),
            "replicas": replicas.list_replicas,
            "restart": lambda: replicas.restart(vault, asked.name, force=asked.force),
            "update": lambda: replicas.update(vault),
        }
        actions[asked.command]()
    except Refused as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"{error.filename}: {error.strerror}" if error.filename else error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
