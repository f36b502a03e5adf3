"""Generated code of `proto/*.proto`; `make proto` writes it, nothing here is edited by hand."""
