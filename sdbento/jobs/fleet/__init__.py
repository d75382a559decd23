"""What several servers need to share one database of jobs."""
