"""`python -m sdbento`: the command where it is not installed, as in the image."""

import sys

from sdbento.doors.cli.commands import main

sys.exit(main())
