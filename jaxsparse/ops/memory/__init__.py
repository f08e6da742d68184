"""Memory layers: scores, addresses, bags of rows, tables over devices."""
