"""What runs a network: torch always, a faster engine where there is one."""
