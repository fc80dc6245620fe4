"""What trains the kept weights after the masks are chosen."""
