"""`python -m distclip`, which torchrun starts on every rank: `torchrun -m distclip doctor`."""

import sys

from distclip.cli import main

if __name__ == "__main__":
    sys.exit(main())
