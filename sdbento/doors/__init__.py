"""The ways in: HTTP routes, the command line. Each translates to and from `App`, nothing more."""
