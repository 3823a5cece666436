"""Evidence: when interactions matter, when they do not, and what each way to the matrix costs."""
