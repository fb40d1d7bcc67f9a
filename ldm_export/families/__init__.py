"""The checkpoint families, as rows."""
