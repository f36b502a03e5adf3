"""The former name of `python -m archiver`, which goes on working: `python -m training.archive`."""

from __future__ import annotations

import sys

from archiver.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
