"""The doors: HTTP, RunPod's queue, the command line. Each translates between callers and `App`."""
