"""The process of the command `convscope`, which is also `python -m convscope`."""

from __future__ import annotations

import signal
import sys


def run() -> int:
    """Run the command; Ctrl-C ends it at any moment without a traceback.

    Returns:
        The exit status.
    """
    is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # As a shell starts jobs in the background.
    if not is_ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # While modules are imported.
    from convscope._cli import main

    if not is_ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    if not is_ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # While threads and connections end.
    if status == 130:
        print("convscope: interrupted", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run())
