"""The command line. It parses commands, and calls one function of the product for each of them."""
