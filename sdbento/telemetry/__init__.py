"""What operators are told of requests: lines of the log, ids, spans."""
