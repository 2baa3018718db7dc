"""``python -m benchmarks``: time the layer beside the frameworks' own."""

import sys

from benchmarks.command import main

if __name__ == "__main__":
    sys.exit(main())
