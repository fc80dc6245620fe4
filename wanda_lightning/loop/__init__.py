"""What will be pruned, found before any weight changes, and the state of a pruning that is under way."""
