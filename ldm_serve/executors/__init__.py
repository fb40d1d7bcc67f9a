"""Executors: where requests are generated. The protocol, and its implementations."""
