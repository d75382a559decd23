"""Where the results of jobs go: into the answer, or into a bucket."""
