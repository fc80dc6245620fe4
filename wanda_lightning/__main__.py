"""`python -m wanda_lightning` is the command `wanda-lightning`."""

import sys

from wanda_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
