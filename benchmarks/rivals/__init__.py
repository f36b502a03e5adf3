"""The rivals: the same network behind other servers, each written as its own documentation advises."""
