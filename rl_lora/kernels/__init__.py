"""Fast products and attention: C++ of our own, what it is compiled by and verified with."""
