"""The bundle on disk: its manifest, and its files compared with their records."""
