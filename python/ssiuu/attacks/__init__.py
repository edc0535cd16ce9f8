"""Attacks on unlearned models: does further training, or rounding the weights, bring the forgotten facts back?"""
