"""`python -m convscope` is the command `convscope`."""

import sys

from convscope._cli import main

sys.exit(main())
