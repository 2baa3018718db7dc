"""Run the self-test: ``python -m tests.selftest``."""

from __future__ import annotations

import sys

from tests.selftest.command import main

if __name__ == "__main__":
    sys.exit(main())
