"""`python -m guerdon`, and so `accelerate launch -m guerdon`."""

from __future__ import annotations

import sys

from guerdon.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
