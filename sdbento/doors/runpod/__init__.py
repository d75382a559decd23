"""RunPod: a server for its job API, and a worker for its queue."""
