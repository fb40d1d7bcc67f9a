"""The paper's released models, as checkpoints of random weights at their released size."""
