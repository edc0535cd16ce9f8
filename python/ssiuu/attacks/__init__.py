"""Attacks on unlearned models: does a little further training bring the forgotten facts back?"""
