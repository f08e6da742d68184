"""Memory layers as modules: parameters, retrieval, tables."""
