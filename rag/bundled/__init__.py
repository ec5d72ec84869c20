"""The small models that ship with the program, and the programs that trained them."""
