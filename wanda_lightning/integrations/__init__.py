"""Zeros that stay zero in training libraries other than Lightning."""
