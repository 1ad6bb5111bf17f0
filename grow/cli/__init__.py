"""The commands of `grow`: a function each, whose signature and docstring are its flags and its help."""
