"""What a job's input can look like, and the output that goes with each."""
