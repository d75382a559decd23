"""The ways in: HTTP, RunPod's queue, the command line. Each translates between its callers and
`App`."""
