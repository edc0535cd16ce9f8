"""Scores of a model on facts: likelihood of the options, generation, ROUGE-L."""
