"""``python -m anymha``: the command `anymha`."""

import sys

from anymha.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
