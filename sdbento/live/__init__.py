"""The running batch, live, for whoever watches: who is in it, who waits, how fast it goes."""
