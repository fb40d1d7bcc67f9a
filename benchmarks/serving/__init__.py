"""What the benchmarks of the server share: a server in a process of its own, and its clients."""
