"""A backend of array-api-strict, as a stranger would bring it."""
