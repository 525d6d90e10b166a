"""The command line: what a user may type, and one function of the product that answers it."""
