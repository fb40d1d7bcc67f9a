"""Requests: the record, its checks against a model, and its resolution."""
