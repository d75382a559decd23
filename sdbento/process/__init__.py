"""What concerns the process that serves, whatever it serves: memory, threads, imports, its end."""
