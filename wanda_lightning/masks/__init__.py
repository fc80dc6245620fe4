"""Masks: choose the weights that become zero, solve for the others, and write both."""
