"""`hybrimoe profile`: where a model's time goes, between CPU, accelerators and the link."""
