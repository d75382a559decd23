"""The running batch over HTTP."""
