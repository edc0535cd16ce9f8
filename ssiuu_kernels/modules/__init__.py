"""What a module is, and the forward of a patched MLP."""
