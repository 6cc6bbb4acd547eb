"""What `ferkd COMMAND` does: one small function a command. cli.py loads the file of the command that was asked for, and no other.

A command's docstring is its help. It ends with `Example:` and indented lines, each a whole command line.
"""
