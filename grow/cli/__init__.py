"""The commands of `grow`: each is a function whose signature and docstring are its flags and its help."""
