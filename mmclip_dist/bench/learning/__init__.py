"""What is learned: arms (overrides of one recipe) x seeds, compared on the same held-out patients."""
