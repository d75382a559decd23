"""Runs the command line as `python -m sdbento`, which works without installing it."""

import sys

from sdbento.doors.cli.commands import main

sys.exit(main())
