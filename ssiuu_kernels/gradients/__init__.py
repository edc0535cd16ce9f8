"""How `grad` and `target_grad` are made: the engines side by side."""
