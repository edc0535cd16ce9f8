"""Training steps to time: ours, and Algorithm 1 as it is written."""
