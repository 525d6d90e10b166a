"""What a recipe will cost, told before it trains: tried on a batch, swept over T, planned for
machines that nobody here has.
"""
