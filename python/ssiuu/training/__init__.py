"""Training on transformers' Trainer: schedule, trainers, and the log of every step."""
