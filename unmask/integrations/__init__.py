"""Other programs that decode with this package. Each folder is named after its program and imports it on demand."""
