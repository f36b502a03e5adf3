"""Generated code of `proto/inference.proto`; `make proto` writes it, nothing here is edited by hand."""
