"""`python -m rwopt.cli`."""

import sys

from rwopt.cli import main

sys.exit(main())
