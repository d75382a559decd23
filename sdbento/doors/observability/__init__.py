"""What operators see of the server: a line of the log for each request, traces, GET /stats."""
