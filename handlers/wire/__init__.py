"""Generated code of `proto/convscope.proto`; `make proto` writes it, nothing here is edited by hand."""
