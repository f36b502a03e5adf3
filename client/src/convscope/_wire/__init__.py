"""Generated from proto/*.proto by `make proto`. Do not edit."""
