"""Facts, instructions and prompts: what is read, and how it becomes tokens."""
