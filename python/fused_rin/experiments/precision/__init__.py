"""What becomes of a network when U, or U + I, has few digits."""
