"""Hidden units: find those that can leave, price them, choose, take them out, and write what is left."""
