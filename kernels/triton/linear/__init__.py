"""Products with weights as formats store them."""
