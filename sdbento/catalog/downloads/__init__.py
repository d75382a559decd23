"""Downloads from the Hub: each in a process that can be ended, in turns between callers."""
