"""RunPod: its job API served over HTTP, and its queue worked off."""
