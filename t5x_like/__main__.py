"""`python -m t5x_like`."""

import sys

from t5x_like.cli import main

if __name__ == "__main__":
    sys.exit(main())
