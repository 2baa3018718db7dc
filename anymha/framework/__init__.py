"""The ops protocol, and what is known of frameworks without importing them."""
