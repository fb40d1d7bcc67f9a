"""The pipeline of one request: passes, sampling steps, guidance, batching, results."""
