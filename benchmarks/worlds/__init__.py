"""Small worlds whose truth is known, for the acceptance entries."""
