"""The toolkit: unlearn facts from a language model, attack the result, diagnose it, and report."""
