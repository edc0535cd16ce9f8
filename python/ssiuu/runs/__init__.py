"""Run folders: what a run keeps, and how it is read."""
