"""The command ``cell2text``: ``python -m cell2text`` does the same."""

import sys

from cell2text.annotation.annotate import main

if __name__ == "__main__":
    sys.exit(main())
