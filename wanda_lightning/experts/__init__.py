"""Mixtures of experts: what each expert adds, and models without some of them."""
