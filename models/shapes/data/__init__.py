"""Data: scenes, their labels and maps, and masks."""
