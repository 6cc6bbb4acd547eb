"""Other people's label files: reading them without ever running what they hold, and writing them."""
