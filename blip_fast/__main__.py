"""`python -m blip_fast` is `blip-fast`: launchers start ranks by module."""

import sys

from blip_fast.cli import main

sys.exit(main())
