"""How fast and how large: `python -m jaxsparse bench NAME`."""
