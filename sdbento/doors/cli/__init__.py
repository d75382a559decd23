"""The command line: `sdbento serve`, `generate`, `doctor`, ..."""
