"""Training in a process without target labels: what it gets, how it is sealed and started."""
