"""The cost of a recipe before it trains: measured on one batch, swept over T, or planned for other
machines.
"""
