"""What a person types: joins data and learning, no mathematics."""
