"""How long runs take, and how far they are."""
